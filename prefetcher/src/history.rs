//! Restores that are remembered, and what all of them come to.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::latency::{FAULT_CLASSES, LatencyTotal};
use crate::report::{Cause, End, MODES, Restore};

/// Ended restores that are remembered one by one.
const REMEMBERED: usize = 256;
/// Names of the ways in which a restore ends.
const OUTCOMES: [&str; 3] = ["vmm_ended", "handed_over", "killed"];

/// The restores of a server.
#[derive(Default)]
pub(crate) struct History {
    restores: VecDeque<Arc<Restore>>,
    forgotten: Totals,
}

/// What all restores since the start come to. Pages are of 4 KiB.
#[derive(Clone, Debug)]
pub struct Totals {
    /// Restores that began, by mode.
    pub started: BTreeMap<&'static str, u64>,
    /// Restores that ended, by mode and how: `vmm_ended`, `handed_over`, `killed`.
    pub ended: BTreeMap<(&'static str, &'static str), u64>,
    /// VMMs that we ended, by why.
    pub killed: BTreeMap<Cause, u64>,
    /// Restores that had a working set of which nothing was installed: an error.
    pub inert: u64,
    /// Pages of the working sets that were to be installed.
    pub planned_pages: u64,
    /// Those that were, before they were touched.
    pub installed_pages: u64,
    /// Those that were touched before they were installed.
    pub late_pages: u64,
    /// Pages that were touched and that the working set did not have.
    pub missed_pages: u64,
    /// Frames of working sets that could not be had.
    pub failed_prefetch_frames: u64,
    /// Pages recorded.
    pub recorded_pages: u64,
    /// Pages that guests gave back.
    pub removed_pages: u64,
    /// How often the kernel asked to try again.
    pub again: u64,
    /// Faults, in the order of [`FAULT_CLASSES`].
    pub faults: [LatencyTotal; FAULT_CLASSES.len()],
    /// How long the fault that waits longest now has waited.
    pub oldest_fault: Option<Duration>,
}

impl Default for Totals {
    /// Everything that can be counted is there, at zero.
    fn default() -> Self {
        let both = MODES.iter().flat_map(|mode| OUTCOMES.map(|outcome| ((*mode, outcome), 0)));
        Self {
            started: MODES.map(|mode| (mode, 0)).into(),
            ended: both.collect(),
            killed: Cause::ALL.map(|cause| (cause, 0)).into(),
            inert: 0,
            planned_pages: 0,
            installed_pages: 0,
            late_pages: 0,
            missed_pages: 0,
            failed_prefetch_frames: 0,
            recorded_pages: 0,
            removed_pages: 0,
            again: 0,
            faults: Default::default(),
            oldest_fault: None,
        }
    }
}

impl Totals {
    /// Restores in service.
    pub fn running(&self) -> u64 {
        self.started.values().sum::<u64>() - self.ended.values().sum::<u64>()
    }

    fn add(&mut self, restore: &Restore) {
        *self.started.entry(restore.mode).or_default() += 1;
        if let Some(end) = restore.end() {
            let outcome = match end {
                End::VmmEnded => OUTCOMES[0],
                End::HandedOver => OUTCOMES[1],
                End::Killed { cause, .. } => {
                    *self.killed.entry(cause).or_default() += 1;
                    OUTCOMES[2]
                }
            };
            *self.ended.entry((restore.mode, outcome)).or_default() += 1;
        }
        let counts = restore.counts();
        self.inert += u64::from(restore.is_inert());
        if !counts.sampled {
            self.planned_pages += counts.planned;
            self.installed_pages += counts.installed;
            self.late_pages += counts.touched;
        }
        self.missed_pages += counts.missed;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.failed_prefetch_frames += load(&restore.failed_prefetch_frames);
        self.recorded_pages += load(&restore.recorded_pages);
        self.removed_pages += load(&restore.removed_pages);
        self.again += load(&restore.again);
        for (total, faults) in self.faults.iter_mut().zip(&restore.faults) {
            total.add(faults);
        }
    }
}

impl History {
    /// Oldest first.
    pub(crate) fn restores(&self) -> impl Iterator<Item = &Arc<Restore>> {
        self.restores.iter()
    }

    /// Takes up a restore that begins, and forgets one that ended long ago.
    pub(crate) fn remember(&mut self, restore: Arc<Restore>) {
        self.restores.push_back(restore);
        let ended = self.restores.iter().filter(|restore| restore.has_ended()).count();
        if ended > REMEMBERED
            && let Some(oldest) = self.restores.iter().position(|restore| restore.has_ended())
            && let Some(restore) = self.restores.remove(oldest)
        {
            self.forgotten.add(&restore);
        }
    }

    /// All of them, whether remembered or not.
    pub(crate) fn totals(&self) -> Totals {
        let mut totals = self.forgotten.clone();
        self.restores.iter().for_each(|restore| totals.add(restore));
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::latency::FaultClass;

    #[test]
    fn what_is_forgotten_still_counts() {
        let mut history = History::default();
        let begin = |history: &mut History, id: u64, mode| {
            let restore = Arc::new(Restore::new(id, reap_store::SnapshotId::random(), 1, mode));
            history.remember(restore.clone());
            restore
        };
        let first = begin(&mut history, 0, "demand");
        for id in 1..=1000 {
            let restore = begin(&mut history, id, "prefetch");
            restore.planned_pages.fetch_add(3, Ordering::Relaxed);
            restore.fault(FaultClass::Zero, (1, 1), Duration::from_micros(10), false);
            restore.touched(false, true, 1);
            let cause = Cause::Deadline;
            restore.finish(match id % 4 {
                0 => End::Killed { cause, reason: String::new() },
                _ => End::VmmEnded,
            });
        }
        let totals = history.totals();
        assert_eq!(history.restores().count(), 1 + REMEMBERED + 1, "the first one runs on");
        assert!(!first.has_ended());
        assert_eq!((totals.started["demand"], totals.started["prefetch"]), (1, 1000));
        assert_eq!(totals.ended[&("prefetch", "vmm_ended")], 750);
        assert_eq!(totals.ended[&("prefetch", "killed")], 250);
        assert_eq!((totals.killed[&Cause::Deadline], totals.killed[&Cause::Bug]), (250, 0));
        assert_eq!(totals.running(), 1);
        assert_eq!((totals.planned_pages, totals.missed_pages), (3000, 1000));
        assert_eq!(totals.faults.each_ref().map(LatencyTotal::count), [0, 0, 1000, 0]);
    }
}
