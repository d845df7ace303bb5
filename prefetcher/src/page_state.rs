//! What happened to each unit of a VM's memory: installed by us, removed by the guest.
//!
//! Two bitmaps and the rule between them: what was removed never gets snapshot bytes again. The
//! caller keeps the lock: marking a removal excludes every install (see [`crate::vm`]).

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Words of a chunk: 4,096 bits, 16 MiB of guest memory in 4 KiB pages.
const CHUNK_WORDS: usize = 64;
const CHUNK_BITS: u64 = 64 * CHUNK_WORDS as u64;

type Chunk = [AtomicU64; CHUNK_WORDS];

/// Bits that may be set by several threads at once.
///
/// In chunks that are made when a bit in them is set: a VM with 64 GiB of memory of which it touches
/// little costs little (64 KiB, and 512 bytes a chunk).
#[derive(Debug)]
pub(crate) struct Bitmap(Box<[OnceLock<Box<Chunk>>]>);

impl Bitmap {
    pub(crate) fn new(bits: u64) -> Self {
        Self((0..bits.div_ceil(CHUNK_BITS)).map(|_| OnceLock::new()).collect())
    }

    fn slot(&self, bit: u64) -> Option<&OnceLock<Box<Chunk>>> {
        self.0.get(usize::try_from(bit / CHUNK_BITS).ok()?)
    }

    pub(crate) fn get(&self, bit: u64) -> bool {
        let chunk = self.slot(bit).and_then(OnceLock::get);
        chunk.is_some_and(|chunk| word(chunk, bit).load(Ordering::Relaxed) >> (bit % 64) & 1 == 1)
    }

    /// Sets a bit; whether it was clear.
    pub(crate) fn set(&self, bit: u64) -> bool {
        let mask = 1 << (bit % 64);
        let chunk = self.slot(bit).map(|slot| slot.get_or_init(empty_chunk));
        chunk.is_some_and(|chunk| word(chunk, bit).fetch_or(mask, Ordering::Relaxed) & mask == 0)
    }

    /// Sets neighbouring bits, a word at a time.
    fn set_range(&self, first: u64, count: u64) {
        for (bit, mask) in masks(first, count) {
            if let Some(slot) = self.slot(bit) {
                word(slot.get_or_init(empty_chunk), bit).fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    fn clear_range(&self, first: u64, count: u64) {
        for (bit, mask) in masks(first, count) {
            if let Some(chunk) = self.slot(bit).and_then(OnceLock::get) {
                word(chunk, bit).fetch_and(!mask, Ordering::Relaxed);
            }
        }
    }
}

fn empty_chunk() -> Box<Chunk> {
    Box::new(std::array::from_fn(|_| AtomicU64::new(0)))
}

fn word(chunk: &Chunk, bit: u64) -> &AtomicU64 {
    &chunk[usize::try_from(bit % CHUNK_BITS / 64).unwrap_or_default()]
}

/// The words that a range of bits touches, each as a bit of it and a mask.
fn masks(first: u64, count: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = first + count;
    let mut bit = first;
    std::iter::from_fn(move || {
        let length = (64 - bit % 64).min(end.checked_sub(bit)?);
        let mask = u64::MAX.checked_shr(u32::try_from(64 - length).ok()?)? << (bit % 64);
        let this = bit;
        bit += length;
        Some((this, mask))
    })
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
        self.installed.set_range(first, count);
    }

    /// The guest gave these units back.
    pub(crate) fn mark_removed(&mut self, first: u64, count: u64) {
        self.removed.set_range(first, count);
        self.installed.clear_range(first, count);
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
            // Around the end of the first chunk.
            events in prop::collection::vec((0..3u8, 4000..4200u64, 1..200u64), 0..200)
        ) {
            let mut state = PageState::new(4400);
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
                for unit in 3990..4400 {
                    let expected = model.get(&unit).copied().unwrap_or_default();
                    prop_assert_eq!(state.is_removed(unit), expected.removed);
                    prop_assert_eq!(state.is_wanted(unit), !expected.removed && !expected.installed);
                }
            }
        }
    }

    #[test]
    fn much_memory_of_which_little_is_touched_costs_little() {
        let mut state = PageState::new(64 << 18);
        state.mark_installed(0, 1);
        state.mark_installed((64 << 18) - 1, 1);
        state.mark_removed(1 << 20, 4096);
        let chunks = |bits: &Bitmap| bits.0.iter().filter(|chunk| chunk.get().is_some()).count();
        assert_eq!((chunks(&state.installed), chunks(&state.removed)), (2, 1));
        assert!(state.is_removed((1 << 20) + 4095) && !state.is_removed((1 << 20) + 4096));
    }
}
