//! Pages that no restore was seen to touch, amid pages that were.
//!
//! Where a guest touches most pages of a region, as of a large array of numbers, another input touches others of the
//! same region. They are taken along: see `docs/decisions/0009-neighbours.md` for what it costs and brings.

use std::collections::BTreeMap;

use super::learning::{LearnedPage, PageKey};

/// How far on either side counts.
const REACH: u64 = 32;
/// So many of the pages within reach must have been touched: half.
const TOUCHED: usize = 32;

/// The untouched pages of dense regions, each with the time of the later of the touched pages before and after it: with
/// that one it is packed, and makes one run of two. By file and page, at most `most`.
pub(super) fn neighbours(
    touched: &BTreeMap<PageKey, LearnedPage>,
    most: usize,
) -> BTreeMap<PageKey, u32> {
    let pages: Vec<_> = touched.iter().map(|(key, page)| (*key, page.first_touch_us)).collect();
    let mut found = BTreeMap::new();
    // Those within reach of the candidate, which only goes up.
    let (mut low, mut high) = (0, 0);
    for pair in pages.windows(2) {
        let [((file, before), before_us), ((next_file, after), after_us)] = *pair else { continue };
        if file != next_file || after - before > REACH {
            continue;
        }
        for page in before + 1..after {
            let from = (file, page.saturating_sub(REACH));
            let to = (file, page + REACH);
            while pages[low].0 < from {
                low += 1;
            }
            while high < pages.len() && pages[high].0 <= to {
                high += 1;
            }
            if high - low >= TOUCHED {
                if found.len() == most {
                    return found;
                }
                found.insert((file, page), before_us.max(after_us));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touched(pages: impl Iterator<Item = u64>) -> BTreeMap<PageKey, LearnedPage> {
        let page = |number: u64| LearnedPage {
            first_touch_us: u32::try_from(number).expect("few pages"),
            weight: 1.0,
            zero: false,
            touched: true,
        };
        pages.map(|number| ((0, number), page(number))).collect()
    }

    #[test]
    fn holes_of_a_dense_region_are_taken_and_those_of_a_sparse_one_are_not() {
        let dense = touched((0..300).filter(|page| page % 3 != 0));
        let found = neighbours(&dense, 1000);
        let missing: Vec<_> = found.keys().map(|(_, page)| *page).collect();
        assert!((33..267).filter(|page| page % 3 == 0).all(|page| missing.contains(&page)));
        assert!(missing.iter().all(|page| page % 3 == 0));
        assert_eq!(found[&(0, 99)], 100, "with the later one");
        let sparse = touched((0..300).filter(|page| page % 3 == 0));
        assert_eq!(neighbours(&sparse, 1000), BTreeMap::new());
    }

    #[test]
    fn files_do_not_mix_and_there_are_no_more_than_asked_for() {
        let mut two = touched((0..31).map(|page| page * 2));
        let other: Vec<_> = two.iter().map(|((_, page), of)| ((1, *page), *of)).collect();
        two.extend(other);
        assert_eq!(neighbours(&two, 1000), BTreeMap::new(), "31 of 62 pages in each");
        let dense = touched((0..300).filter(|page| page % 3 != 0));
        assert_eq!(neighbours(&dense, 7).len(), 7);
    }
}
