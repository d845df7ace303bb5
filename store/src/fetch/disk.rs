//! The disk cache: stored bytes of frames of a remote store, in a few large append-only segments.
//!
//! It is disposable: nothing is synced, and whatever comes out is verified like bytes from the
//! network, so a torn or stale segment costs a fetch and nothing else. Inserts go through one
//! writer thread and are dropped when it falls behind. When the cache is full the oldest segment
//! that was not used lately goes as a whole, so that eviction costs one unlink; pinned frames in it are
//! written once more before. `docs/decisions/0004-node-cache.md` says why it is what it is.

pub(crate) mod incoming;
mod index;
mod queue;
mod segment;
mod writer;

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{FrameKey, FrameSpec, ObjectId, pieces};
use crate::Error;
use index::{Index, Key, Place};
use queue::Queue;
use segment::SegmentWriter;
use writer::Writer;

/// Stored bytes that wait for the writer: a second of a fast disk.
const QUEUE_BYTES: u64 = 64 << 20;
/// Frames that lie together are read together, up to so many bytes: more would keep the decode threads from
/// sharing the work.
const LONGEST_READ_BYTES: u32 = 256 << 10;
/// And across so many bytes that nobody wants: they cost less than one more read.
const LARGEST_GAP_BYTES: u32 = 16 << 10;

/// There is at most one frame for so many bytes of the cache, which bounds its index in memory.
const BYTES_FOR_A_FRAME: u64 = 4096;
/// The cache's directory in a node's.
const FRAMES: &str = "frames";

/// How large the cache may be.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Limits {
    /// Most bytes of all segments.
    pub(crate) bytes: u64,
    /// Bytes that must stay free on the file system.
    pub(crate) free_floor: u64,
}

/// What the disk cache of a node holds and has done.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct CacheStatus {
    /// Most bytes of its files.
    pub limit_bytes: u64,
    /// Bytes that it leaves free on its file system.
    pub free_floor_bytes: u64,
    /// Bytes of its files now, with what packers left for it.
    pub used_bytes: u64,
    /// Of these, stored bytes of pinned frames.
    pub pinned_bytes: u64,
    /// The others.
    pub evictable_bytes: u64,
    /// Stored bytes of pinned frames that are not in the cache (yet).
    pub missing_pinned_bytes: u64,
    /// Most bytes that may be pinned.
    pub pin_limit_bytes: u64,
    /// Frames that it holds.
    pub frames: u64,
    /// Files that hold them.
    pub segments: u64,
    /// Frames that were not kept: the writer was behind, or there was no room.
    pub dropped_frames: u64,
    /// Segments that had to go.
    pub evicted_segments: u64,
}

/// The cache. Dropping it ends the writer after what it has queued.
pub(crate) struct DiskCache {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
    /// Held for its lock: two evictors on one directory would take away each other's segments.
    _lock: File,
}

struct Shared {
    directory: PathBuf,
    limits: Limits,
    held: Mutex<Held>,
    queue: Queue,
    /// Of packs that packers left and that are not taken over yet.
    incoming_bytes: AtomicU64,
    dropped_frames: AtomicU64,
    evicted_segments: AtomicU64,
}

/// What is there, and the files to read it from.
#[derive(Default)]
struct Held {
    index: Index,
    files: HashMap<u32, Arc<File>>,
    /// Number of the next segment.
    next: u32,
}

/// Frames that are pinned in the cache: eviction passes them over until this is dropped.
pub(crate) struct PinnedFrames {
    shared: Arc<Shared>,
    keys: Vec<Key>,
}

impl Drop for PinnedFrames {
    fn drop(&mut self) {
        self.shared.held.lock().index.unpin(&self.keys);
    }
}

impl DiskCache {
    /// Opens the cache of the node whose directory is `cache_dir`, made if need be, and takes up what an
    /// earlier process left.
    pub(crate) fn open(cache_dir: &Path, limits: Limits) -> Result<Self, Error> {
        let directory = &cache_dir.join(FRAMES);
        let local = |error| Error::local(directory.display(), error);
        std::fs::create_dir_all(directory).map_err(local)?;
        let lock = File::create(directory.join("lock")).map_err(local)?;
        lock_for_one(&lock, directory)?;
        if let Err(error) = incoming::prepare(directory, limits) {
            // A full disk must not keep a node from serving.
            tracing::warn!("{}: packers cannot leave packs here: {error}", directory.display());
        }
        let shared = Arc::new(Shared {
            directory: directory.to_owned(),
            limits,
            held: Mutex::default(),
            queue: Queue::new(QUEUE_BYTES),
            incoming_bytes: AtomicU64::new(0),
            dropped_frames: AtomicU64::new(0),
            evicted_segments: AtomicU64::new(0),
        });
        let open = shared.take_up().map_err(local)?;
        let writer = Writer::new(shared.clone(), open);
        let thread = std::thread::Builder::new().name("cache-writer".into());
        let writer = thread.spawn(move || writer.run()).map_err(local)?;
        Ok(Self { shared, writer: Some(writer), _lock: lock })
    }

    /// What it holds and has done.
    pub(crate) fn status(&self) -> CacheStatus {
        let shared = &self.shared;
        let held = shared.held.lock();
        let incoming = shared.incoming_bytes.load(Ordering::Relaxed);
        let (used, pinned) = (held.index.bytes() + incoming, held.index.pinned_bytes());
        CacheStatus {
            limit_bytes: shared.limits.bytes,
            free_floor_bytes: shared.limits.free_floor,
            used_bytes: used,
            pinned_bytes: pinned,
            evictable_bytes: used.saturating_sub(pinned),
            missing_pinned_bytes: held.index.promised_bytes().saturating_sub(pinned),
            pin_limit_bytes: shared.pin_limit(),
            frames: held.index.frame_count() as u64,
            segments: held.index.segment_count() as u64,
            dropped_frames: shared.dropped_frames.load(Ordering::Relaxed),
            evicted_segments: shared.evicted_segments.load(Ordering::Relaxed),
        }
    }

    /// Which of `frames` are here, in groups that one read brings, and which are not.
    pub(crate) fn plan(&self, frames: Vec<FrameSpec>) -> (Vec<Vec<FrameSpec>>, Vec<FrameSpec>) {
        let (mut here, mut missing) = (Vec::new(), Vec::new());
        let held = self.shared.held.lock();
        for spec in frames {
            match held.index.find(&spec.key()) {
                Some(place) => here.push((place, spec)),
                None => missing.push(spec),
            }
        }
        drop(held);
        here.sort_unstable_by_key(|(place, _)| *place);
        let places: Vec<_> = here.iter().map(|(place, _)| Some(*place)).collect();
        let specs = |group: Range<usize>| here[group].iter().map(|(_, spec)| *spec).collect();
        (groups(&places).into_iter().map(specs).collect(), missing)
    }

    /// The stored bytes of frames, not verified; `None` for those that are not here (any more). Reads
    /// the disk, once where they lie together.
    pub(crate) fn read(&self, frames: &[FrameSpec]) -> Vec<Option<Bytes>> {
        let found = self.shared.held.lock().open(frames);
        let places: Vec<_> = found.iter().map(|found| found.as_ref().map(|at| at.0)).collect();
        let read = groups(&places).into_iter().flat_map(|group| read_group(&found[group]));
        let read: Vec<_> = read.collect();
        // What the file does not have is forgotten, so that it is written again when it comes.
        let lost = frames.iter().zip(&read).zip(&found);
        for ((spec, _), _) in lost.filter(|((_, read), found)| read.is_none() && found.is_some()) {
            self.remove(&spec.key());
        }
        read
    }

    /// Keeps the stored bytes of a frame, unless the writer is behind. Never waits.
    pub(crate) fn insert(&self, key: FrameKey, stored: Bytes) {
        if !self.shared.queue.push(key, stored) {
            self.shared.dropped_frames.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether a frame was inserted and is not written yet.
    pub(crate) fn is_coming(&self, key: &FrameKey) -> bool {
        self.shared.queue.holds(key)
    }

    /// Whether any frame of an object is here, or pinned.
    pub(crate) fn has_some_of(&self, objects: RangeInclusive<ObjectId>) -> bool {
        self.shared.held.lock().index.has_some_of(objects)
    }

    /// Forgets a frame.
    pub(crate) fn remove(&self, key: &FrameKey) {
        self.shared.held.lock().index.remove(key);
    }

    /// Pins frames, here or not, until the answer is dropped. Refused where all pins would come to more
    /// than the cache can promise.
    pub(crate) fn pin(
        &self,
        what: &str,
        frames: impl IntoIterator<Item = FrameSpec>,
    ) -> Result<PinnedFrames, Error> {
        let limit = self.shared.pin_limit();
        let frames = frames.into_iter().map(|spec| (spec.key(), spec.entry.stored_bytes));
        let pinned = self.shared.held.lock().index.pin(frames, limit);
        match pinned {
            Ok(keys) => Ok(PinnedFrames { shared: self.shared.clone(), keys }),
            Err(bytes) => {
                let text = format!(
                    "all that is pinned in the cache would be {bytes} bytes, and half of the cache, {limit} bytes, is the most: release another snapshot or make the cache larger"
                );
                Err(Error::refused(what, text))
            }
        }
    }

    /// Waits until all that was inserted before is written, or dropped.
    pub(crate) fn wait(&self) {
        self.shared.queue.wait();
    }
}

impl Drop for DiskCache {
    fn drop(&mut self) {
        self.shared.queue.close();
        if let Some(writer) = self.writer.take() {
            writer.join().unwrap_or_default();
        }
    }
}

impl Held {
    fn add(&mut self, number: u32, file: Arc<File>) {
        self.index.add_segment(number);
        self.files.insert(number, file);
        self.next = number + 1;
    }

    /// Where to read frames. One of another length than it has in its object is damage, and forgotten.
    fn open(&mut self, frames: &[FrameSpec]) -> Vec<Option<(Place, Arc<File>)>> {
        let find = |spec: &FrameSpec| {
            let place = self.index.find_to_read(&spec.key())?;
            if place.length != spec.entry.stored_bytes {
                self.index.remove(&spec.key());
                return None;
            }
            Some((place, self.files.get(&place.segment)?.clone()))
        };
        frames.iter().map(find).collect()
    }

    /// Takes a segment off, unless something in it is pinned; answers with the names to forget.
    fn remove(&mut self, number: u32) -> Option<Vec<Key>> {
        let keys = self.index.take(number)?;
        self.files.remove(&number);
        Some(keys)
    }
}

impl Shared {
    /// What an earlier process left; answers with the segment to go on with.
    fn take_up(&self) -> std::io::Result<Option<SegmentWriter>> {
        let mut held = self.held.lock();
        let numbers = segment::numbers(&self.directory)?;
        for number in &numbers {
            held.next = number + 1;
            match segment::load(&self.directory, *number) {
                Ok((file, listed, bytes)) if !listed.is_empty() => {
                    held.add(*number, file);
                    held.index.grow(*number, bytes);
                    held.index.reserve(listed.len());
                    for (key, place) in listed {
                        held.index.insert(&key, place);
                    }
                }
                Ok(_) => segment::remove(&self.directory, *number),
                Err(error) => {
                    tracing::warn!("cache segment {number} is dropped: {error}");
                    segment::remove(&self.directory, *number);
                }
            }
        }
        // Else every start would leave one more short segment.
        let last = numbers.last().and_then(|last| Some((*last, held.files.get(last)?.clone())));
        let Some((number, file)) = last else { return Ok(None) };
        let open = SegmentWriter::go_on(&self.directory, number, file)?;
        Ok((!self.is_full(&open)).then_some(open))
    }

    /// A small part of the cache, so that one eviction is neither long nor a large loss, and few enough
    /// segments that each can be open.
    fn segment_bytes(&self) -> u64 {
        (self.limits.bytes / 64).clamp(1 << 20, 1 << 30)
    }

    fn is_full(&self, segment: &SegmentWriter) -> bool {
        let bytes = self.segment_bytes();
        segment.bytes() >= bytes || segment.frames() >= bytes / BYTES_FOR_A_FRAME
    }

    /// Half of it: the other half is enough to move pinned frames out of the way in.
    fn pin_limit(&self) -> u64 {
        self.limits.bytes / 2
    }
}

/// Places that one read brings, as ranges of `places`, which are in order where they are in one segment.
fn groups(places: &[Option<Place>]) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    for (at, place) in places.iter().enumerate() {
        let joins = |group: &&mut Range<usize>| {
            let (Some(first), Some(last), Some(next)) =
                (places[group.start], places[group.end - 1], *place)
            else {
                return false;
            };
            // What lies before, or over another, is no neighbour.
            let gap = next.offset.checked_sub(last.end());
            first.segment == next.segment
                && gap.is_some_and(|gap| gap <= LARGEST_GAP_BYTES)
                && next.end() - first.offset <= LONGEST_READ_BYTES
        };
        match groups.last_mut().filter(joins) {
            Some(group) => group.end = at + 1,
            None => groups.push(at..at + 1),
        }
    }
    groups
}

/// One group of [`groups`], read.
fn read_group(found: &[Option<(Place, Arc<File>)>]) -> Vec<Option<Bytes>> {
    let (Some(Some((first, file))), Some(Some((last, _)))) = (found.first(), found.last()) else {
        return vec![None; found.len()];
    };
    let Ok(bytes) = read_at(file, first.offset, last.end() - first.offset) else {
        return vec![None; found.len()];
    };
    let slice = |found: &Option<(Place, Arc<File>)>| {
        let (place, _) = found.as_ref()?;
        let from = (place.offset - first.offset) as usize;
        Some(bytes.slice(from..from + place.length as usize))
    };
    found.iter().map(slice).collect()
}

/// Bytes that are free to us on the file system of `directory`; where it does not say, the bytes of the cache
/// are the only bound.
pub(crate) fn free(directory: &Path) -> u64 {
    rustix::fs::statvfs(directory).map_or(u64::MAX, |at| at.f_bavail.saturating_mul(at.f_frsize))
}

fn read_at(file: &File, offset: u32, length: u32) -> std::io::Result<Bytes> {
    let mut bytes = vec![0; length as usize];
    pieces::read_exact_at(file, &mut bytes, u64::from(offset))?;
    Ok(bytes.into())
}

/// Locks `file`, which says whose `directory` is: one process's, until it ends.
pub(crate) fn lock_for_one(file: &File, directory: &Path) -> Result<(), Error> {
    file.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => Error::refused(
            directory.display(),
            "another process uses this cache directory: give each its own",
        ),
        TryLockError::Error(error) => Error::local(directory.display(), error),
    })
}

#[cfg(test)]
mod tests;
