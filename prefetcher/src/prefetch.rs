//! Installing ahead of faults: the working set, while the VM starts.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use reap_store::{Frame, FrameIndex, Urgency, WorkingSet, WorkingSetRun};

use crate::page_state::Bitmap;
use crate::plan;
use crate::vm::Vm;

/// Pages that are installed behind one that was late: 60 us of a thread that other VMs may wait for.
const NEXT_PAGES: u32 = 16;
/// Units of 2 MiB that are fetched at once for one VM.
const HUGE_UNITS_AHEAD: usize = 4;

/// The units that a working set covers.
pub(crate) fn planned_units(
    set: &WorkingSet,
    file: usize,
    pages_per_unit: u64,
    units: u64,
) -> Bitmap {
    let planned = Bitmap::new(units);
    for run in runs_of_file(set, file) {
        let last = run.first_page + u64::from(run.pages) - 1;
        for unit in run.first_page / pages_per_unit..=last / pages_per_unit {
            planned.set(unit);
        }
    }
    planned
}

fn runs_of_file(set: &WorkingSet, file: usize) -> impl Iterator<Item = &WorkingSetRun> {
    set.all_runs().filter(move |run| run.file as usize == file)
}

/// Streams a working set into a VM. Returns at once; the frames are installed as they arrive.
pub(crate) fn start(vm: &Arc<Vm>, set: &Arc<WorkingSet>) {
    let restore = &vm.restore;
    if vm.layout().pages_per_unit() != 1 {
        start_huge(vm, set);
        plan::warm_others(&vm.snapshot, set, vm.file);
        return;
    }
    let (into, of) = (vm.clone(), set.clone());
    set.fetch(Urgency::Prefetch, move |number, frame| match frame {
        Ok(frame) => into.guarded(|| install_frame(&into, of.runs(number), &frame)),
        Err(error) => {
            into.restore.failed_prefetch_frames.fetch_add(1, Ordering::Relaxed);
            tracing::warn!("restore {}: not prefetched: {error}", into.restore.id);
        }
    });
    // After the data was asked for and before it is here: zeros cost no fetch.
    for run in set.zero_runs().iter().filter(|run| run.file as usize == vm.file) {
        let installed = vm.install_ahead(run.first_page, u64::from(run.pages), None).installed;
        restore.prefetched(run.first_page, installed, true);
    }
}

fn install_frame(vm: &Vm, runs: &[WorkingSetRun], frame: &Frame) {
    let mut position = 0;
    // Neighbours of different weight or time are runs of their own, but one install.
    for neighbours in runs.chunk_by(|run, next| {
        run.file == next.file && run.first_page + u64::from(run.pages) == next.first_page
    }) {
        let pages = neighbours.iter().map(|run| run.pages).sum();
        let bytes = frame.pages(position, pages);
        position += pages;
        let first = neighbours[0];
        if first.file as usize == vm.file {
            let installed =
                vm.install_ahead(first.first_page, u64::from(pages), Some(bytes)).installed;
            vm.restore.prefetched(first.first_page, installed, false);
        } else {
            // A disk's: nobody faults it in, the mount finds it in memory.
            vm.snapshot.warm(first.file as usize, first.first_page, bytes);
        }
    }
}

/// The page at `position` of a frame of the set was touched before it was installed: installs what is touched next, from the same
/// frame. The threads that prefetch give way to all others and install in the order of the file; a guest that is ahead of them
/// would stop at every page, and by that keep them off the processors. Never waits.
pub(crate) fn install_next(vm: &Vm, runs: &[WorkingSetRun], position: u32, frame: &Frame) {
    let mut left = NEXT_PAGES;
    for (at, run) in touched_from(runs, position) {
        if run.file as usize != vm.file {
            continue;
        }
        // A run is touched in whatever order; of one that is too long, what lies after the page.
        let holds_it = at < position && position < at + run.pages;
        let skipped = if holds_it && run.pages > left { position - at } else { 0 };
        let pages = (run.pages - skipped).min(left);
        let (first, bytes) =
            (run.first_page + u64::from(skipped), frame.pages(at + skipped, pages));
        let ahead = vm.memory.install_ahead(first, u64::from(pages), Some(bytes), || false);
        vm.restore.prefetched(first, ahead.installed, false);
        left = left.saturating_sub(u32::try_from(ahead.installed).unwrap_or(u32::MAX));
        if left == 0 || ahead.left.is_some() {
            return;
        }
    }
}

/// The runs of a frame that are touched with the page at `position` or after it, in that order, each with its position.
fn touched_from(
    runs: &[WorkingSetRun],
    position: u32,
) -> impl Iterator<Item = (u32, &WorkingSetRun)> {
    let mut end = 0;
    let placed = runs.iter().map(|run| {
        end += run.pages;
        (end - run.pages, run)
    });
    let mut placed: Vec<_> = placed.collect();
    let is_it = |(at, run): &&(u32, &WorkingSetRun)| (*at..at + run.pages).contains(&position);
    let since = placed.iter().find(is_it).map_or(u32::MAX, |(_, run)| run.first_touch_us);
    placed.retain(|(_, run)| run.first_touch_us >= since);
    placed.sort_by_key(|(_, run)| run.first_touch_us);
    placed.into_iter()
}

/// With 2 MiB guest pages a unit needs all its bytes, of which the working set has a few: the
/// units that it touches are taken from the page map, a few at a time, in its order.
struct HugeUnits {
    vm: Arc<Vm>,
    units: Vec<u64>,
    next: AtomicUsize,
}

fn start_huge(vm: &Arc<Vm>, set: &WorkingSet) {
    let mut seen = HashSet::new();
    let per_unit = vm.layout().pages_per_unit();
    let units = runs_of_file(set, vm.file)
        .flat_map(|run| {
            let last = run.first_page + u64::from(run.pages) - 1;
            run.first_page / per_unit..=last / per_unit
        })
        .filter(|unit| seen.insert(*unit))
        .collect();
    let work = Arc::new(HugeUnits { vm: vm.clone(), units, next: AtomicUsize::new(0) });
    for _ in 0..HUGE_UNITS_AHEAD {
        next_huge(&work);
    }
}

fn next_huge(work: &Arc<HugeUnits>) {
    // All zeros: no fetch calls back, so the next one is looked at here.
    while let Some(unit) = work.units.get(work.next.fetch_add(1, Ordering::Relaxed)).copied() {
        let frames = work.vm.frames_of(unit);
        if frames.is_empty() {
            let installed = work.vm.install_ahead(unit, 1, None).installed;
            let per_unit = work.vm.layout().pages_per_unit();
            work.vm.restore.prefetched(unit * per_unit, installed * per_unit, true);
            continue;
        }
        let (sender, receiver) = mpsc::channel();
        let receiver = parking_lot::Mutex::new(receiver);
        let missing = AtomicUsize::new(frames.len());
        let again = work.clone();
        work.vm.snapshot.fetch(&frames, Urgency::Prefetch, move |index, frame| {
            // The receiver lives in this closure.
            sender.send((index, frame)).unwrap_or_default();
            if missing.fetch_sub(1, Ordering::AcqRel) == 1 {
                install_huge(&again.vm, unit, receiver.lock().try_iter());
                next_huge(&again);
            }
        });
        return;
    }
}

type Fetched = (FrameIndex, Result<Frame, reap_store::Error>);

fn install_huge(vm: &Vm, unit: u64, fetched: impl Iterator<Item = Fetched>) {
    let mut frames = std::collections::HashMap::new();
    for (index, frame) in fetched {
        match frame {
            Ok(frame) => {
                frames.insert(index, frame);
            }
            Err(error) => {
                vm.restore.failed_prefetch_frames.fetch_add(1, Ordering::Relaxed);
                tracing::warn!("restore {}: not prefetched: {error}", vm.restore.id);
                return;
            }
        }
    }
    if let Some(bytes) = vm.assemble(unit, |index| frames.get(&index).cloned()) {
        let installed = vm.install_ahead(unit, 1, Some(&bytes)).installed;
        let per_unit = vm.layout().pages_per_unit();
        vm.restore.prefetched(unit * per_unit, installed * per_unit, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_touched_next_comes_next_whatever_its_place() {
        let run = |first_page, pages, first_touch_us| WorkingSetRun {
            file: 0,
            first_page,
            pages,
            first_touch_us,
            weight: reap_store::WEIGHT_ONE,
        };
        let runs = [run(10, 1, 70), run(20, 4, 30), run(30, 2, 90), run(40, 1, 30), run(50, 3, 10)];
        let from = |position| -> Vec<_> {
            touched_from(&runs, position).map(|(at, run)| (at, run.first_page)).collect()
        };
        assert_eq!(from(3), [(1, 20), (7, 40), (0, 10), (5, 30)]);
        assert_eq!(from(0), [(0, 10), (5, 30)]);
        assert_eq!(from(10).len(), runs.len());
        assert_eq!(from(11), [], "the frame has no such page");
    }
}
