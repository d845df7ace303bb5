//! Reading a range of a file, and finding its data and holes; without FUSE.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use reap_store::{Error, Frame, FrameIndex, PAGE_SIZE, Snapshot, Source, Urgency};

const PAGE: u64 = PAGE_SIZE as u64;

/// Reads `length` bytes at `offset`, fewer at the end of the file, and hands them to `done`: on
/// this thread if all frames are in memory, else on a decode thread. Never waits. Zeros cost
/// nothing; bytes that cannot be had are an error, never zeros.
pub(crate) fn read(
    snapshot: &Arc<Snapshot>,
    file: usize,
    offset: u64,
    length: u32,
    done: impl FnOnce(Result<&[u8], Error>) + Send + 'static,
) {
    let size = snapshot.files()[file].size;
    let end = size.min(offset.saturating_add(u64::from(length)));
    if offset >= end {
        done(Ok(&[]));
        return;
    }
    let span = Span { snapshot: snapshot.clone(), file, offset, end };
    let pages = span.pages();
    snapshot.note_read(file, pages.clone());
    let frames = snapshot.frames_of(file, pages.clone());
    let cached: Option<HashMap<FrameIndex, Frame>> =
        frames.iter().map(|frame| Some((*frame, snapshot.cached(*frame)?))).collect();
    if let Some(cached) = cached {
        done(Ok(&span.assemble(&cached)));
        return;
    }
    let missing = AtomicUsize::new(frames.len());
    let state = Mutex::new((HashMap::new(), Some(done)));
    snapshot.fetch(&frames, Urgency::Demand, move |index, frame| {
        let mut locked = state.lock();
        let (arrived, done) = &mut *locked;
        match frame {
            Ok(frame) => {
                arrived.insert(index, frame);
            }
            Err(error) => {
                if let Some(done) = done.take() {
                    drop(locked);
                    done(Err(error));
                }
                return;
            }
        }
        if missing.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(done) = done.take()
        {
            let arrived = std::mem::take(arrived);
            drop(locked);
            done(Ok(&span.assemble(&arrived)));
        }
    });
}

/// A range of a file that is not empty.
struct Span {
    snapshot: Arc<Snapshot>,
    file: usize,
    offset: u64,
    end: u64,
}

impl Span {
    fn pages(&self) -> Range<u64> {
        self.offset / PAGE..self.end.div_ceil(PAGE)
    }

    /// The bytes, from frames that are all there.
    fn assemble(&self, frames: &HashMap<FrameIndex, Frame>) -> Vec<u8> {
        let length = usize::try_from(self.end - self.offset).expect("a read is at most 4 GiB");
        let mut bytes = vec![0; length];
        for (first, extent) in self.snapshot.extents(self.file, self.pages()) {
            let Source::Frame { frame, position } = extent.source else { continue };
            let count = u32::try_from(extent.pages).expect("a frame has few pages");
            let found = frames[&frame].pages(position, count);
            // The part of these pages that was asked for.
            let from = self.offset.max(first * PAGE);
            let to = self.end.min((first + extent.pages) * PAGE);
            let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
            bytes[at(from - self.offset)..at(to - self.offset)]
                .copy_from_slice(&found[at(from - first * PAGE)..at(to - first * PAGE)]);
        }
        bytes
    }
}

/// What `lseek` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seek {
    Data,
    Hole,
}

/// The next offset at or after `offset` that is data, or a hole; `None` stands for `ENXIO`. The
/// end of a file is a hole.
pub(crate) fn seek(snapshot: &Snapshot, file: usize, offset: u64, what: Seek) -> Option<u64> {
    let size = snapshot.files()[file].size;
    if offset >= size {
        return None;
    }
    let wanted = |source| (source == Source::Zero) == (what == Seek::Hole);
    let mut extents = snapshot.extents(file, offset / PAGE..size.div_ceil(PAGE));
    if let Some((page, _)) = extents.find(|(_, extent)| wanted(extent.source)) {
        return Some((page * PAGE).max(offset));
    }
    match what {
        Seek::Data => None,
        Seek::Hole => Some(size),
    }
}
