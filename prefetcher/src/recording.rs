//! A recording: the first touches of a restore that can be seen, in order, until no more come.
//!
//! A touch is a fault, or a read of a disk through the mount. What was installed ahead is touched
//! without a trace and never gets in here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reap_store::{ReadLog, Snapshot, Touch};

use crate::page_state::Bitmap;

/// Called once with what was recorded, in order of time; with nothing where there was nothing.
pub type OnRecorded = Box<dyn FnOnce(Vec<Touch>) + Send>;

/// Pages of memory that one recording notes: 1 GiB, as much as a working set holds at most.
const MAX_TOUCHES: usize = 1 << 18;

/// A recording under way.
pub(crate) struct Recording {
    file: u32,
    began: Instant,
    touches: Vec<Touch>,
    seen: Bitmap,
    last: Option<Instant>,
    reads: Arc<ReadLog>,
    done: OnRecorded,
}

impl Recording {
    /// Of file number `file` of the snapshot, and of what is read of its disks meanwhile.
    pub(crate) fn new(snapshot: &Snapshot, file: usize, began: Instant, done: OnRecorded) -> Self {
        let seen = Bitmap::new(snapshot.files()[file].page_count());
        let file = u32::try_from(file).unwrap_or(u32::MAX);
        let reads = snapshot.watch_reads();
        Self { file, began, touches: Vec::new(), seen, last: None, reads, done }
    }

    /// Notes a touch of some pages; how many are new.
    pub(crate) fn touch(&mut self, first_page: u64, count: u64) -> u64 {
        let at_us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let before = self.touches.len();
        for page in first_page..first_page + count {
            if self.touches.len() < MAX_TOUCHES && self.seen.set(page) {
                self.touches.push(Touch { file: self.file, page, at_us });
            }
        }
        self.last = Some(Instant::now());
        (self.touches.len() - before) as u64
    }

    /// Whether nothing new was touched for so long, after something was.
    pub(crate) fn has_settled(&self, after: Duration) -> bool {
        self.last.is_some_and(|last| last.elapsed() >= after)
    }

    /// Hands over what was recorded.
    pub(crate) fn finish(mut self, snapshot: &Snapshot) {
        self.touches.extend(self.reads.touches(snapshot, self.began));
        self.touches.sort_by_key(|touch| touch.at_us);
        (self.done)(self.touches);
    }
}
