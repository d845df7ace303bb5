//! How long faults took: by class, for a restore and for all of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;

use crate::timeline::EventKind;

/// How a fault was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultClass {
    /// From a frame in memory.
    Cached,
    /// A frame had to be fetched.
    Fetched,
    /// The page is zero in the snapshot.
    Zero,
    /// The guest had given the page back.
    Removed,
}

impl FaultClass {
    pub(crate) fn event(self) -> EventKind {
        match self {
            Self::Cached => EventKind::FaultCached,
            Self::Fetched => EventKind::FaultFetched,
            Self::Zero => EventKind::FaultZero,
            Self::Removed => EventKind::FaultRemoved,
        }
    }
}

/// Their names, in their order.
pub const FAULT_CLASSES: [&str; 4] = ["cached", "fetched", "zero", "removed"];

/// Four buckets to each doubling of microseconds, up to 2^26 us: percentiles within a fifth.
const BUCKETS: usize = 4 * 27;

/// Latencies of one class of faults.
#[derive(Debug)]
pub(crate) struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
    longest_us: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        let buckets = std::array::from_fn(|_| AtomicU64::new(0));
        Self { buckets, sum_us: AtomicU64::new(0), longest_us: AtomicU64::new(0) }
    }
}

/// A histogram for people and scripts, in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Latency {
    /// How many faults.
    pub count: u64,
    /// Half were served within.
    pub p50_us: u64,
    /// 99 of 100 were served within.
    pub p99_us: u64,
    /// The slowest.
    pub max_us: u64,
}

impl Histogram {
    pub(crate) fn add(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX).max(1);
        let doubling = us.ilog2() as usize;
        let quarter = if doubling < 2 { 0 } else { (us >> (doubling - 2) & 3) as usize };
        let bucket = (4 * doubling + quarter).min(BUCKETS - 1);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
        self.longest_us.fetch_max(us, Ordering::Relaxed);
    }

    pub(crate) fn summary(&self) -> Latency {
        let counts: Vec<u64> =
            self.buckets.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        let max_us = self.longest_us.load(Ordering::Relaxed);
        let quantile = |part: f64| {
            let rank = (count as f64 * part).ceil().max(1.0);
            let mut seen = 0;
            let bucket = counts.iter().position(|in_bucket| {
                seen += in_bucket;
                seen as f64 >= rank
            });
            bucket.map_or(0, |bucket| upper_us(bucket).min(max_us))
        };
        Latency { count, p50_us: quantile(0.5), p99_us: quantile(0.99), max_us }
    }
}

/// The longest time that falls into a bucket.
fn upper_us(bucket: usize) -> u64 {
    let (doubling, quarter) = (bucket / 4, (bucket % 4) as u64);
    if doubling < 2 { (2 << doubling) - 1 } else { ((5 + quarter) << (doubling - 2)) - 1 }
}

/// Latencies of one class of faults, of many restores.
#[derive(Clone, Debug)]
pub struct LatencyTotal {
    buckets: [u64; BUCKETS],
    sum_us: u64,
}

impl Default for LatencyTotal {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], sum_us: 0 }
    }
}

impl LatencyTotal {
    pub(crate) fn add(&mut self, histogram: &Histogram) {
        for (sum, count) in self.buckets.iter_mut().zip(&histogram.buckets) {
            *sum += count.load(Ordering::Relaxed);
        }
        self.sum_us += histogram.sum_us.load(Ordering::Relaxed);
    }

    /// How many faults.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// What they took together.
    pub fn sum(&self) -> Duration {
        Duration::from_micros(self.sum_us)
    }

    /// For each doubling of microseconds, the longest time that falls into it and how many faults did.
    pub fn doublings(&self) -> impl Iterator<Item = (Duration, u64)> {
        let counts = self.buckets.chunks(4).map(|quarters| quarters.iter().sum());
        (1..).zip(counts).map(|(doubling, count)| (Duration::from_micros(1 << doubling), count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_fifth() {
        let histogram = Histogram::default();
        for us in 1..=1000 {
            histogram.add(Duration::from_micros(us));
        }
        let summary = histogram.summary();
        assert_eq!((summary.count, summary.max_us), (1000, 1000));
        assert!((500..=600).contains(&summary.p50_us), "{summary:?}");
        assert!((990..=1000).contains(&summary.p99_us), "{summary:?}");
        assert_eq!(Histogram::default().summary().p99_us, 0);
    }

    #[test]
    fn totals_have_every_fault_once_under_a_time_that_it_did_not_exceed() {
        let (mut total, histogram) = (LatencyTotal::default(), Histogram::default());
        for us in [1, 2, 3, 4, 1000, 1024, 100_000_000] {
            histogram.add(Duration::from_micros(us));
        }
        total.add(&histogram);
        total.add(&histogram);
        assert_eq!((total.count(), total.sum()), (14, Duration::from_micros(200_004_068)));
        let counted: Vec<_> = total.doublings().filter(|(_, count)| *count > 0).collect();
        let us = |us| Duration::from_micros(us);
        let most = us(1 << 27);
        assert_eq!(
            counted,
            [(us(2), 2), (us(4), 4), (us(8), 2), (us(1024), 2), (us(2048), 2), (most, 2)]
        );
    }
}
