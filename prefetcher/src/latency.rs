//! A small histogram of latencies: fixed buckets, no lock, at most one eighth off.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

/// Buckets for each doubling.
const STEPS: u64 = 8;
/// Doublings, from 1 ns to 2^37 ns (137 s, above every deadline); longer ones count as that.
const DOUBLINGS: u64 = 37;
const BUCKETS: usize = (STEPS * DOUBLINGS) as usize;

/// Latencies of one kind.
pub(crate) struct Latencies {
    buckets: Box<[AtomicU32]>,
    max_ns: AtomicU64,
}

/// What a set of latencies looked like, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LatencyReport {
    /// How many there were.
    pub count: u64,
    /// Half of them took no longer (to within an eighth).
    pub p50_us: f64,
    /// 99 of 100 took no longer (to within an eighth).
    pub p99_us: f64,
    /// The longest.
    pub max_us: f64,
}

impl Latencies {
    /// None so far.
    pub(crate) fn new() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU32::new(0)).collect(),
            max_ns: AtomicU64::new(0),
        }
    }

    /// Counts one.
    pub(crate) fn add(&self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(ns)].fetch_add(1, Relaxed);
        self.max_ns.fetch_max(ns, Relaxed);
    }

    /// The figures so far.
    pub(crate) fn report(&self) -> LatencyReport {
        let counts: Vec<u64> =
            self.buckets.iter().map(|bucket| u64::from(bucket.load(Relaxed))).collect();
        let count: u64 = counts.iter().sum();
        let max_ns = self.max_ns.load(Relaxed);
        let at = |percent: u64| {
            let wanted = (count * percent).div_ceil(100);
            let mut seen = 0;
            let found = counts.iter().position(|bucket| {
                seen += bucket;
                seen >= wanted && seen > 0
            });
            microseconds(found.map_or(0, upper_bound).min(max_ns))
        };
        LatencyReport { count, p50_us: at(50), p99_us: at(99), max_us: microseconds(max_ns) }
    }
}

fn bucket(ns: u64) -> usize {
    if ns < STEPS {
        return usize::try_from(ns).unwrap_or(0);
    }
    let doubling = u64::from(ns.ilog2()) - u64::from(STEPS.ilog2());
    let step = (ns >> doubling) - STEPS;
    usize::try_from((doubling + 1) * STEPS + step).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The largest value of a bucket.
fn upper_bound(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    if bucket < STEPS {
        return bucket;
    }
    let doubling = bucket / STEPS - 1;
    ((STEPS + bucket % STEPS + 1) << doubling) - 1
}

fn microseconds(ns: u64) -> f64 {
    Duration::from_nanos(ns).as_secs_f64() * 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_an_eighth_wide_and_without_gaps() {
        let mut last = 0;
        for ns in 1..100_000u64 {
            let at = bucket(ns);
            assert!(at == last || at == last + 1, "{ns}");
            assert!(upper_bound(at) >= ns && upper_bound(at) <= ns + ns / 8, "{ns}");
            last = at;
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_of_known_values() {
        let latencies = Latencies::new();
        assert_eq!(latencies.report(), LatencyReport::default());
        for us in 1..=100 {
            latencies.add(Duration::from_micros(us));
        }
        let report = latencies.report();
        assert_eq!(report.count, 100);
        assert!((50.0..57.0).contains(&report.p50_us), "{report:?}");
        assert!((99.0..=100.0).contains(&report.p99_us), "{report:?}");
        assert!((report.max_us - 100.0).abs() < 0.01);
    }
}
