//! Reading ahead of whoever reads a file from front to back, in the long requests that a remote store wants.
//!
//! The kernel reads ahead of a file on the mount as well, but 128 KiB at a time: a request each, and a round trip each.
//! Whoever is seen to read on is brought requests ahead of what they read, each four times as long as the one before, and
//! two at a time once they are long: who stops soon has cost little, and who did is not believed so soon again.

use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::fetch::LONGEST_STREAMED_BYTES;
use crate::{FrameIndex, PAGE_SIZE, Snapshot, Source};

const PAGE: u64 = PAGE_SIZE as u64;
/// Whoever has read so many pages that follow on the first read will read on: two of the kernel's own reads ahead. The
/// faults of a VM, each read with its surroundings, rarely come so.
const PAGES_IN_ORDER: u64 = 64;
/// The same once somebody did not read on: blocks of a MiB here and there are no reading in order.
const PAGES_IN_ORDER_AGAIN: u64 = 512;
/// The kernel's reads may overtake each other by so many pages.
const SLACK_PAGES: u64 = 64;
/// Stored bytes of the first request, and how many times as long each further one is.
const FIRST_STEP_BYTES: u64 = 2 << 20;
const GROWTH: u64 = 4;
/// Bytes that are brought at once, decoded, or this part of what may be decoded in memory: two steps are there at a time,
/// with what is read now. Of stored bytes it is at most one long request, where the pages lie in one pack.
const MOST_DECODED_BYTES: u64 = 32 << 20;
const PART_OF_MEMORY: u64 = 3;

/// One reader of a file: an open file handle.
pub struct SequentialReader {
    snapshot: Arc<Snapshot>,
    file: usize,
    progress: Mutex<Progress>,
}

/// How far a reader has come, in pages of the file.
#[derive(Debug)]
struct Progress {
    /// After what was read in order.
    next: u64,
    /// Pages that followed on the first read.
    in_order: u64,
    /// What was brought last; empty if nothing was.
    step: Range<u64>,
    /// Stored bytes of what is brought next.
    step_bytes: u64,
    /// So many pages in order make somebody who reads on.
    needed: u64,
}

impl Default for Progress {
    fn default() -> Self {
        let needed = PAGES_IN_ORDER;
        Self { next: 0, in_order: 0, step: 0..0, step_bytes: FIRST_STEP_BYTES, needed }
    }
}

impl SequentialReader {
    /// For somebody who begins to read file number `file` of `snapshot`. `None` where nothing is gained: a local store is
    /// read in place, without round trips.
    pub fn new(snapshot: Arc<Snapshot>, file: usize) -> Option<Self> {
        let is_local = snapshot.fetcher().is_local();
        (!is_local).then(|| Self { snapshot, file, progress: Mutex::default() })
    }

    /// `length` bytes from `offset` on are going to be read. Call it before they are answered, or whoever reads backwards
    /// may seem to read on.
    pub fn reads(&self, offset: u64, length: u32) {
        let end = offset.saturating_add(u64::from(length));
        self.progress.lock().reads(offset / PAGE..end.div_ceil(PAGE));
    }

    /// Brings what will be read. Call it after what is read was asked for. Never waits.
    pub fn brings(&self) {
        let mut progress = self.progress.lock();
        while let Some(first) = progress.wanted() {
            let (frames, end) = self.step(first, progress.step_bytes);
            progress.brought(first..end);
            if frames.is_empty() {
                return;
            }
            // One that cannot be had costs speed only: whoever reads it will be told.
            self.snapshot.stream(frames, |_, _| {});
        }
    }

    /// The frames of the pages from `first` on, so many stored bytes or as many as are brought at once, and the page after
    /// them.
    fn step(&self, first: u64, step_bytes: u64) -> (Vec<FrameIndex>, u64) {
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
                let is_full = stored > step_bytes || decoded > most;
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
        let begun = self.next > 0;
        let from = self.next.saturating_sub(SLACK_PAGES);
        // Who leaves out holes goes on inside what was brought.
        let to = self.step.end.max(self.next + SLACK_PAGES);
        if begun && (from..=to).contains(&pages.start) {
            self.in_order += pages.end.saturating_sub(self.next.max(pages.start));
            self.next = self.next.max(pages.end);
        } else {
            let stopped = !self.step.is_empty();
            let needed = if stopped { PAGES_IN_ORDER_AGAIN } else { self.needed };
            *self = Self { next: pages.end, needed, ..Self::default() };
        }
    }

    /// The page from which on to bring more now.
    fn wanted(&self) -> Option<u64> {
        // Of those who have not read on for long, half of what was brought is to be read first.
        let half = (self.step.end - self.step.start) / 2;
        let is_long = self.step_bytes == LONGEST_STREAMED_BYTES;
        let from = self.step.start + if is_long { 0 } else { half };
        (self.in_order >= self.needed && self.next >= from).then(|| self.next.max(self.step.end))
    }

    fn brought(&mut self, step: Range<u64>) {
        self.step = step;
        self.step_bytes = LONGEST_STREAMED_BYTES.min(self.step_bytes * GROWTH);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn once(step: Range<u64>) -> Vec<Range<u64>> {
        vec![step]
    }

    /// Follows `reads`, each step `step` pages long; answers with what was brought.
    fn follow(reads: &[Range<u64>], step: u64) -> Vec<Range<u64>> {
        let (mut progress, mut brought) = (Progress::default(), Vec::new());
        for read in reads {
            progress.reads(read.clone());
            while let Some(first) = progress.wanted() {
                progress.brought(first..first + step);
                brought.push(progress.step.clone());
            }
        }
        brought
    }

    #[test]
    fn each_step_is_four_times_as_long_as_the_one_before_up_to_the_longest() {
        let mut progress = Progress::default();
        let mut next = || {
            let bytes = progress.step_bytes >> 20;
            progress.brought(0..1);
            bytes
        };
        let steps: Vec<_> = (0..6).map(|_| next()).collect();
        assert_eq!(steps, [2, 8, 12, 12, 12, 12]);
    }

    #[test]
    fn a_reader_from_front_to_back_soon_has_two_steps_ahead() {
        let reads: Vec<_> = (0..40).map(|number| number * 32..(number + 1) * 32).collect();
        assert_eq!(follow(&reads[..2], 256), []);
        assert_eq!(follow(&reads[..3], 256), once(96..352));
        assert_eq!(follow(&reads[..7], 256), [96..352, 352..608], "half of the first is read");
        assert_eq!(follow(&reads[..11], 256).len(), 3, "the second step is begun");
        assert_eq!(follow(&reads, 256).last(), Some(&(1376..1632)));
    }

    #[test]
    fn one_long_read_brings_nothing() {
        assert_eq!(follow(std::slice::from_ref(&(0..256)), 256), []);
        assert_eq!(follow(&[0..256, 256..512], 256), once(512..768));
    }

    #[test]
    fn reads_that_overtake_each_other_are_still_in_order() {
        assert_eq!(follow(&[0..32, 64..96, 32..64, 96..128], 8192).len(), 1);
    }

    #[test]
    fn faults_here_and_there_bring_nothing() {
        let faults: Vec<_> = (0..100).map(|number| number * 7919 % 65_536 * 16).collect();
        let faults: Vec<_> = faults.iter().map(|at| *at..at + 32).collect();
        assert_eq!(follow(&faults, 8192), []);
    }

    #[test]
    fn whoever_reads_backwards_is_brought_nothing() {
        let reads: Vec<_> = (0..100).rev().map(|number| number * 32..(number + 1) * 32).collect();
        assert_eq!(follow(&reads, 8192), []);
    }

    #[test]
    fn whoever_leaves_out_holes_reads_on() {
        let reads = [0..32, 32..64, 64..96, 400..432, 800..832];
        assert_eq!(follow(&reads, 400), [96..496, 496..896, 896..1296]);
    }

    #[test]
    fn whoever_jumps_is_not_believed_so_soon_again() {
        let block = |number: u64| (0..8).map(move |read| number * 7919 * 256 + read * 32);
        let blocks: Vec<_> = (0..50).flat_map(block).map(|at| at..at + 32).collect();
        assert_eq!(follow(&blocks, 1024), once(96..1120), "once, and never again");
        let on: Vec<_> = (0..19).map(|read| 90_000 + read * 32..90_032 + read * 32).collect();
        let all = [&blocks[..8], &on].concat();
        assert_eq!(follow(&all, 1024)[1..], once(90_544..91_568), "after 2 MiB");
    }
}
