//! Serving faults: what a page is to hold, fetching what is not in memory, trying again.
//!
//! Everything here runs on the fault thread, but for [`arrived`], which runs on a decode thread of
//! the store. Neither waits for anything.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use reap_store::{Error, Frame, FrameIndex, Urgency, WorkingSet};

use crate::engine::Engine;
use crate::latency::FaultClass;
use crate::memory::{Content, NewFault, Served};
use crate::pending::PendingFault;
use crate::prefetch;
use crate::report::{Cause, End};
use crate::uffd::MemoryEvent;
use crate::vm::Vm;

/// Acts on what the kernel said, in its order. Removals are marked already.
pub(crate) fn handle_events(engine: &Arc<Engine>, vm: &Arc<Vm>, events: &[MemoryEvent]) {
    for event in events {
        match event {
            MemoryEvent::Fault(address) => match vm.layout().unit_at(*address) {
                Some(unit) => handle_fault(engine, vm, unit),
                None => vm.kill(
                    Cause::Protocol,
                    "a fault outside all regions that the handshake described",
                ),
            },
            MemoryEvent::Removed(..) => {}
            MemoryEvent::Unsupported(what) => vm.kill(Cause::Protocol, what),
        }
    }
    retry(engine, vm);
}

/// Tries again what the kernel said `Again` to.
pub(crate) fn retry(engine: &Arc<Engine>, vm: &Arc<Vm>) {
    for (unit, fault) in vm.memory.take_retries() {
        let frames = match fault.class {
            FaultClass::Removed | FaultClass::Zero => Vec::new(),
            FaultClass::Cached | FaultClass::Fetched => vm.frames_of(unit),
        };
        attend(engine, vm, unit, fault, &frames);
    }
}

fn handle_fault(engine: &Arc<Engine>, vm: &Arc<Vm>, unit: u64) {
    let mut frames = Vec::new();
    let new = vm.memory.fault(unit, || {
        frames = vm.frames_of(unit);
        frames.is_empty()
    });
    match new {
        NewFault::Serve(fault) => {
            note(vm, unit, fault.class);
            attend(engine, vm, unit, fault, &frames);
        }
        NewFault::Waits => {}
        NewFault::TooMany => vm.kill(Cause::Protocol, "more faults wait than a VM has threads"),
    }
}

/// Counts a new fault, and records it.
fn note(vm: &Vm, unit: u64, class: FaultClass) {
    if class == FaultClass::Removed {
        return;
    }
    let per_unit = vm.layout().pages_per_unit();
    if let Some(recording) = vm.recording.lock().as_mut() {
        let pages = per_unit.min(vm.snapshot.files()[vm.file].page_count() - unit * per_unit);
        let new = recording.touch(unit * per_unit, pages);
        vm.restore.recorded_pages.fetch_add(new, Ordering::Relaxed);
    }
    if let Some(planned) = &vm.planned {
        vm.restore.touched(planned.get(unit), class == FaultClass::Zero, per_unit);
    }
}

/// Serves a fault from memory, or fetches the `frames` that it needs; zeros need none.
fn attend(
    engine: &Arc<Engine>,
    vm: &Arc<Vm>,
    unit: u64,
    fault: PendingFault,
    frames: &[FrameIndex],
) {
    if let [frame] = *frames
        && vm.layout().pages_per_unit() == 1
        && let Some(found) = vm.snapshot.cached(frame)
    {
        // The usual fault: one page of a frame in memory, without a copy of ours.
        let position = position_of(vm, unit);
        settle(engine, vm, unit, fault, Content::Bytes(found.pages(position, 1)));
        if vm.installs
            && let Some((set, number, position)) = vm.planned_place(unit)
            && let Some(frame) = set.cached(number)
        {
            prefetch::install_next(vm, set.runs(number), position, &frame);
        }
        return;
    }
    if frames.is_empty() {
        settle(engine, vm, unit, fault, Content::Zero);
        return;
    }
    let cached: Vec<_> = frames.iter().map(|frame| vm.snapshot.cached(*frame)).collect();
    let find = |index: FrameIndex| cached.get(frames.binary_search(&index).ok()?)?.clone();
    if let Some(bytes) = vm.assemble(unit, find) {
        settle(engine, vm, unit, fault, Content::Bytes(&bytes));
        return;
    }
    match vm.planned_place(unit) {
        Some((set, number, position)) => {
            fetch_planned(engine, vm, unit, fault, set, number, position)
        }
        None => fetch(engine, vm, unit, fault, frames),
    }
}

/// A page of the working set that is not here yet: its frame is on its way, and is promoted. Reading the
/// page's pack as well would take a request and a decode from all that the VM waits for.
fn fetch_planned(
    engine: &Arc<Engine>,
    vm: &Arc<Vm>,
    unit: u64,
    fault: PendingFault,
    set: &Arc<WorkingSet>,
    number: usize,
    position: u32,
) {
    vm.memory.await_bytes(unit, fault);
    let (engine, vm, of) = (engine.clone(), vm.clone(), set.clone());
    set.fetch_one(number, Urgency::Demand, move |frame| {
        vm.guarded(|| {
            let Some(fault) = vm.memory.bytes_came(unit) else { return };
            match frame {
                Ok(frame) => {
                    settle(&engine, &vm, unit, fault, Content::Bytes(frame.pages(position, 1)));
                    if vm.installs {
                        prefetch::install_next(&vm, of.runs(number), position, &frame);
                    }
                }
                // It costs speed only: the pack has the page too.
                Err(_) => fetch(&engine, &vm, unit, fault, &vm.frames_of(unit)),
            }
        });
    });
}

fn position_of(vm: &Vm, page: u64) -> u32 {
    match vm.snapshot.extent(vm.file, page).map(|extent| extent.source) {
        Some(reap_store::Source::Frame { position, .. }) => position,
        _ => 0,
    }
}

/// Fills a unit, and says what became of its fault.
fn settle(
    engine: &Arc<Engine>,
    vm: &Arc<Vm>,
    unit: u64,
    fault: PendingFault,
    content: Content<'_>,
) {
    match vm.memory.serve(unit, fault, content) {
        Served::Done => {
            let per_unit = vm.layout().pages_per_unit();
            let planned = vm.planned.as_ref().is_some_and(|planned| planned.get(unit));
            let pages = (unit * per_unit, per_unit);
            vm.restore.fault(fault.class, pages, fault.since.elapsed(), planned);
        }
        Served::Again => {
            vm.restore.again.fetch_add(1, Ordering::Relaxed);
            engine.retry_soon(vm.restore.id);
        }
        Served::Gone => {
            // The process is ending, or it took this memory away; in both cases nobody waits here.
            if !vm.has_memory() {
                vm.restore.finish(End::VmmEnded);
            }
        }
        Served::Failed(what, errno) => {
            let error = std::io::Error::from_raw_os_error(errno);
            vm.kill(Cause::Kernel, &format!("{what} ({error})"));
        }
    }
}

/// Frames that a unit waits for.
struct Collect {
    engine: Arc<Engine>,
    vm: Arc<Vm>,
    unit: u64,
    missing: AtomicUsize,
    frames: Mutex<Vec<(FrameIndex, Frame)>>,
}

fn fetch(
    engine: &Arc<Engine>,
    vm: &Arc<Vm>,
    unit: u64,
    fault: PendingFault,
    frames: &[FrameIndex],
) {
    vm.memory.await_bytes(unit, fault);
    let collect = Collect {
        engine: engine.clone(),
        vm: vm.clone(),
        unit,
        missing: AtomicUsize::new(frames.len()),
        frames: Mutex::default(),
    };
    vm.snapshot.fetch(frames, Urgency::Demand, move |index, frame| {
        collect.vm.guarded(|| arrived(&collect, index, frame));
    });
}

/// A frame is there, or never will be.
fn arrived(collect: &Collect, index: FrameIndex, frame: Result<Frame, Error>) {
    let (vm, unit) = (&collect.vm, collect.unit);
    match frame {
        Ok(frame) => collect.frames.lock().push((index, frame)),
        Err(error) => {
            // Given back meanwhile: zeros need no store.
            match vm.memory.bytes_came(unit) {
                Some(fault) if vm.memory.is_removed(unit) => {
                    settle(&collect.engine, vm, unit, fault, Content::Zero);
                }
                Some(_) => vm.kill(Cause::Unservable, &format!("a page cannot be had: {error}")),
                // Another of its frames failed before.
                None => {}
            }
            return;
        }
    }
    if collect.missing.fetch_sub(1, Ordering::AcqRel) != 1 {
        return;
    }
    let frames = std::mem::take(&mut *collect.frames.lock());
    let find = |wanted: FrameIndex| {
        frames.iter().find(|(index, _)| *index == wanted).map(|(_, frame)| frame.clone())
    };
    let bytes = vm.assemble(unit, find);
    let Some(fault) = vm.memory.bytes_came(unit) else { return };
    match bytes {
        Some(bytes) => settle(&collect.engine, vm, unit, fault, Content::Bytes(&bytes)),
        None => vm.kill(Cause::Bug, "a page's frames do not cover it; this is a bug"),
    }
}
