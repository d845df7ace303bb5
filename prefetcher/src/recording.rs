//! The trace of a restore: which pages were touched first, in order, with times.
//!
//! Only faults are recorded. What we install unasked (prefetch, neighbours, populating) is not a
//! touch, or a set could only ever grow.

use std::time::{Duration, Instant};

use reap_store::{SnapshotId, Touch};
use serde::Serialize;

use crate::RestoreId;
use crate::page_state::Bitmap;

/// What a recording holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Coverage {
    /// Every page that was touched.
    All,
    /// Only the touches that the prefetch did not spare: those outside its working set, and those
    /// that came before it.
    Residual,
}

/// First touches of one restore, in order.
#[derive(Clone, Debug)]
pub struct Recording {
    /// The restore.
    pub restore: RestoreId,
    /// What it restored.
    pub snapshot: SnapshotId,
    /// Whether all touches are in it.
    pub coverage: Coverage,
    /// Whether touching had come to rest; else the VM ended, or the recording was stopped.
    pub settled: bool,
    /// The touches of the memory file.
    pub touches: Vec<Touch>,
}

/// A recording in progress.
pub(crate) struct Recorder {
    coverage: Coverage,
    file: u32,
    started: Instant,
    last_touch: Option<Instant>,
    /// By guest page, so that a page that faults twice is recorded once.
    touched: Bitmap,
    touches: Vec<Touch>,
}

impl Recorder {
    /// Nothing so far. `file` is the number of the memory file.
    pub(crate) fn new(coverage: Coverage, file: u32, page_count: u64, started: Instant) -> Self {
        let touched = Bitmap::new(page_count);
        Self { coverage, file, started, last_touch: None, touched, touches: Vec::new() }
    }

    /// A fault on guest page `page`, which holds the file pages from `first_file_page` on. A 2 MiB
    /// page is touched as a whole, because it can only be installed as a whole.
    pub(crate) fn touch(&mut self, page: u64, first_file_page: u64, file_pages: u64, now: Instant) {
        if self.touched.set(page..page + 1) == 0 {
            return;
        }
        self.last_touch = Some(now);
        let elapsed = now.saturating_duration_since(self.started);
        let at_us = u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX);
        let file = self.file;
        let pages = first_file_page..first_file_page + file_pages;
        self.touches.extend(pages.map(|page| Touch { file, page, at_us }));
    }

    /// Whether there has been a touch, and none for `settle`.
    pub(crate) fn is_settled(&self, settle: Duration, now: Instant) -> bool {
        self.last_touch.is_some_and(|last| now.saturating_duration_since(last) >= settle)
    }

    /// How many file pages it holds.
    pub(crate) fn page_count(&self) -> u64 {
        self.touches.len() as u64
    }

    /// Ends it.
    pub(crate) fn finish(
        self,
        restore: RestoreId,
        snapshot: SnapshotId,
        settled: bool,
    ) -> Recording {
        Recording { restore, snapshot, coverage: self.coverage, settled, touches: self.touches }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_without_touches_never_settles() {
        let start = Instant::now();
        let mut recorder = Recorder::new(Coverage::All, 0, 100, start);
        let settle = Duration::from_secs(2);
        assert!(!recorder.is_settled(settle, start + Duration::from_secs(100)));
        recorder.touch(7, 7, 1, start + Duration::from_secs(100));
        assert!(!recorder.is_settled(settle, start + Duration::from_secs(101)));
        assert!(recorder.is_settled(settle, start + Duration::from_secs(102)));
    }

    #[test]
    fn only_first_touches_count_and_order_stays() {
        let start = Instant::now();
        let mut recorder = Recorder::new(Coverage::All, 0, 100, start);
        for page in [9, 3, 9, 4, 3] {
            recorder.touch(page, page + 1000, 1, start);
        }
        let recording = recorder.finish(RestoreId(1), SnapshotId::random(), true);
        let pages: Vec<_> = recording.touches.iter().map(|touch| touch.page).collect();
        assert_eq!(pages, [1009, 1003, 1004]);
    }
}
