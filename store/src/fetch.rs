//! Fetching frames: single flight, merging of neighbours, retry, decoding, verification, caching.
//!
//! A frame that is wanted is in one of three places: decoded in memory ([`memory`]), in flight
//! (somebody asked before; wait with them), or it needs a [`ranges::RangeRead`]. Ranges are read
//! by [`read`]: from a local store or the disk cache on the decode threads, from a remote store on
//! the I/O runtime. What arrives is decoded and verified on the decode threads, and every waiter
//! is called there. What is prefetched waits for its share of [`budget`] first ([`prefetch`]).

mod ahead;
mod budget;
pub(crate) mod disk;
mod hedge;
mod memory;
mod pieces;
mod prefetch;
mod ranges;
mod read;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::format::frame::{self, FrameEntry};
use crate::format::keys::{self, PackId};
use crate::objects::Objects;
use crate::workers::Workers;
use crate::{Error, Frame, Hash, SnapshotId, Urgency};
pub(crate) use ahead::Ahead;
pub use disk::CacheStatus;
use disk::DiskCache;
use hedge::Hedging;
use memory::MemoryCache;
pub use prefetch::PrefetchStatus;
use prefetch::Prefetches;
pub(crate) use ranges::LONGEST_STREAMED_BYTES;
use ranges::{RangeRead, Shape};

/// Demand requests in flight to a remote store. A bound, not a target: faults are few.
const DEMAND_REQUESTS: usize = 64;
/// How often bytes that fail verification are asked for: the first time, and once more.
const READS_OF_DAMAGED: u32 = 2;

/// The object that a frame lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum ObjectId {
    /// A pack.
    Pack(PackId),
    /// A working set, by snapshot and sequence.
    WorkingSet(SnapshotId, u64),
}

impl ObjectId {
    /// Its object key.
    pub(crate) fn key(&self) -> String {
        match self {
            Self::Pack(pack) => pack.key(),
            Self::WorkingSet(snapshot, sequence) => keys::working_set(*snapshot, *sequence),
        }
    }
}

/// A frame, where it lies, and what must come out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FrameSpec {
    pub(crate) object: ObjectId,
    pub(crate) entry: FrameEntry,
}

/// What names a frame in caches and flights.
pub(crate) type FrameKey = (ObjectId, u64);

impl FrameSpec {
    pub(crate) fn key(&self) -> FrameKey {
        (self.object, self.entry.offset)
    }
}

/// Called once for each frame asked for, with the tag it was asked under.
pub(crate) type Done = Arc<dyn Fn(usize, Result<Frame, Error>) + Send + Sync>;

/// What the fetch path has done since the process started.
#[derive(Debug, Default, serde::Serialize)]
pub struct FetchCounters {
    /// Requests for ranges, to the store.
    pub store_reads: AtomicU64,
    /// Bytes they brought.
    pub store_bytes: AtomicU64,
    /// Ranges read from the disk cache.
    pub disk_cache_reads: AtomicU64,
    /// Frames found decoded in memory.
    pub memory_hits: AtomicU64,
    /// Frames decoded and verified.
    pub decoded_frames: AtomicU64,
    /// Requests tried again.
    pub retries: AtomicU64,
    /// Demand requests that were late and made a second time (also counted as requests).
    pub hedged_reads: AtomicU64,
    /// Second requests that were answered first.
    pub hedges_won: AtomicU64,
    /// Demand requests that were late, and were not made a second time to spare the store.
    pub hedges_withheld: AtomicU64,
    /// Frames that failed verification.
    pub damaged_frames: AtomicU64,
}

/// The fetch path of one process. Clones share everything.
#[derive(Clone)]
pub(crate) struct Fetcher(Arc<Shared>);

struct Shared {
    objects: Objects,
    runtime: tokio::runtime::Handle,
    workers: Workers,
    disk: Option<DiskCache>,
    memory: Mutex<MemoryCache>,
    flights: Mutex<HashMap<FrameKey, Flight>>,
    prefetches: Mutex<Prefetches>,
    open_packs: Mutex<lru::LruCache<ObjectId, Arc<std::fs::File>>>,
    demand_permits: Semaphore,
    hedging: Mutex<Hedging>,
    next_read: AtomicU64,
    counters: FetchCounters,
}

/// A frame that is on its way.
struct Flight {
    /// The read that will bring it.
    read: u64,
    /// That read has begun: too late for another to take the frame over.
    begun: bool,
    urgency: Urgency,
    waiters: Vec<(usize, Done)>,
}

impl Fetcher {
    pub(crate) fn new(
        objects: Objects,
        runtime: tokio::runtime::Handle,
        workers: Workers,
        disk: Option<DiskCache>,
        memory_bytes: u64,
        prefetch_bytes: u64,
    ) -> Self {
        let open_packs = std::num::NonZeroUsize::new(256).expect("not zero");
        Self(Arc::new(Shared {
            objects,
            runtime,
            workers,
            disk,
            memory: Mutex::new(MemoryCache::new(memory_bytes)),
            flights: Mutex::default(),
            prefetches: Mutex::new(Prefetches::new(prefetch_bytes)),
            open_packs: Mutex::new(lru::LruCache::new(open_packs)),
            demand_permits: Semaphore::new(DEMAND_REQUESTS),
            hedging: Mutex::new(Hedging::new()),
            next_read: AtomicU64::new(0),
            counters: FetchCounters::default(),
        }))
    }

    /// Runs `task` to its end on this thread, which must not belong to a runtime.
    pub(crate) fn block_on<T>(&self, task: impl Future<Output = T>) -> T {
        self.0.runtime.block_on(task)
    }

    pub(crate) fn counters(&self) -> &FetchCounters {
        &self.0.counters
    }

    /// Bytes of decoded frames in memory now.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.0.memory.lock().bytes()
    }

    /// Most bytes of decoded frames in memory.
    pub(crate) fn most_memory_bytes(&self) -> u64 {
        self.0.memory.lock().limit()
    }

    /// Whether the store is on this machine.
    pub(crate) fn is_local(&self) -> bool {
        self.0.objects.local_root().is_some()
    }

    /// The disk cache, if there is one.
    pub(crate) fn disk(&self) -> Option<&DiskCache> {
        self.0.disk.as_ref()
    }

    /// The frame, if it is decoded in memory.
    pub(crate) fn cached(&self, key: &FrameKey) -> Option<Frame> {
        let frame = self.0.memory.lock().get(key)?;
        self.0.counters.memory_hits.fetch_add(1, Ordering::Relaxed);
        Some(frame)
    }

    /// Keeps the decoded bytes of a pack's frame in memory, if they match its hash; whether they do.
    pub(crate) fn keep(&self, spec: &FrameSpec, decoded: &[u8]) -> bool {
        if self.0.memory.lock().get(&spec.key()).is_some() {
            return true;
        }
        let matches = Hash::of(decoded) == spec.entry.hash;
        if matches {
            let frame = Frame::new(decoded.to_vec());
            let evicted = self.0.memory.lock().insert(spec.key(), frame);
            drop(evicted);
        }
        matches
    }

    /// See [`crate::Snapshot::fetch`]; `wanted` are frames and their tags.
    pub(crate) fn fetch(
        &self,
        wanted: impl IntoIterator<Item = (FrameSpec, usize)>,
        urgency: Urgency,
        done: &Done,
    ) {
        self.fetch_as(wanted, urgency, Shape::Near, done);
    }

    /// The same for the frames of a working set, in their order. A local disk is read a frame at a time by
    /// the thread that decodes it: nothing is gained there by few requests, and bytes that wait for
    /// another thread to decode them are bytes that wait.
    pub(crate) fn fetch_working_set(
        &self,
        wanted: impl IntoIterator<Item = (FrameSpec, usize)>,
        urgency: Urgency,
        done: &Done,
    ) {
        let shape = if self.is_local() { Shape::Alone } else { Shape::Spread };
        self.fetch_as(wanted, urgency, shape, done);
    }

    /// Demand at once, the rest within its budget.
    fn fetch_as(
        &self,
        wanted: impl IntoIterator<Item = (FrameSpec, usize)>,
        urgency: Urgency,
        shape: Shape,
        done: &Done,
    ) {
        match urgency {
            Urgency::Demand => self.fetch_shaped(wanted, urgency, shape, None, done),
            Urgency::Prefetch => self.prefetch(wanted.into_iter().collect(), shape, done),
        }
    }

    /// In as few requests as possible: for reading much, where no frame is waited for. The caller bounds what
    /// it asks for at once.
    pub(crate) fn stream(&self, wanted: impl IntoIterator<Item = (FrameSpec, usize)>, done: &Done) {
        self.fetch_shaped(wanted, Urgency::Prefetch, Shape::Long, None, done);
    }

    /// As [`Self::fetch`] ahead of need, for the sake of the disk cache: also what is decoded in memory already.
    /// `soon`: somebody may wait for it before it is all there.
    pub(crate) fn fill(
        &self,
        wanted: impl IntoIterator<Item = (FrameSpec, usize)>,
        soon: bool,
        done: &Done,
    ) {
        let shape = if soon { Shape::SpreadToDisk } else { Shape::LongToDisk };
        self.fetch_as(wanted, Urgency::Prefetch, shape, done);
    }

    /// Decodes those of `wanted` that are read ahead, as they come; whoever wants one from now on joins.
    pub(crate) fn decode_ahead(&self, wanted: impl Iterator<Item = FrameSpec>, ahead: &Arc<Ahead>) {
        let held = wanted.filter(|spec| ahead.holds(&(spec.entry.offset..spec.entry.end())));
        let held = held.map(|spec| (spec, 0));
        let nobody: Done = Arc::new(|_, _| {});
        self.fetch_shaped(held, Urgency::Prefetch, Shape::Spread, Some(ahead), &nobody);
    }

    fn fetch_shaped(
        &self,
        wanted: impl IntoIterator<Item = (FrameSpec, usize)>,
        urgency: Urgency,
        shape: Shape,
        ahead: Option<&Arc<Ahead>>,
        done: &Done,
    ) {
        let mut here = Vec::new();
        let mut missing = Vec::new();
        let mut flights = self.0.flights.lock();
        for (spec, tag) in wanted {
            // Looked up under the flights' lock: `complete` fills memory before it ends a flight,
            // so a frame is always found in one of the two. For the disk that counts only if it is
            // on its way there.
            let counts = !shape.is_to_disk() || self.is_coming_to_disk(&spec.key());
            if counts && let Some(frame) = self.cached(&spec.key()) {
                here.push((tag, frame));
                continue;
            }
            let waiter = (tag, done.clone());
            match flights.get_mut(&spec.key()) {
                Some(flight) => {
                    flight.waiters.push(waiter);
                    // Demand for a frame that waits in a prefetch queue gets a read of its own.
                    if urgency == Urgency::Demand && flight.urgency == Urgency::Prefetch {
                        flight.urgency = Urgency::Demand;
                        if !flight.begun {
                            missing.push(spec);
                        }
                    }
                }
                None => {
                    let flight = Flight { read: 0, begun: false, urgency, waiters: vec![waiter] };
                    flights.insert(spec.key(), flight);
                    missing.push(spec);
                }
            }
        }
        let reads = self.plan(missing, urgency, shape, ahead, &mut flights);
        drop(flights);
        self.begin(reads);
        let jobs = here.into_iter().map(|(tag, frame)| {
            let done = done.clone();
            move || done(tag, Ok(frame))
        });
        match urgency {
            Urgency::Demand => jobs.for_each(|job| job()),
            // A thread that only asks is not to install as well, and several threads share the work.
            Urgency::Prefetch => self.0.workers.submit_all(urgency, jobs),
        }
    }

    fn is_coming_to_disk(&self, key: &FrameKey) -> bool {
        self.0.disk.as_ref().is_some_and(|disk| disk.is_coming(key))
    }

    /// Merges frames into reads, which own their frames' flights from here on.
    fn plan(
        &self,
        missing: Vec<FrameSpec>,
        urgency: Urgency,
        shape: Shape,
        ahead: Option<&Arc<Ahead>>,
        flights: &mut HashMap<FrameKey, Flight>,
    ) -> Vec<RangeRead> {
        let (on_disk, in_store) = match &self.0.disk {
            Some(disk) => disk.plan(missing),
            None => (Vec::new(), missing),
        };
        let in_store = ranges::merge(in_store, shape);
        let mut reads = Vec::new();
        for (groups, from_cache) in [(on_disk, true), (in_store, false)] {
            for group in groups {
                let number = self.0.next_read.fetch_add(1, Ordering::Relaxed) + 1;
                let ahead = ahead.filter(|_| !from_cache).cloned();
                for spec in &group {
                    if let Some(flight) = flights.get_mut(&spec.key()) {
                        flight.read = number;
                        // What is read ahead is on its way already.
                        flight.begun = ahead.is_some();
                    }
                }
                let since = Instant::now();
                reads.push(RangeRead {
                    number,
                    urgency,
                    frames: group,
                    from_cache,
                    ahead,
                    tries: 0,
                    since,
                });
            }
        }
        reads
    }

    /// Decodes and verifies one frame's stored bytes, and tells its waiters. Damage is fetched once
    /// more, past the cache.
    fn finish(&self, spec: &FrameSpec, stored: &Bytes, read: &RangeRead) {
        let frames = std::slice::from_ref(spec);
        let _abandoned = Abandoned { fetcher: self, frames, doing: "decoding" };
        let buffer = |bytes| self.0.workers.spares().take(bytes);
        match frame::decode_into(&spec.entry, stored, buffer) {
            Ok(decoded) => {
                self.0.counters.decoded_frames.fetch_add(1, Ordering::Relaxed);
                if !read.from_cache
                    && let Some(disk) = &self.0.disk
                {
                    disk.insert(spec.key(), stored.clone());
                }
                self.complete(&spec.key(), &Ok(Frame::new(decoded)));
            }
            Err(why) => {
                self.0.counters.damaged_frames.fetch_add(1, Ordering::Relaxed);
                let object = format!("{} at {}", spec.object.key(), spec.entry.offset);
                tracing::warn!("{object}: {why}, in bytes from {}", read.source());
                if read.from_cache
                    && let Some(disk) = &self.0.disk
                {
                    disk.remove(&spec.key());
                }
                if read.from_cache || read.tries + 1 < READS_OF_DAMAGED {
                    self.begin(vec![read.again(vec![*spec])]);
                } else {
                    self.complete(&spec.key(), &Err(Error::damaged(object, why)));
                }
            }
        }
    }

    /// Ends a flight: into memory first, then off the table, then the waiters.
    fn complete(&self, key: &FrameKey, result: &Result<Frame, Error>) {
        if let Ok(frame) = result {
            let evicted = self.0.memory.lock().insert(*key, frame.clone());
            drop(evicted);
        }
        let flight = self.0.flights.lock().remove(key);
        for (tag, done) in flight.map(|flight| flight.waiters).unwrap_or_default() {
            done(tag, result.clone());
        }
    }
}

/// Ends flights with an error if what is done for them panics: nobody may wait for ever.
struct Abandoned<'a> {
    fetcher: &'a Fetcher,
    frames: &'a [FrameSpec],
    /// What is done.
    doing: &'static str,
}

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        // Whoever is done in peace has ended them, and a task that is dropped with its runtime has nobody to tell.
        if !std::thread::panicking() {
            return;
        }
        for spec in self.frames {
            let text = format!("{} a frame panicked; this is a bug", self.doing);
            self.fetcher.complete(&spec.key(), &Err(Error::local(spec.object.key(), text)));
        }
    }
}

#[cfg(test)]
mod tests;
