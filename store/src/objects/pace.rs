//! How many requests may be in flight to a store that answers "slow down": additive increase,
//! multiplicative decrease. Decides and does no I/O; [`super::gate`] holds requests back by it.

use std::time::Instant;

/// How many requests may be in flight. Between one and `most`.
#[derive(Debug)]
pub(super) struct Pace {
    most: f64,
    limit: f64,
    /// When it was cut last.
    cut_at: Option<Instant>,
}

impl Pace {
    /// At most `most`, which is what it starts with: a store that has not complained is not spared.
    pub(super) fn new(most: usize) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let most = most.max(1) as f64;
        Self { most, limit: most, cut_at: None }
    }

    /// Requests that may be in flight now.
    pub(super) fn limit(&self) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "between 1 and `most`")]
        #[expect(clippy::cast_sign_loss, reason = "between 1 and `most`")]
        let limit = self.limit as usize;
        limit
    }

    /// A request was answered: one more may be in flight after about as many answers as there are
    /// requests in flight, that is, after each round trip.
    pub(super) fn answered(&mut self) {
        self.limit = (self.limit + 1.0 / self.limit).min(self.most);
    }

    /// A request that began at `began` was answered with "slow down" at `now`; whether the limit was
    /// cut. Those that began before the last cut were in flight together with the one that caused it:
    /// they say nothing new.
    pub(super) fn throttled(&mut self, began: Instant, now: Instant) -> bool {
        if self.cut_at.is_some_and(|cut_at| began < cut_at) {
            return false;
        }
        self.limit = (self.limit / 2.0).max(1.0);
        self.cut_at = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn requests_of_one_round_cut_the_pace_once() {
        let (mut pace, start) = (Pace::new(16), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let cuts = (0..16).filter(|number| pace.throttled(at(*number), at(100 + number))).count();
        assert_eq!((cuts, pace.limit()), (1, 8));
        assert!(pace.throttled(at(200), at(210)));
        assert_eq!(pace.limit(), 4);
    }

    #[test]
    fn the_pace_never_falls_to_nothing_and_never_exceeds_its_most() {
        let (mut pace, start) = (Pace::new(16), Instant::now());
        for round in 0..100 {
            let now = start + Duration::from_secs(round);
            pace.throttled(now, now);
        }
        assert_eq!(pace.limit(), 1);
        (0..10_000).for_each(|_| pace.answered());
        assert_eq!(pace.limit(), 16);
    }

    /// A store that serves `capacity` requests at a time and turns the rest away, for 200 rounds.
    #[test]
    fn the_pace_settles_around_what_the_store_can_take() {
        let (mut pace, mut now, capacity) = (Pace::new(64), Instant::now(), 12);
        let (mut served, mut turned_away) = (0, 0);
        for _ in 0..200 {
            let (began, in_flight) = (now, pace.limit());
            now += Duration::from_millis(50);
            for number in 0..in_flight {
                if number < capacity {
                    served += 1;
                    pace.answered();
                } else {
                    turned_away += 1;
                    pace.throttled(began, now);
                }
            }
            assert!(pace.limit() <= 64);
        }
        assert!(served * 10 > 200 * capacity * 7, "{served} served: the store is hardly used");
        assert!(turned_away * 8 < served, "{turned_away} turned away, {served} served");
    }
}
