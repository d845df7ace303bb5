//! How well a working set fitted a restore. Pure.

use serde::Serialize;

const PAGE_BYTES: f64 = reap_store::PAGE_SIZE as f64;

/// What was counted, in pages of 4 KiB; until the restore settled.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// Pages of the set, and how many of them have bytes.
    pub(crate) planned: u64,
    pub(crate) planned_data: u64,
    /// Installed before they were touched, and how many of them have bytes.
    pub(crate) installed: u64,
    pub(crate) installed_data: u64,
    /// Faults on pages of the set.
    pub(crate) touched: u64,
    pub(crate) touched_data: u64,
    /// Faults on other pages, zeros too.
    pub(crate) missed: u64,
    /// The part of the set that restores touch on average, by its weights.
    pub(crate) expected: f64,
    /// Nothing was installed, so all touches were faults.
    pub(crate) sampled: bool,
}

/// How well a working set fitted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fit {
    /// Part of the prefetched pages that was touched, 0 to 1.
    pub precision: f64,
    /// Part of the touched pages that was prefetched before it was touched, 0 to 1.
    pub recall: f64,
    /// Bytes that were prefetched and not touched.
    pub wasted_bytes: u64,
    /// Installed pages are touched invisibly: precision is what the set's weights expect, and the other
    /// two follow from it. In mode `sample` all touches are seen, and the figures are what installing
    /// would have given.
    pub estimated: bool,
}

impl Fit {
    /// `None` where there was no set.
    pub(crate) fn new(counts: &Counts) -> Option<Self> {
        if counts.planned == 0 {
            return None;
        }
        let share = |part: f64, all: f64| if all > 0.0 { part / all } else { 1.0 };
        let missed = counts.missed as f64;
        let (precision, recall, wasted_pages) = if counts.sampled {
            let hits = counts.touched as f64;
            let wasted = counts.planned_data.saturating_sub(counts.touched_data);
            (share(hits, counts.planned as f64), share(hits, hits + missed), wasted as f64)
        } else {
            let precision = counts.expected.clamp(0.0, 1.0);
            let hits = counts.installed as f64 * precision;
            let late = counts.touched as f64;
            let wasted = counts.installed_data as f64 * (1.0 - precision);
            (precision, share(hits, hits + late + missed), wasted)
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "not negative, and no file has 2^52 bytes"
        )]
        let wasted_bytes = (wasted_pages * PAGE_BYTES).round() as u64;
        Some(Self { precision, recall, wasted_bytes, estimated: !counts.sampled })
    }
}

impl std::fmt::Display for Fit {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = if self.estimated { "estimated" } else { "seen" };
        let (precision, recall) = (self.precision * 100.0, self.recall * 100.0);
        let wasted = self.wasted_bytes >> 10;
        write!(
            out,
            "precision {precision:.1} %, recall {recall:.1} %, {wasted} KiB wasted ({kind})"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_seen_is_counted_and_what_was_not_is_estimated() {
        let counts = Counts {
            planned: 100,
            planned_data: 80,
            touched: 90,
            touched_data: 76,
            missed: 10,
            expected: 0.5,
            sampled: true,
            ..Counts::default()
        };
        let fit = Fit::new(&counts).expect("there was a set");
        assert_eq!((fit.precision, fit.recall, fit.wasted_bytes), (0.9, 0.9, 4 * 4096));
        assert!(!fit.estimated);
        let counts = Counts {
            planned: 100,
            planned_data: 100,
            installed: 96,
            installed_data: 96,
            touched: 4,
            missed: 20,
            expected: 0.75,
            ..Counts::default()
        };
        let fit = Fit::new(&counts).expect("there was a set");
        assert_eq!((fit.precision, fit.recall, fit.wasted_bytes), (0.75, 0.75, 24 * 4096));
        assert!(fit.estimated);
        assert_eq!(Fit::new(&Counts::default()), None);
    }
}
