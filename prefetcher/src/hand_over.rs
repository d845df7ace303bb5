//! Giving a VM the rest of its memory, so that it can go on without us.

use std::collections::{BTreeSet, HashMap};
use std::sync::mpsc;
use std::time::Instant;

use reap_store::{Frame, FrameIndex, Source, Urgency};

use crate::uffd::Outcome;
use crate::vm::Vm;

/// Frames that are fetched at once.
const FRAMES_AT_ONCE: usize = 64;

/// Installs everything that is missing, so that the VM needs us no more. Waits. An error says why
/// it cannot be.
pub(crate) fn populate(vm: &Vm, deadline: Instant) -> Result<(), String> {
    for (first, count) in vm.layout().units_in(0, u64::MAX) {
        let mut unit = first;
        while unit < first + count {
            if vm.restore.has_ended() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err("it did not get all its memory in time".into());
            }
            unit = populate_some(vm, unit, first + count, deadline)?;
        }
    }
    Ok(())
}

/// Installs the units from `unit` on whose frames are one batch; answers with the unit after them.
fn populate_some(vm: &Vm, unit: u64, end: u64, deadline: Instant) -> Result<u64, String> {
    let mut frames = BTreeSet::new();
    let mut next = unit;
    while next < end && frames.len() < FRAMES_AT_ONCE {
        if vm.memory.is_wanted(next) {
            frames.extend(vm.frames_of(next));
        }
        next += 1;
    }
    let wanted: Vec<FrameIndex> = frames.into_iter().collect();
    let (sender, receiver) = mpsc::channel();
    // A receiver that is gone has had its error.
    vm.snapshot.fetch(&wanted, Urgency::Demand, move |index, frame| {
        sender.send((index, frame)).unwrap_or_default();
    });
    let mut found = HashMap::new();
    while found.len() < wanted.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        let (index, frame) =
            receiver.recv_timeout(left).map_err(|_| "a page did not arrive in time".to_owned())?;
        found.insert(index, frame.map_err(|error| format!("a page cannot be had: {error}"))?);
    }
    for unit in unit..next {
        while vm.memory.is_wanted(unit) && install_one(vm, unit, &found)? == Installed::NotYet {
            if Instant::now() > deadline {
                return Err("it did not get all its memory in time".into());
            }
        }
    }
    Ok(next)
}

/// What became of a unit.
#[derive(PartialEq, Eq)]
enum Installed {
    /// It is there, or the VMM has unmapped it: then nobody can read it.
    Done,
    /// The kernel keeps saying `Again`.
    NotYet,
}

fn install_one(
    vm: &Vm,
    unit: u64,
    found: &HashMap<FrameIndex, Frame>,
) -> Result<Installed, String> {
    let per_unit = vm.layout().pages_per_unit();
    let one_page = match vm.snapshot.extent(vm.file, unit * per_unit).map(|extent| extent.source) {
        Some(Source::Frame { frame, position }) if per_unit == 1 => Some((frame, position)),
        _ => None,
    };
    let ahead = match one_page.and_then(|(frame, position)| Some((found.get(&frame)?, position))) {
        Some((frame, position)) => vm.install_ahead(unit, 1, Some(frame.pages(position, 1))),
        None if vm.frames_of(unit).is_empty() => vm.install_ahead(unit, 1, None),
        None => {
            let assembled = vm.assemble(unit, |index| found.get(&index).cloned());
            // A unit that became wanted after its batch was put together cannot be: units only
            // stop being wanted.
            let bytes = assembled.ok_or("a page's frames do not cover it; this is a bug")?;
            vm.install_ahead(unit, 1, Some(&bytes))
        }
    };
    match ahead.left {
        None | Some(Outcome::NotMapped) => Ok(Installed::Done),
        Some(Outcome::Again) if !vm.restore.has_ended() => Ok(Installed::NotYet),
        Some(Outcome::Again) => Err("the VM ended".into()),
        Some(Outcome::Gone) => Err("the VM ended".into()),
        Some(other) => Err(format!("the kernel refused a page ({other:?})")),
    }
}
