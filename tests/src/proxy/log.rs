//! What went through a proxy.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde::Serialize;

use super::plan::Operation;

/// So many requests are kept; those after them are only counted.
const MOST_ENTRIES: usize = 2_000_000;
/// How long [`Log::entries`] waits for answers that are on their way.
const PATIENCE: Duration = Duration::from_secs(2);

/// A request and what came of it. Times are microseconds since the proxy started.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// Counted from 0.
    pub number: u64,
    /// The connection it came over, counted from 0.
    pub connection: u64,
    /// What it asked for.
    pub operation: Operation,
    /// Of what: see [`super::Asked::key`].
    pub key: String,
    /// The first byte and the last of the object that it wants, if not all.
    pub range: Option<(u64, u64)>,
    /// When its head was there.
    pub began_us: u64,
    /// When the head of the answer went out.
    pub answered_us: Option<u64>,
    /// When the last byte of the answer went out, or the connection ended.
    pub ended_us: Option<u64>,
    /// Of the answer as the client got it.
    pub status: Option<u16>,
    /// Bytes of the request's body.
    pub received_bytes: u64,
    /// Bytes of the answer's body.
    pub sent_bytes: u64,
    /// What was done to it.
    pub fault: Option<&'static str>,
    /// The proxy's own late duplicate of an earlier request; nobody waits for its answer.
    pub is_duplicate: bool,
}

/// The log of one proxy.
pub(super) struct Log {
    origin: Instant,
    kept: Mutex<Kept>,
    ended: Condvar,
}

#[derive(Default)]
struct Kept {
    next: u64,
    /// The number of the first in `entries`.
    first: u64,
    entries: Vec<Entry>,
    open: usize,
}

impl Log {
    pub(super) fn new() -> Self {
        Self { origin: Instant::now(), kept: Mutex::default(), ended: Condvar::new() }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Gives a request its number.
    pub(super) fn begin(&self, entry: impl FnOnce(u64, u64) -> Entry) -> u64 {
        let began_us = self.now_us();
        let mut kept = self.kept.lock();
        let number = kept.next;
        kept.next += 1;
        if kept.entries.len() < MOST_ENTRIES {
            kept.entries.push(entry(number, began_us));
            kept.open += 1;
        }
        number
    }

    pub(super) fn change(&self, number: u64, change: impl FnOnce(&mut Entry)) {
        let mut kept = self.kept.lock();
        let Some(at) = number.checked_sub(kept.first) else { return };
        if let Some(entry) = usize::try_from(at).ok().and_then(|at| kept.entries.get_mut(at)) {
            change(entry);
        }
    }

    /// The request with this number, if it is kept.
    pub(super) fn find(&self, number: u64) -> Option<Entry> {
        let mut found = None;
        self.change(number, |entry| found = Some(entry.clone()));
        found
    }

    pub(super) fn answered(&self, number: u64, status: u16) {
        let now_us = self.now_us();
        self.change(number, |entry| {
            (entry.answered_us, entry.status) = (Some(now_us), Some(status));
        });
    }

    pub(super) fn end(&self, number: u64) {
        let now_us = self.now_us();
        let mut ended = false;
        self.change(number, |entry| {
            ended = entry.ended_us.is_none();
            entry.ended_us.get_or_insert(now_us);
        });
        if ended {
            self.kept.lock().open -= 1;
            self.ended.notify_all();
        }
    }

    /// All requests since the start or the last [`Log::clear`], by number; waits a moment for those
    /// that are being answered: a client may know the end of an answer before the proxy does.
    pub(super) fn entries(&self) -> Vec<Entry> {
        let until = Instant::now() + PATIENCE;
        let mut kept = self.kept.lock();
        while kept.open > 0 && !self.ended.wait_until(&mut kept, until).timed_out() {}
        kept.entries.clone()
    }

    /// Takes those that have ended off the front of the log.
    pub(super) fn take_ended(&self) -> Vec<Entry> {
        let mut kept = self.kept.lock();
        let open = kept.entries.iter().position(|entry| entry.ended_us.is_none());
        let count = open.unwrap_or(kept.entries.len());
        kept.first += count as u64;
        kept.entries.drain(..count).collect()
    }

    /// Forgets what is there. Numbers go on.
    pub(super) fn clear(&self) {
        let mut kept = self.kept.lock();
        kept.entries.clear();
        kept.first = kept.next;
        kept.open = 0;
    }
}

/// How many requests were made one after the other at least: the longest chain in which each began
/// only after the one before had been answered. Late duplicates do not count. A first-byte delay makes
/// requests that need not wait for each other overlap.
pub fn rounds(entries: &[Entry]) -> usize {
    let spans = entries.iter().filter(|entry| !entry.is_duplicate);
    let mut spans: Vec<_> =
        spans.filter_map(|entry| Some((entry.answered_us?, entry.began_us))).collect();
    spans.sort_unstable();
    let mut chain = 0;
    let mut answered = None;
    for (answered_us, began_us) in spans {
        if answered.is_none_or(|before| began_us >= before) {
            chain += 1;
            answered = Some(answered_us);
        }
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(began_us: u64, answered_us: u64) -> Entry {
        Entry {
            number: 0,
            connection: 0,
            operation: Operation::Get,
            key: String::new(),
            range: None,
            began_us,
            answered_us: Some(answered_us),
            ended_us: Some(answered_us),
            status: Some(200),
            received_bytes: 0,
            sent_bytes: 0,
            fault: None,
            is_duplicate: false,
        }
    }

    #[test]
    fn rounds_are_the_longest_chain() {
        assert_eq!(rounds(&[]), 0);
        assert_eq!(rounds(&[entry(0, 10), entry(1, 11), entry(5, 30)]), 1);
        let three = [entry(0, 10), entry(1, 30), entry(11, 20), entry(21, 40), entry(25, 50)];
        assert_eq!(rounds(&three), 3);
    }

    #[test]
    fn what_ends_after_a_clear_disturbs_nothing() {
        let log = Log::new();
        let begin = || log.begin(|number, began_us| Entry { number, ..entry(began_us, 0) });
        let old = begin();
        log.clear();
        let new = begin();
        log.end(old);
        log.change(new, |entry| entry.ended_us = None);
        log.end(new);
        let kept = log.entries();
        assert_eq!(kept.iter().map(|entry| entry.number).collect::<Vec<_>>(), [new]);
    }
}
