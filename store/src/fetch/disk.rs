//! The disk cache: stored bytes of frames of a remote store, in a few large append-only segments.
//!
//! It is disposable: nothing is synced, and whatever comes out is verified like bytes from the
//! network, so a torn or stale segment costs a fetch and nothing else. Inserts go through one
//! writer thread and are dropped when it falls behind. When the cache is full the oldest segment
//! that was not used lately goes as a whole, so that eviction costs one unlink.

mod segment;

use std::collections::{HashMap, VecDeque};
use std::fs::{File, TryLockError};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use bytes::Bytes;
use parking_lot::Mutex;

use super::FrameKey;
use crate::Error;
use segment::{Record, SegmentWriter};

/// Frames that wait for the writer. Small, because a dropped insert is only a later fetch.
const WRITER_QUEUE: usize = 256;

/// How large the cache may be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Most bytes of all segments.
    pub(crate) bytes: u64,
    /// Bytes that must stay free on the file system.
    pub(crate) free_floor: u64,
}

/// The cache. Dropping it ends the writer after what it has queued.
pub(crate) struct DiskCache {
    shared: Arc<Shared>,
    sender: Option<SyncSender<(FrameKey, Bytes)>>,
    writer: Option<JoinHandle<()>>,
    /// Held for its lock: two evictors on one directory would take away each other's segments.
    _lock: File,
}

struct Shared {
    directory: PathBuf,
    limits: Limits,
    index: Mutex<Index>,
    dropped_inserts: AtomicU64,
}

#[derive(Default)]
struct Index {
    frames: HashMap<FrameKey, Place>,
    /// Oldest first; the last is being written.
    segments: VecDeque<Arc<Segment>>,
    bytes: u64,
}

#[derive(Clone)]
struct Place {
    segment: Arc<Segment>,
    offset: u32,
    length: u32,
}

struct Segment {
    number: u64,
    file: File,
    bytes: AtomicU64,
    used: AtomicBool,
}

impl DiskCache {
    /// Opens the cache in `directory`, made if need be, and takes up what an earlier process left.
    pub(crate) fn open(directory: &Path, limits: Limits) -> Result<Self, Error> {
        let local = |error| Error::local(directory.display(), error);
        std::fs::create_dir_all(directory).map_err(local)?;
        let lock = File::create(directory.join("lock")).map_err(local)?;
        lock_for_one(&lock, directory)?;
        let mut index = Index::default();
        for number in segment::numbers(directory).map_err(local)? {
            match segment::load(directory, number) {
                Ok((file, records)) => index.take_up(number, file, &records),
                Err(error) => {
                    tracing::warn!("cache segment {number} is dropped: {error}");
                    segment::remove(directory, number);
                }
            }
        }
        let shared = Arc::new(Shared {
            directory: directory.to_owned(),
            limits,
            index: Mutex::new(index),
            dropped_inserts: AtomicU64::new(0),
        });
        shared.evict(0);
        let (sender, receiver) = sync_channel(WRITER_QUEUE);
        let for_writer = shared.clone();
        let writer = std::thread::Builder::new()
            .name("cache-writer".into())
            .spawn(move || for_writer.write(&receiver))
            .map_err(local)?;
        Ok(Self { shared, sender: Some(sender), writer: Some(writer), _lock: lock })
    }

    /// Bytes of all segments.
    pub(crate) fn bytes(&self) -> u64 {
        self.shared.index.lock().bytes
    }

    pub(crate) fn contains(&self, key: &FrameKey) -> bool {
        self.shared.index.lock().frames.contains_key(key)
    }

    /// The stored bytes of a frame, not verified. Reads the disk.
    pub(crate) fn get(&self, key: &FrameKey) -> Option<Bytes> {
        let place = self.shared.index.lock().frames.get(key).cloned()?;
        place.segment.used.store(true, Ordering::Relaxed);
        let mut bytes = vec![0; place.length as usize];
        place.segment.file.read_exact_at(&mut bytes, u64::from(place.offset)).ok()?;
        Some(bytes.into())
    }

    /// Keeps the stored bytes of a frame, unless the writer is behind. Never waits.
    pub(crate) fn insert(&self, key: FrameKey, stored: Bytes) {
        let sent =
            self.sender.as_ref().is_some_and(|sender| sender.try_send((key, stored)).is_ok());
        if !sent {
            self.shared.dropped_inserts.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Forgets a frame.
    pub(crate) fn remove(&self, key: &FrameKey) {
        self.shared.index.lock().frames.remove(key);
    }
}

impl Drop for DiskCache {
    fn drop(&mut self) {
        drop(self.sender.take());
        if let Some(writer) = self.writer.take() {
            writer.join().unwrap_or_default();
        }
    }
}

impl Index {
    fn take_up(&mut self, number: u64, file: File, records: &[Record]) {
        let end = records.last().map_or(0, |last| u64::from(last.offset) + u64::from(last.length));
        let segment = Arc::new(Segment {
            number,
            file,
            bytes: AtomicU64::new(end),
            used: AtomicBool::new(false),
        });
        for record in records {
            let Record { key, offset, length } = *record;
            self.frames.insert(key, Place { segment: segment.clone(), offset, length });
        }
        self.bytes += end;
        self.segments.push_back(segment);
    }
}

impl Shared {
    fn write(&self, receiver: &Receiver<(FrameKey, Bytes)>) {
        let mut current: Option<(SegmentWriter, Arc<Segment>)> = None;
        while let Ok((key, stored)) = receiver.recv() {
            if let Err(error) = self.append(&mut current, key, &stored) {
                // A full or broken cache disk must not stop serving; the frame is not cached.
                tracing::warn!("{}: not cached: {error}", self.directory.display());
                current = None;
                self.evict(stored.len() as u64);
            }
        }
        if let Some((writer, _)) = current {
            writer.seal();
        }
    }

    fn append(
        &self,
        current: &mut Option<(SegmentWriter, Arc<Segment>)>,
        key: FrameKey,
        stored: &Bytes,
    ) -> std::io::Result<()> {
        if self.index.lock().frames.contains_key(&key) {
            return Ok(());
        }
        let full = |writer: &SegmentWriter| writer.bytes() >= self.segment_bytes();
        if let Some((writer, _)) = current.take_if(|(writer, _)| full(writer)) {
            writer.seal();
        }
        self.evict(stored.len() as u64 + segment::RECORD_BYTES);
        let (writer, segment) = match current {
            Some(open) => open,
            None => current.insert(self.new_segment()?),
        };
        let offset = writer.append(key, stored)?;
        let length = u32::try_from(stored.len()).map_err(std::io::Error::other)?;
        let mut index = self.index.lock();
        index.bytes += writer.bytes() - segment.bytes.swap(writer.bytes(), Ordering::Relaxed);
        index.frames.insert(key, Place { segment: segment.clone(), offset, length });
        Ok(())
    }

    fn new_segment(&self) -> std::io::Result<(SegmentWriter, Arc<Segment>)> {
        let mut index = self.index.lock();
        let number = index.segments.back().map_or(0, |last| last.number + 1);
        let (writer, file) = SegmentWriter::create(&self.directory, number)?;
        let (bytes, used) = (AtomicU64::new(0), AtomicBool::new(false));
        let segment = Arc::new(Segment { number, file, bytes, used });
        index.segments.push_back(segment.clone());
        Ok((writer, segment))
    }

    /// A sixteenth of the cache, so that one eviction is neither long nor a large part of it.
    fn segment_bytes(&self) -> u64 {
        (self.limits.bytes / 16).clamp(1 << 20, 256 << 20)
    }

    /// Makes room for `wanted` bytes. Segments used since they were last looked at get another turn.
    fn evict(&self, wanted: u64) {
        let mut index = self.index.lock();
        let mut turns = index.segments.len() * 2;
        while turns > 0 && index.segments.len() > 1 && self.over(index.bytes + wanted) {
            turns -= 1;
            let Some(oldest) = index.segments.pop_front() else {
                return;
            };
            if oldest.used.swap(false, Ordering::Relaxed) && turns > index.segments.len() {
                // Not behind the last, which is being written.
                let last = index.segments.len() - 1;
                index.segments.insert(last, oldest);
                continue;
            }
            index.bytes -= oldest.bytes.load(Ordering::Relaxed);
            index.frames.retain(|_, place| place.segment.number != oldest.number);
            segment::remove(&self.directory, oldest.number);
        }
    }

    fn over(&self, bytes: u64) -> bool {
        let free =
            rustix::fs::statvfs(&self.directory).map_or(u64::MAX, |at| at.f_bavail * at.f_frsize);
        bytes > self.limits.bytes || free < self.limits.free_floor
    }
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
mod tests {
    use super::*;
    use crate::SnapshotId;
    use crate::fetch::ObjectId;

    fn key(offset: u64) -> FrameKey {
        (ObjectId::WorkingSet(SnapshotId::from_bytes([7; 16]), 3), offset)
    }

    fn filled(directory: &Path, limits: Limits, count: u64) {
        let cache = DiskCache::open(directory, limits).expect("opens");
        for number in 0..count {
            let bytes = Bytes::from(vec![number as u8; 10_000]);
            while !cache.contains(&key(number)) {
                cache.insert(key(number), bytes.clone());
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn frames_outlive_the_process_and_a_torn_segment_is_survived() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let limits = Limits { bytes: 64 << 20, free_floor: 0 };
        filled(directory.path(), limits, 50);
        let cache = DiskCache::open(directory.path(), limits).expect("opens");
        assert_eq!(cache.get(&key(7)).expect("is there"), vec![7; 10_000]);
        let refused = DiskCache::open(directory.path(), limits);
        assert!(refused.is_err(), "a second user of one directory is refused");
        drop(cache);
        // As after a crash: no index file, and a record that was not written to its end.
        std::fs::remove_file(directory.path().join("000000000000.idx")).expect("index file");
        let segment = directory.path().join("000000000000.seg");
        let length = std::fs::metadata(&segment).expect("segment").len();
        let file = std::fs::OpenOptions::new().write(true).open(&segment).expect("segment");
        file.set_len(length - 5).expect("truncated");
        let cache = DiskCache::open(directory.path(), limits).expect("opens");
        assert_eq!(cache.get(&key(7)).expect("is there"), vec![7; 10_000]);
        assert!(cache.get(&key(49)).is_none(), "the torn record is gone");
    }

    #[test]
    fn the_cache_stays_within_its_bytes() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let limits = Limits { bytes: 4 << 20, free_floor: 0 };
        filled(directory.path(), limits, 1000);
        let bytes: u64 = std::fs::read_dir(directory.path())
            .expect("directory")
            .map(|entry| entry.expect("entry").metadata().expect("metadata").len())
            .sum();
        assert!(bytes <= (4 << 20) + (1 << 20), "{bytes} bytes");
        assert!(bytes > 2 << 20, "and makes use of them: {bytes} bytes");
    }
}
