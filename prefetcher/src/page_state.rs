//! What is known about every guest page of a VM: installed, removed, or neither.
//!
//! The whole state of a VM's memory is these two bitmaps; a successor process can serve on from
//! them. All decisions that keep invariant 8 ("after a remove event, zeros") are made here.
//!
//! Bits are atomic so that several threads may mark *different facts at once* under the shared
//! side of the VM's lock; what orders them is that lock, hence `Relaxed`.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// A fixed number of bits, all clear at first.
pub(crate) struct Bitmap {
    words: Box<[AtomicU64]>,
}

impl Bitmap {
    /// `bits` clear bits.
    pub(crate) fn new(bits: u64) -> Self {
        let words = usize::try_from(bits.div_ceil(64)).expect("bitmaps are bounded by the regions");
        Self { words: (0..words).map(|_| AtomicU64::new(0)).collect() }
    }

    /// Whether `bit` is set.
    pub(crate) fn contains(&self, bit: u64) -> bool {
        self.word(bit / 64) >> (bit % 64) & 1 == 1
    }

    /// Sets a range; answers how many bits were clear before.
    pub(crate) fn set(&self, range: Range<u64>) -> u64 {
        words_of(range)
            .map(|(word, mask)| {
                let before = self.words[index(word)].fetch_or(mask, Relaxed);
                u64::from((mask & !before).count_ones())
            })
            .sum()
    }

    /// Clears a range.
    pub(crate) fn clear(&self, range: Range<u64>) {
        for (word, mask) in words_of(range) {
            self.words[index(word)].fetch_and(!mask, Relaxed);
        }
    }

    fn word(&self, word: u64) -> u64 {
        self.words[index(word)].load(Relaxed)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a word index of a bitmap that fits in memory")]
const fn index(word: u64) -> usize {
    word as usize
}

/// The words that a range of bits touches, with the touched bits of each.
fn words_of(range: Range<u64>) -> impl Iterator<Item = (u64, u64)> {
    let Range { start, end } = range;
    let words = if start < end { start / 64..(end - 1) / 64 + 1 } else { 0..0 };
    words.map(move |word| {
        let low = start.saturating_sub(word * 64);
        let high = (end - word * 64).min(64);
        (word, (u64::MAX << low) & (u64::MAX >> (64 - high)))
    })
}

/// What a missing page has to be filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// What the snapshot holds.
    Snapshot,
    /// Zeros, because the VMM gave the page back.
    Zeros,
}

/// The pages of one VM.
pub(crate) struct PageState {
    page_count: u64,
    /// Filled by us since the last remove event.
    installed: Bitmap,
    /// Given back by the VMM at least once. Never cleared: the kernel drops the pages only *after*
    /// we read the event, so a page that is filled in between may be missing again, and must then
    /// be zero again.
    removed: Bitmap,
}

impl PageState {
    /// All pages missing.
    pub(crate) fn new(page_count: u64) -> Self {
        Self { page_count, installed: Bitmap::new(page_count), removed: Bitmap::new(page_count) }
    }

    /// What a fault on `page` gets, whatever else is known about the page.
    pub(crate) fn content(&self, page: u64) -> Content {
        if self.removed.contains(page) { Content::Zeros } else { Content::Snapshot }
    }

    /// Whether nobody has filled or removed `page` so far.
    pub(crate) fn is_untouched(&self, page: u64) -> bool {
        !self.installed.contains(page) && !self.removed.contains(page)
    }

    /// The first run of untouched pages in `range`: what a prefetch may install there.
    pub(crate) fn next_untouched(&self, range: Range<u64>) -> Option<Range<u64>> {
        let end = range.end.min(self.page_count);
        let start = self.find(range.start..end, false)?;
        let stop = self.find(start..end, true).unwrap_or(end);
        Some(start..stop)
    }

    /// The pages of `range` hold what they should. Call it after the kernel said so, never before:
    /// a page marked too early is never installed.
    pub(crate) fn mark_installed(&self, range: Range<u64>) {
        self.installed.set(range);
    }

    /// The VMM gave `range` back; answers how many pages it had not given back before. Needs the
    /// exclusive side of the VM's lock, as `&mut` says.
    pub(crate) fn mark_removed(&mut self, range: Range<u64>) -> u64 {
        self.installed.clear(range.clone());
        self.removed.set(range)
    }

    /// The first page of `range` that is touched, or is not.
    fn find(&self, range: Range<u64>, touched: bool) -> Option<u64> {
        words_of(range).find_map(|(word, mask)| {
            let taken = self.installed.word(word) | self.removed.word(word);
            let found = mask & if touched { taken } else { !taken };
            (found != 0).then(|| word * 64 + u64::from(found.trailing_zeros()))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 200;

    #[derive(Clone, Debug)]
    enum Step {
        Install(Range<u64>),
        Remove(Range<u64>),
        Ask(Range<u64>),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..PAGES, 0..PAGES).prop_map(|(a, b)| a.min(b)..a.max(b));
        (0..3, range).prop_map(|(kind, range)| match kind {
            0 => Step::Install(range),
            1 => Step::Remove(range),
            _ => Step::Ask(range),
        })
    }

    /// The reference model: two plain facts for each page.
    #[derive(Clone, Copy, Default)]
    struct Model {
        installed: bool,
        removed: bool,
    }

    proptest! {
        #[test]
        fn page_state_follows_the_model(steps in proptest::collection::vec(step(), 1..60)) {
            let mut state = PageState::new(PAGES);
            let mut model = [Model::default(); PAGES as usize];
            for step in steps {
                match step {
                    Step::Install(range) => {
                        state.mark_installed(range.clone());
                        range.for_each(|page| model[page as usize].installed = true);
                    }
                    Step::Remove(range) => {
                        let fresh = range.clone().filter(|page| !model[*page as usize].removed).count();
                        prop_assert_eq!(state.mark_removed(range.clone()), fresh as u64);
                        range.for_each(|page| {
                            model[page as usize] = Model { installed: false, removed: true };
                        });
                    }
                    Step::Ask(range) => {
                        let free = |page: &u64| {
                            let Model { installed, removed } = model[*page as usize];
                            !installed && !removed
                        };
                        let start = range.clone().find(free);
                        let expected = start.map(|start| {
                            start..(start..range.end).find(|page| !free(page)).unwrap_or(range.end)
                        });
                        prop_assert_eq!(state.next_untouched(range), expected);
                    }
                }
                for page in 0..PAGES {
                    let zeros = model[page as usize].removed;
                    prop_assert_eq!(state.content(page) == Content::Zeros, zeros);
                }
            }
        }
    }

    #[test]
    fn removed_page_stays_zero_after_it_was_filled() {
        let mut state = PageState::new(64);
        state.mark_removed(3..4);
        state.mark_installed(3..4);
        assert_eq!(state.content(3), Content::Zeros);
        assert_eq!(state.next_untouched(3..4), None);
    }

    #[test]
    fn bits_beyond_the_last_page_are_never_offered() {
        let state = PageState::new(70);
        assert_eq!(state.next_untouched(0..1000), Some(0..70));
        assert_eq!(state.next_untouched(70..1000), None);
    }

    #[test]
    fn alternating_pages_cost_no_more_than_bits() {
        let mut state = PageState::new(1 << 18);
        for page in (0..1 << 18).step_by(2) {
            state.mark_removed(page..page + 1);
        }
        assert_eq!(state.next_untouched(0..1 << 18), Some(1..2));
    }
}
