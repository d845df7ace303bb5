//! Reads of a snapshot's files through the mount, for whoever records a restore: here the mount, which
//! sees them, and the prefetcher, which records, meet.
//!
//! A read is what the kernel asked for, with its read-ahead: whoever waits for the first page waits for
//! all of the request, and a restore that does the same asks for the same.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;

use crate::{FileKind, Snapshot, Source, Touch};

/// Reads that one log keeps; later ones are not recorded.
const MAX_READS: usize = 4096;
/// Pages that come out of one log: 256 MiB.
const MAX_PAGES: usize = 1 << 16;

/// Who wants to know. Costs one load a read while nobody does.
#[derive(Default)]
pub(crate) struct Watchers {
    count: AtomicUsize,
    logs: Mutex<Vec<Weak<ReadLog>>>,
}

/// The reads since it was made, until it is dropped.
pub struct ReadLog(Mutex<Vec<Read>>);

struct Read {
    at: Instant,
    file: usize,
    pages: Range<u64>,
}

impl Watchers {
    fn add(&self) -> Arc<ReadLog> {
        let log = Arc::new(ReadLog(Mutex::default()));
        let mut logs = self.logs.lock();
        logs.push(Arc::downgrade(&log));
        self.count.store(logs.len(), Ordering::Relaxed);
        log
    }

    fn note(&self, file: usize, pages: Range<u64>) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let at = Instant::now();
        let mut logs = self.logs.lock();
        logs.retain(|log| {
            let Some(log) = log.upgrade() else { return false };
            let mut reads = log.0.lock();
            if reads.len() < MAX_READS {
                reads.push(Read { at, file, pages: pages.clone() });
            }
            true
        });
        self.count.store(logs.len(), Ordering::Relaxed);
    }
}

impl Snapshot {
    /// Notes reads of this snapshot's disks and state from now on, whoever reads, until it is dropped.
    pub fn watch_reads(&self) -> Arc<ReadLog> {
        self.watchers().add()
    }

    /// Somebody reads these pages of file number `file`, and waits. Memory is not noted: a VM that is
    /// served by faults does not read its file.
    pub fn note_read(&self, file: usize, pages: Range<u64>) {
        if self.files()[file].kind != FileKind::Memory {
            self.watchers().note(file, pages);
        }
    }
}

impl ReadLog {
    /// The pages that were read, in order, each once, at microseconds since `began`; whole frames
    /// where a file has them whole, because a frame is what can be kept in memory.
    pub fn touches(&self, snapshot: &Snapshot, began: Instant) -> Vec<Touch> {
        let mut touches = Vec::new();
        let mut seen = HashSet::new();
        for read in self.0.lock().iter() {
            let since = read.at.saturating_duration_since(began);
            let at_us = u64::try_from(since.as_micros()).unwrap_or(u64::MAX);
            let file = u32::try_from(read.file).unwrap_or(u32::MAX);
            for (page, extent) in snapshot.extents(read.file, read.pages.clone()) {
                if extent.source == Source::Zero {
                    continue;
                }
                for page in
                    whole_frame(snapshot, read.file, page).unwrap_or(page..page + extent.pages)
                {
                    if touches.len() < MAX_PAGES && seen.insert((file, page)) {
                        touches.push(Touch { file, page, at_us });
                    }
                }
            }
        }
        touches
    }
}

/// The pages of the frame at `page`, if they lie one after the other in this file.
fn whole_frame(snapshot: &Snapshot, file: usize, page: u64) -> Option<Range<u64>> {
    let Source::Frame { frame, position } = snapshot.extent(file, page)?.source else {
        return None;
    };
    let first = page.checked_sub(u64::from(position))?;
    let (_, entry) = snapshot.packed_frame(frame)?;
    let extent = snapshot.extent(file, first)?;
    let whole = extent.source == Source::Frame { frame, position: 0 }
        && extent.pages == u64::from(entry.pages);
    whole.then(|| first..first + extent.pages)
}
