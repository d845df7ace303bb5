//! What a working set plans for a restore, and what of it is for memory caches only.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use reap_store::{Snapshot, Urgency, WEIGHT_ONE, WorkingSet, WorkingSetRun};

use crate::report::Restore;

/// Writes down how many pages of file number `file` the set has, and what part of them restores
/// touch by its weights.
pub(crate) fn note(restore: &Restore, set: &WorkingSet, file: usize) {
    let (mut data, mut zeros, mut weights) = (0, 0, 0);
    for run in set.data_runs().iter().filter(|run| run.file as usize == file) {
        data += u64::from(run.pages);
        weights += u64::from(run.pages) * u64::from(run.weight);
    }
    for run in set.zero_runs().iter().filter(|run| run.file as usize == file) {
        zeros += u64::from(run.pages);
        weights += u64::from(run.pages) * u64::from(run.weight);
    }
    restore.planned_pages.store(data, Ordering::Relaxed);
    restore.planned_zero_pages.store(zeros, Ordering::Relaxed);
    restore.expect(weights as f64 / (f64::from(WEIGHT_ONE) * (data + zeros).max(1) as f64));
}

/// Brings all that the set has into memory, first touch first, where faults on file number `file` find it.
pub(crate) fn warm(snapshot: &Arc<Snapshot>, set: &Arc<WorkingSet>, file: usize) {
    // A frame that cannot be had is asked for again by whoever needs it; here and below.
    set.fetch(Urgency::Prefetch, |_, _| {});
    warm_others(snapshot, set, file);
}

/// Brings the frames of all other files than number `file`: nobody faults them in, the mount finds
/// them in memory.
pub(crate) fn warm_others(snapshot: &Arc<Snapshot>, set: &WorkingSet, file: usize) {
    for number in 0..set.frame_count() {
        let others = set.runs(number).iter().filter(|run| run.file as usize != file);
        let frames_of = |run: &WorkingSetRun| {
            let pages = run.first_page..run.first_page + u64::from(run.pages);
            snapshot.frames_of(run.file as usize, pages)
        };
        let frames: Vec<_> = others.flat_map(frames_of).collect();
        if !frames.is_empty() {
            snapshot.fetch(&frames, Urgency::Prefetch, |_, _| {});
        }
    }
}
