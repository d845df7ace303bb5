//! An object that is read before anybody knows what is in it, or how long it is: a working set whose snapshot is
//! still being opened. Its first bytes are asked for over many connections at once; when its header and the
//! snapshot's manifest are there, its frames are taken from these bytes as from any other read, and verified.

use std::ops::{Range, RangeInclusive};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use tokio::task::JoinSet;

use super::ranges::{SHORTEST_BYTES, SPREAD};
use super::{Fetcher, ObjectId};
use crate::format::keys::{self, PackId};
use crate::{SnapshotId, Urgency};

/// Most bytes that are read ahead of one object; of a longer one the rest is asked for when it is known what is
/// wanted. At 90 MB/s a connection this much takes 6 ms, a round 30 ms.
const MOST_BYTES: u64 = 8 << 20;
/// Of each request where the object's length is not known: 12 ms at 90 MB/s. Requests past its end are refused and
/// cost no more than that.
const GUESSED_PART_BYTES: u64 = 1 << 20;

/// The first bytes of an object, on their way. What is not here yet when it is dropped is not waited for.
pub(crate) struct Ahead {
    part_bytes: u64,
    end: u64,
    parts: Vec<Part>,
    _tasks: JoinSet<()>,
}

/// `None` where the bytes did not come.
type Part = Shared<BoxFuture<'static, Option<Bytes>>>;

impl Ahead {
    /// How many bytes come first, and by themselves.
    pub(crate) fn first_bytes(&self) -> u64 {
        self.part_bytes.min(self.end)
    }

    /// Whether these bytes of the object are among those that are read.
    pub(super) fn holds(&self, range: &Range<u64>) -> bool {
        range.end <= self.end
    }

    /// These bytes of the object, when they are here; `None` if they do not come.
    pub(crate) async fn bytes(&self, range: Range<u64>) -> Option<Bytes> {
        if !self.holds(&range) || range.is_empty() {
            return None;
        }
        let index = |at: u64| usize::try_from(at / self.part_bytes).unwrap_or(usize::MAX);
        let (first, last) = (index(range.start), index(range.end - 1));
        let parts = self.parts.get(first..=last)?;
        let parts = parts.iter().cloned().zip(first..).map(|(part, number)| async move {
            let range = self.range_of(number as u64);
            part.await.filter(|bytes| bytes.len() as u64 == range.end - range.start).ok_or(())
        });
        let parts = futures::future::try_join_all(parts).await.ok()?;
        let from = usize::try_from(range.start - first as u64 * self.part_bytes).ok()?;
        let length = usize::try_from(range.end - range.start).ok()?;
        let all = match &parts[..] {
            [one] => one.clone(),
            several => several.concat().into(),
        };
        Some(all.slice(from..from + length))
    }

    /// Which bytes a part is, of an object that is as long as is known.
    fn range_of(&self, number: u64) -> Range<u64> {
        let start = number * self.part_bytes;
        start..(start + self.part_bytes).min(self.end)
    }

    /// It turns out that the object has so many bytes.
    pub(crate) fn of_length(mut self, object_bytes: u64) -> Self {
        self.end = self.end.min(object_bytes);
        self
    }
}

impl Fetcher {
    /// Begins to read the first bytes of an object of a remote store. `None` where it does not pay: a local store
    /// is read frame by frame, and a node that has some of the object's frames on its disk has most of them.
    pub(crate) fn read_ahead(&self, object: ObjectId, object_bytes: u64) -> Option<Ahead> {
        let end = object_bytes.min(MOST_BYTES);
        let pays = end > 0 && !self.is_here(object..=object);
        pays.then(|| self.read_parts(object, end, end.div_ceil(SPREAD).max(SHORTEST_BYTES)))
    }

    /// The same of a snapshot's first working set, before anybody knows whether there is one, or a later one;
    /// [`Ahead::of_length`] says it. A node that has frames of its sets or of its own packs guesses nothing.
    pub(crate) fn guess_ahead(&self, snapshot: SnapshotId) -> Option<Ahead> {
        let set = |sequence| ObjectId::WorkingSet(snapshot, sequence);
        let pack = |number| ObjectId::Pack(PackId { txn: snapshot, number });
        let first = set(keys::FIRST_SEQUENCE);
        let is_known =
            self.is_here(first..=set(keys::MAX_SEQUENCE)) || self.is_here(pack(0)..=pack(u32::MAX));
        (!is_known).then(|| self.read_parts(first, MOST_BYTES, GUESSED_PART_BYTES))
    }

    /// Whether frames of one of these objects are on this node; then most of them are.
    fn is_here(&self, objects: RangeInclusive<ObjectId>) -> bool {
        self.is_local() || self.0.disk.as_ref().is_some_and(|disk| disk.has_some_of(objects))
    }

    fn read_parts(&self, object: ObjectId, end: u64, part_bytes: u64) -> Ahead {
        let mut ahead = Ahead { part_bytes, end, parts: Vec::new(), _tasks: JoinSet::new() };
        for number in 0..end.div_ceil(part_bytes) {
            let part = self.clone().read_part(object, ahead.range_of(number)).boxed().shared();
            // Each goes on by itself, whoever waits for it.
            let going_on = part.clone().map(drop);
            ahead._tasks.spawn_on(going_on, &self.0.runtime);
            ahead.parts.push(part);
        }
        ahead
    }

    /// Tried once: who wants these bytes and does not get them asks for them as for any others.
    async fn read_part(self, object: ObjectId, range: Range<u64>) -> Option<Bytes> {
        let (key, objects) = (object.key(), &self.0.objects);
        let read = match range.start {
            // The header is in it: a record that is waited for, not a prefetch.
            0 => objects.get_range(&key, range).await,
            _ => {
                let _pass = objects.prefetch_pass().await;
                objects.try_range(&key, range, Urgency::Prefetch).await
            }
        };
        self.count_store_read(read.as_ref().map_or(0, |bytes| bytes.len() as u64));
        read.inspect_err(|error| tracing::debug!("not read ahead: {error}")).ok()
    }
}
