//! What a restore did when: a bounded list of events, for pictures.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;

/// Events that are kept of a restore, 32 KiB; later ones are counted.
const MAX_EVENTS: usize = 2048;

/// What happened to some pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A fault, served from a frame in memory.
    FaultCached,
    /// A fault for which a frame had to be fetched.
    FaultFetched,
    /// A fault on a zero page.
    FaultZero,
    /// A fault on a page that the guest had given back.
    FaultRemoved,
    /// Pages of the working set were installed.
    Install,
    /// Zero pages of the working set were installed.
    InstallZero,
}

/// One event.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Event {
    /// Microseconds since the handshake: of a fault when it came, of an install when it was done.
    pub at_us: u32,
    /// Microseconds that a fault waited.
    pub took_us: u32,
    /// First page of the memory file.
    pub page: u32,
    /// How many pages of 4 KiB.
    pub pages: u16,
    /// What.
    pub kind: EventKind,
    /// Whether the working set had the page of a fault, so that it came late; `false` without a set.
    pub planned: bool,
}

/// The events of a restore, by the end of each.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Timeline {
    /// The first ones.
    pub events: Vec<Event>,
    /// How many more there were.
    pub dropped: u64,
}

/// A timeline under way.
#[derive(Debug)]
pub(crate) struct Recorder {
    began: Instant,
    timeline: Mutex<Timeline>,
}

impl Recorder {
    pub(crate) fn new(began: Instant) -> Self {
        Self { began, timeline: Mutex::default() }
    }

    /// Something that ended now and took so long.
    pub(crate) fn add(&self, kind: EventKind, pages: (u64, u64), took: Duration, planned: bool) {
        let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        let event = Event {
            at_us: micros(self.began.elapsed().saturating_sub(took)),
            took_us: micros(took),
            page: u32::try_from(pages.0).unwrap_or(u32::MAX),
            pages: u16::try_from(pages.1).unwrap_or(u16::MAX),
            kind,
            planned,
        };
        let mut timeline = self.timeline.lock();
        match timeline.events.len() < MAX_EVENTS {
            true => timeline.events.push(event),
            false => timeline.dropped += 1,
        }
    }

    pub(crate) fn timeline(&self) -> Timeline {
        self.timeline.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_is_bounded_and_says_what_is_not_in_it() {
        let recorder = Recorder::new(Instant::now());
        for page in 0..MAX_EVENTS as u64 + 7 {
            recorder.add(EventKind::FaultZero, (page, 1), Duration::ZERO, false);
        }
        let timeline = recorder.timeline();
        assert_eq!((timeline.events.len(), timeline.dropped), (MAX_EVENTS, 7));
        assert_eq!(timeline.events[5].page, 5);
        assert!(size_of::<Event>() <= 16, "the bound in bytes");
    }
}
