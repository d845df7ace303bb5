//! The one thread that writes to the disk cache and evicts from it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::incoming::{self, LeftPack};
use super::segment::{self, RECORD_BYTES, SegmentWriter};
use super::{BYTES_FOR_A_FRAME, Shared, free, read_at};
use crate::fetch::{FrameKey, ObjectId};

/// How often the cache is looked after when nothing is written: others may fill the disk.
const LOOK_AFTER: Duration = Duration::from_secs(1);
/// How long an answer of the file system to "how much is free?" is used. What was written since counts.
const FREE_IS_KNOWN_FOR: Duration = Duration::from_millis(100);
/// After a failed write nothing is tried for so long.
const AFTER_A_FAILURE: Duration = Duration::from_secs(1);
/// Names that are forgotten under one lock: readers wait for no longer list.
const FORGOTTEN_AT_ONCE: usize = 4096;

pub(super) struct Writer {
    shared: Arc<Shared>,
    open: Option<SegmentWriter>,
    free_bytes: u64,
    free_at: Instant,
    failed_at: Option<Instant>,
}

impl Writer {
    /// `open` is the segment to go on with.
    pub(super) fn new(shared: Arc<Shared>, open: Option<SegmentWriter>) -> Self {
        let free_bytes = free(&shared.directory);
        Self { shared, open, free_bytes, free_at: Instant::now(), failed_at: None }
    }

    /// Until the queue is closed.
    pub(super) fn run(mut self) {
        let mut left = self.look_after();
        let mut looked_after = Instant::now();
        loop {
            // Pack by pack, so that what is fetched meanwhile is not dropped.
            let patience = if left.is_some() { Duration::ZERO } else { LOOK_AFTER };
            let Some(frames) = self.shared.queue.take(patience) else { return };
            for (key, stored) in &frames {
                self.keep_or_drop(key, stored);
            }
            self.list();
            self.shared.queue.done();
            if let Some(pack) = left.take() {
                self.take_over(&pack);
            } else if looked_after.elapsed() < LOOK_AFTER {
                continue;
            }
            left = self.look_after();
            looked_after = Instant::now();
        }
    }

    /// Gives way where others fill the disk; answers with the next pack that a packer left.
    fn look_after(&mut self) -> Option<LeftPack> {
        let (bytes, next) = incoming::look(&self.shared.directory);
        self.shared.incoming_bytes.store(bytes, Ordering::Relaxed);
        self.make_room(0);
        next
    }

    /// Appends the frames of a pack that a packer left. One that is damaged is deleted like any other.
    fn take_over(&mut self, pack: &LeftPack) {
        match pack.open() {
            Ok((file, frames)) => {
                for entry in frames {
                    // A pack that is taken over is shorter than 4 GiB.
                    let offset = u32::try_from(entry.offset).unwrap_or(u32::MAX);
                    if let Ok(stored) = read_at(&file, offset, entry.stored_bytes) {
                        self.keep_or_drop(&(ObjectId::Pack(pack.id), entry.offset), &stored);
                    }
                }
                self.list();
            }
            Err(why) => tracing::warn!("pack {} was left for the cache damaged: {why}", pack.id),
        }
        pack.delete();
    }

    fn keep_or_drop(&mut self, key: &FrameKey, stored: &[u8]) {
        if !self.keep(key, stored) {
            self.shared.dropped_frames.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Writes a frame, if there is room for it or it can be made.
    fn keep(&mut self, key: &FrameKey, stored: &[u8]) -> bool {
        if self.shared.held.lock().index.find(key).is_some() {
            return true;
        }
        if self.failed_at.is_some_and(|at| at.elapsed() < AFTER_A_FAILURE) {
            return false;
        }
        if !self.make_room((stored.len() + RECORD_BYTES) as u64) {
            return false;
        }
        self.append(key, stored).map_err(|error| self.fail(&error)).is_ok()
    }

    fn append(&mut self, key: &FrameKey, stored: &[u8]) -> std::io::Result<()> {
        if self.open.as_ref().is_some_and(|open| self.shared.is_full(open)) {
            self.close();
        }
        let open = match &mut self.open {
            Some(open) => open,
            None => {
                let number = self.shared.held.lock().next;
                let new = SegmentWriter::create(&self.shared.directory, number)?;
                self.shared.held.lock().add(number, new.data().clone());
                self.open.insert(new)
            }
        };
        let place = open.append(key, stored)?;
        let bytes = (stored.len() + RECORD_BYTES) as u64;
        self.free_bytes = self.free_bytes.saturating_sub(bytes);
        let mut held = self.shared.held.lock();
        held.index.grow(place.segment, bytes);
        held.index.insert(key, place);
        Ok(())
    }

    /// Lists what was appended. Where that fails, the next process will not know of it.
    fn list(&mut self) {
        if let Some(open) = &mut self.open
            && let Err(error) = open.list()
        {
            self.fail(&error);
        }
    }

    fn close(&mut self) {
        self.list();
        self.open = None;
    }

    /// A full or broken disk must not stop serving: frames are not cached for a while.
    fn fail(&mut self, error: &std::io::Error) {
        tracing::warn!("{}: frames are not cached: {error}", self.shared.directory.display());
        self.failed_at = Some(Instant::now());
        let Some(mut open) = self.open.take() else { return };
        // Best effort: what is not listed is not found by the next process.
        open.list().unwrap_or_default();
        let number = open.number();
        let mut held = self.shared.held.lock();
        // What was written in part takes space too.
        let written = open.data().metadata().map_or(0, |data| data.len());
        held.index.grow(number, written.saturating_sub(open.bytes()));
        if open.bytes() == 0 && held.remove(number).is_some() {
            drop(held);
            segment::remove(&self.shared.directory, number);
        }
    }

    /// Evicts until there is room for so many more bytes; whether there is.
    fn make_room(&mut self, bytes: u64) -> bool {
        if bytes > self.shared.limits.bytes {
            return false;
        }
        while self.is_over(bytes) {
            if !self.evict_one() {
                return false;
            }
        }
        true
    }

    fn is_over(&mut self, more: u64) -> bool {
        if self.free_at.elapsed() >= FREE_IS_KNOWN_FOR {
            self.look();
        }
        let limits = self.shared.limits;
        let incoming = self.shared.incoming_bytes.load(Ordering::Relaxed);
        let (bytes, frames) = {
            let held = self.shared.held.lock();
            (held.index.bytes() + incoming + more, held.index.frame_count() as u64)
        };
        let most_frames = limits.bytes / BYTES_FOR_A_FRAME;
        bytes > limits.bytes
            || self.free_bytes < limits.free_floor.saturating_add(more)
            || frames + u64::from(more > 0) > most_frames
    }

    fn look(&mut self) {
        self.free_bytes = free(&self.shared.directory);
        self.free_at = Instant::now();
    }

    /// Whether a segment went.
    fn evict_one(&mut self) -> bool {
        let open = self.open.as_ref().map(SegmentWriter::number);
        let mut victim = self.shared.held.lock().index.victim(open);
        if victim.is_none() && self.open.is_some() {
            self.close();
            victim = self.shared.held.lock().index.victim(None);
        }
        let Some(number) = victim else { return false };
        if let Err(error) = self.move_pinned(number) {
            self.fail(&error);
            return false;
        }
        // Somebody may have pinned one more of its frames: it has another turn.
        let Some(keys) = self.shared.held.lock().remove(number) else { return true };
        segment::remove(&self.shared.directory, number);
        for some in keys.chunks(FORGOTTEN_AT_ONCE) {
            self.shared.held.lock().index.forget(some, number);
        }
        self.shared.evicted_segments.fetch_add(1, Ordering::Relaxed);
        self.look();
        true
    }

    /// Pinned frames of a segment that is to go are written once more.
    fn move_pinned(&mut self, number: u32) -> std::io::Result<()> {
        let (frames, file) = {
            let held = self.shared.held.lock();
            (held.index.pinned_in(number), held.files.get(&number).cloned())
        };
        let Some(file) = file else { return Ok(()) };
        for (key, place) in frames {
            match read_at(&file, place.offset, place.length) {
                Ok(stored) => self.append(&key, &stored)?,
                // It is not there any more, whatever the list said.
                Err(_) => self.shared.held.lock().index.remove(&key),
            }
        }
        if let Some(open) = &mut self.open {
            open.list()?;
        }
        Ok(())
    }
}
