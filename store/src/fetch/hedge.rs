//! When a demand request that is not answered is asked a second time, on another connection. Decides
//! and does no I/O; times are given to it.
//!
//! A store answers most requests soon and a few very late; whoever waits for many pages waits for the
//! late ones. A second request after the time by which 95 % are answered turns that wait into a short
//! one, for few requests more. How few is bounded: a store that is slow as a whole must not be asked
//! twice for everything.

use std::collections::VecDeque;
use std::time::Duration;

/// Answers that the 95th percentile is taken from, the last ones.
const REMEMBERED: usize = 256;
/// With fewer answers than this, nothing is known.
const ENOUGH: usize = 20;
/// Before enough is known: more than a healthy store needs, less than a try.
const UNKNOWN: Duration = Duration::from_millis(500);
/// Never earlier: on a fast network the 95th percentile is noise of a millisecond.
const EARLIEST: Duration = Duration::from_millis(10);
/// Never later than half a try.
const LATEST: Duration = Duration::from_secs(1);
/// Of the percentile, in hundredths. At the percentile itself the requests that are merely a little late
/// would use up the budget, which is as large as they are many.
const MARGIN: u32 = 125;
/// Second requests that each demand request earns.
const EARNED: f64 = 0.05;
/// Second requests that may be saved up.
const SAVED: f64 = 10.0;

/// What hedging goes by.
#[derive(Debug)]
pub(super) struct Hedging {
    /// Oldest first.
    answers: VecDeque<Duration>,
    /// When to ask again.
    delay: Duration,
    /// Second requests that may be made.
    budget: f64,
}

impl Hedging {
    pub(super) fn new() -> Self {
        Self { answers: VecDeque::with_capacity(REMEMBERED), delay: UNKNOWN, budget: SAVED }
    }

    /// A demand request goes out; answers with how long to wait before asking a second time.
    pub(super) fn begin(&mut self) -> Duration {
        self.budget = (self.budget + EARNED).min(SAVED);
        self.delay
    }

    /// Whether a second request may be made now; it counts if so.
    pub(super) fn spend(&mut self) -> bool {
        let may = self.budget >= 1.0;
        if may {
            self.budget -= 1.0;
        }
        may
    }

    /// A demand request was answered well, so long after the first request for it went out. Of one that
    /// was asked twice the first answer counts: it is among the late ones either way.
    pub(super) fn answered(&mut self, after: Duration) {
        if self.answers.len() == REMEMBERED {
            self.answers.pop_front();
        }
        self.answers.push_back(after);
        if self.answers.len() >= ENOUGH {
            let mut sorted: Vec<_> = self.answers.iter().copied().collect();
            let at = sorted.len() * 95 / 100;
            let (_, percentile, _) = sorted.select_nth_unstable(at);
            self.delay = (*percentile * MARGIN / 100).clamp(EARLIEST, LATEST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn the_delay_follows_the_95th_percentile_within_bounds() {
        let mut hedging = Hedging::new();
        assert_eq!(hedging.begin(), UNKNOWN);
        (1..=100).for_each(|number| hedging.answered(MS(number)));
        assert_eq!(hedging.begin(), MS(120), "96 ms and a quarter");
        (0..REMEMBERED).for_each(|_| hedging.answered(MS(1)));
        assert_eq!(hedging.begin(), EARLIEST);
        (0..REMEMBERED).for_each(|_| hedging.answered(MS(5000)));
        assert_eq!(hedging.begin(), LATEST);
    }

    /// `latency` gives each request's time by its number; answers with the time each takes with hedging
    /// and how many second requests there were.
    fn simulate(requests: u64, latency: impl Fn(u64) -> Duration) -> (Vec<Duration>, u64) {
        let (mut hedging, mut number, mut second) = (Hedging::new(), 0, 0);
        let mut next = || {
            number += 1;
            latency(number)
        };
        let taken = (0..requests).map(|_| {
            let delay = hedging.begin();
            let mut taken = next();
            if taken > delay && hedging.spend() {
                second += 1;
                taken = taken.min(delay + next());
            }
            hedging.answered(taken);
            taken
        });
        let mut taken: Vec<_> = taken.collect();
        taken.sort_unstable();
        (taken, second)
    }

    #[test]
    fn rare_stalls_cost_a_little_and_few_second_requests() {
        let stalls = |number: u64| if number.is_multiple_of(50) { MS(1000) } else { MS(20) };
        let (taken, second) = simulate(10_000, stalls);
        assert_eq!(taken[9_900 - 1], MS(45), "the 99th percentile is two short answers");
        assert!(second <= 510, "{second} second requests");
    }

    /// Answers take anything from 20 to 120 ms, and one in a hundred 1 s: those get the second requests.
    #[test]
    fn requests_that_are_a_little_late_do_not_use_up_the_budget() {
        let mixed = |number: u64| match number % 100 {
            7 => MS(1000),
            _ => MS(20 + number * 7919 % 101),
        };
        let (taken, second) = simulate(10_000, mixed);
        let stalled = taken.iter().filter(|taken| **taken >= MS(1000)).count();
        assert!(stalled <= 5, "{stalled} of 100 stalls were waited for");
        assert!(second <= 510, "{second} second requests");
    }

    #[test]
    fn a_store_that_is_slow_as_a_whole_is_asked_twice_for_a_twentieth_at_most() {
        let slower_and_slower = |number: u64| MS(20 + number * 10);
        let (_, second) = simulate(2_000, slower_and_slower);
        assert!(second <= 2_000 / 20 + 10, "{second} second requests");
        assert!(second >= 50, "this shows nothing: {second} second requests");
    }

    #[test]
    fn a_quiet_time_saves_up_ten_and_no_more() {
        let mut hedging = Hedging::new();
        (0..10_000).for_each(|_| _ = hedging.begin());
        assert_eq!((0..100).filter(|_| hedging.spend()).count(), 10);
    }
}
