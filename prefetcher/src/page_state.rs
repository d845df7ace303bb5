//! What happened to each unit of a VM's memory: installed by us, removed by the guest.
//!
//! Two bitmaps and the rule between them: what was removed never gets snapshot bytes again. The
//! caller keeps the lock: marking a removal excludes every install (see [`crate::vm`]).

use std::sync::atomic::{AtomicU64, Ordering};

/// Bits that may be set by several threads at once.
#[derive(Debug)]
pub(crate) struct Bitmap(Vec<AtomicU64>);

impl Bitmap {
    pub(crate) fn new(bits: u64) -> Self {
        Self((0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    pub(crate) fn get(&self, bit: u64) -> bool {
        let word = self.0.get(usize::try_from(bit / 64).unwrap_or(usize::MAX));
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (bit % 64) & 1 == 1)
    }

    /// Sets a bit; whether it was clear.
    pub(crate) fn set(&self, bit: u64) -> bool {
        let mask = 1 << (bit % 64);
        let word = self.0.get(usize::try_from(bit / 64).unwrap_or(usize::MAX));
        word.is_some_and(|word| word.fetch_or(mask, Ordering::Relaxed) & mask == 0)
    }

    fn clear(&self, bit: u64) {
        if let Some(word) = self.0.get(usize::try_from(bit / 64).unwrap_or(usize::MAX)) {
            word.fetch_and(!(1 << (bit % 64)), Ordering::Relaxed);
        }
    }
}

/// The two bitmaps of a VM.
#[derive(Debug)]
pub(crate) struct PageState {
    installed: Bitmap,
    removed: Bitmap,
}

impl PageState {
    pub(crate) fn new(units: u64) -> Self {
        Self { installed: Bitmap::new(units), removed: Bitmap::new(units) }
    }

    /// Whether the unit must be zeros from now on.
    pub(crate) fn is_removed(&self, unit: u64) -> bool {
        self.removed.get(unit)
    }

    /// Whether a unit may be installed ahead of a fault.
    pub(crate) fn is_wanted(&self, unit: u64) -> bool {
        !self.removed.get(unit) && !self.installed.get(unit)
    }

    /// The first run of wanted units in `first .. first + count`, of at most `longest`.
    pub(crate) fn wanted_run(&self, first: u64, count: u64, longest: u64) -> Option<(u64, u64)> {
        let start = (first..first + count).find(|unit| self.is_wanted(*unit))?;
        let end = (start..first + count).take(usize::try_from(longest).unwrap_or(usize::MAX));
        let length = end.take_while(|unit| self.is_wanted(*unit)).count() as u64;
        Some((start, length))
    }

    /// The kernel has these units now. Called only after the ioctl said so.
    pub(crate) fn mark_installed(&self, first: u64, count: u64) {
        for unit in first..first + count {
            self.installed.set(unit);
        }
    }

    /// The guest gave these units back.
    pub(crate) fn mark_removed(&mut self, first: u64, count: u64) {
        for unit in first..first + count {
            self.removed.set(unit);
            self.installed.clear(unit);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Default)]
    struct Model {
        installed: bool,
        removed: bool,
    }

    proptest! {
        #[test]
        fn any_order_of_events_agrees_with_the_model(
            events in prop::collection::vec((0..3u8, 0..200u64, 1..40u64), 0..200)
        ) {
            let mut state = PageState::new(256);
            let mut model: HashMap<u64, Model> = HashMap::new();
            for (kind, first, count) in events {
                match kind {
                    // A prefetch: only what is wanted.
                    0 => {
                        let (mut at, end) = (first, first + count);
                        while let Some((start, length)) = state.wanted_run(at, end - at, 7) {
                            prop_assert!((1..=7).contains(&length));
                            for unit in start..start + length {
                                let unit = model.entry(unit).or_default();
                                prop_assert!(!unit.installed && !unit.removed);
                                unit.installed = true;
                            }
                            state.mark_installed(start, length);
                            at = start + length;
                        }
                        for unit in first..end {
                            let unit = model.entry(unit).or_default();
                            prop_assert!(unit.installed || unit.removed);
                        }
                    }
                    // A fault: installs whatever the state.
                    1 => {
                        model.entry(first).or_default().installed = true;
                        state.mark_installed(first, 1);
                    }
                    _ => {
                        for unit in first..first + count {
                            *model.entry(unit).or_default() = Model { installed: false, removed: true };
                        }
                        state.mark_removed(first, count);
                    }
                }
                for unit in 0..256 {
                    let expected = model.get(&unit).copied().unwrap_or_default();
                    prop_assert_eq!(state.is_removed(unit), expected.removed);
                    prop_assert_eq!(state.is_wanted(unit), !expected.removed && !expected.installed);
                }
            }
        }
    }
}
