//! Reading ahead of whoever reads a file from front to back, in the long requests that a remote store wants.
//!
//! The kernel reads ahead of a file on the mount as well, but a few hundred KiB at a time: a request each, and a round
//! trip each. Whoever is seen to read on is brought two long requests ahead of what they read.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::fetch::LONGEST_STREAMED_BYTES;
use crate::{FrameIndex, PAGE_SIZE, Snapshot, Source};

const PAGE: u64 = PAGE_SIZE as u64;
/// Whoever has read so many pages in order will read on. Two of the kernel's own reads ahead: the faults of a VM, each
/// read with its surroundings, rarely come so.
const PAGES_IN_ORDER: u64 = 512;
/// The kernel's reads may overtake each other by so many pages.
const SLACK_PAGES: u64 = 512;
/// Bytes that are brought at once, decoded, or this part of what may be decoded in memory: two steps are there at a time,
/// with what is read now. Of stored bytes it is one long request, where the pages lie in one pack.
const MOST_DECODED_BYTES: u64 = 32 << 20;
const PART_OF_MEMORY: u64 = 3;

/// One reader of a file: an open file handle.
pub struct SequentialReader {
    snapshot: Arc<Snapshot>,
    file: usize,
    progress: Mutex<Progress>,
}

/// How far a reader has come, in pages of the file.
#[derive(Debug, Default)]
struct Progress {
    /// After what was read in order.
    next: u64,
    in_order: u64,
    /// What was brought last.
    step: Range<u64>,
}

impl SequentialReader {
    /// For somebody who begins to read file number `file` of `snapshot`.
    pub fn new(snapshot: Arc<Snapshot>, file: usize) -> Self {
        Self { snapshot, file, progress: Mutex::default() }
    }

    /// These pages are being read; brings what will be. Call it after they were asked for themselves. Never waits.
    pub fn reads(&self, pages: Range<u64>) {
        if self.snapshot.fetcher().is_local() {
            // Read in place: there is no round trip to save.
            return;
        }
        let mut progress = self.progress.lock();
        progress.reads(pages);
        while let Some(first) = progress.wanted() {
            let (frames, end) = self.step(first);
            progress.step = first..end;
            if frames.is_empty() {
                return;
            }
            // One that cannot be had costs speed only: whoever reads it will be told.
            self.snapshot.stream(frames, |_, _| {});
        }
    }

    /// The frames of the pages from `first` on, as many as are brought at once, and the page after them.
    fn step(&self, first: u64) -> (Vec<FrameIndex>, u64) {
        let memory = self.snapshot.fetcher().most_memory_bytes();
        let most = MOST_DECODED_BYTES.min(memory / PART_OF_MEMORY);
        let (mut frames, mut stored, mut decoded, mut end) = (Vec::new(), 0, 0, first);
        for (page, extent) in self.snapshot.extents(self.file, first..u64::MAX) {
            if let Source::Frame { frame, .. } = extent.source
                && let Some((_, entry)) = self.snapshot.packed_frame(frame)
                && frames.last() != Some(&frame)
            {
                stored += u64::from(entry.stored_bytes);
                decoded += u64::from(entry.pages) * PAGE;
                let is_full = stored > LONGEST_STREAMED_BYTES || decoded > most;
                if is_full && !frames.is_empty() {
                    break;
                }
                frames.push(frame);
            }
            end = page + extent.pages;
        }
        frames.sort_unstable();
        frames.dedup();
        (frames, end)
    }
}

impl Progress {
    fn reads(&mut self, pages: Range<u64>) {
        let begun = self.in_order > 0;
        let from = self.next.saturating_sub(SLACK_PAGES);
        if begun && (from..=self.next + SLACK_PAGES).contains(&pages.start) {
            self.in_order += pages.end.saturating_sub(self.next);
            self.next = self.next.max(pages.end);
        } else {
            *self = Self { next: pages.end, in_order: pages.end - pages.start, step: 0..0 };
        }
    }

    /// The page from which on to bring more now.
    fn wanted(&self) -> Option<u64> {
        (self.in_order >= PAGES_IN_ORDER && self.next >= self.step.start)
            .then(|| self.next.max(self.step.end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows `reads`, each step `step` pages long; answers with what was brought.
    fn follow(reads: &[Range<u64>], step: u64) -> Vec<Range<u64>> {
        let (mut progress, mut brought) = (Progress::default(), Vec::new());
        for read in reads {
            progress.reads(read.clone());
            while let Some(first) = progress.wanted() {
                progress.step = first..first + step;
                brought.push(progress.step.clone());
            }
        }
        brought
    }

    #[test]
    fn a_reader_from_front_to_back_has_two_steps_ahead() {
        let reads: Vec<_> = (0..16).map(|number| number * 256..(number + 1) * 256).collect();
        assert_eq!(follow(&reads[..1], 1024), []);
        assert_eq!(follow(&reads[..2], 1024), [512..1536, 1536..2560]);
        assert_eq!(follow(&reads[..6], 1024).len(), 3, "the second step is begun");
        assert_eq!(follow(&reads, 1024).last(), Some(&(4608..5632)));
    }

    #[test]
    fn reads_that_overtake_each_other_are_still_in_order() {
        assert_eq!(follow(&[0..256, 512..768, 256..512, 768..1024], 8192).len(), 2);
    }

    #[test]
    fn faults_here_and_there_bring_nothing() {
        let faults: Vec<_> = (0..100).map(|number| number * 7919 % 65_536 * 16).collect();
        let faults: Vec<_> = faults.iter().map(|at| *at..at + 256).collect();
        assert_eq!(follow(&faults, 8192), []);
    }

    #[test]
    fn whoever_jumps_begins_anew() {
        let reads = [0..256, 256..512, 90_000..90_256, 90_256..90_512];
        assert_eq!(follow(&reads, 1024), [512..1536, 1536..2560, 90_512..91_536, 91_536..92_560]);
    }
}
