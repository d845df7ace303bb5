//! Which restores are watched without installs. Pure.
//!
//! An installed page is touched invisibly, so now and then a restore is served by faults alone,
//! from frames in memory: often while a set is young or changes, rarely once it has settled, at once
//! when it fits badly.

/// One of so many restores at most is a sample, and one of so many at least.
const SHORTEST_PERIOD: u32 = 8;
const LONGEST_PERIOD: u32 = 64;
/// Restores learned from until a set counts as settled in.
const YOUNG: u32 = 3;

/// Decides restore by restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Restores with installs since the last sample.
    since: u32,
    period: u32,
    misfit: bool,
    /// Restores to wait before a misfit causes a sample; it doubles while samples do not help.
    patience: u32,
    under_way: bool,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { since: 0, period: SHORTEST_PERIOD, misfit: false, patience: 1, under_way: false }
    }
}

impl Schedule {
    /// Whether the next restore is to be a sample of a set that was learned from `restores`. One at a
    /// time: [`Self::ended`] must follow a yes.
    pub fn next_is_sample(&mut self, restores: u32) -> bool {
        let due =
            self.since + 1 >= self.period(restores) || (self.misfit && self.since >= self.patience);
        if self.under_way || !due {
            self.since = self.since.saturating_add(1);
            return false;
        }
        self.under_way = true;
        true
    }

    /// The sample that was under way showed something: whether the set moved, and whether it had
    /// fitted badly.
    pub fn sampled(&mut self, moved: bool, misfit: bool) {
        self.period = match moved {
            true => SHORTEST_PERIOD,
            false => (self.period * 2).min(LONGEST_PERIOD),
        };
        self.patience = match misfit || self.misfit {
            true => (self.patience * 2).min(LONGEST_PERIOD),
            false => 1,
        };
        self.misfit = false;
        self.ended();
    }

    /// The sample that was under way is over, whatever it showed.
    pub fn ended(&mut self) {
        self.since = 0;
        self.under_way = false;
    }

    /// A restore with installs fitted, or it did not.
    pub fn installed(&mut self, misfit: bool) {
        self.misfit = misfit;
        if !misfit {
            self.patience = 1;
        }
    }

    /// One restore of so many is a sample now, of a set that was learned from `restores`.
    pub fn period(&self, restores: u32) -> u32 {
        if restores < YOUNG { SHORTEST_PERIOD / 2 } else { self.period }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Restores until the next sample, itself included.
    fn until_sample(schedule: &mut Schedule, restores: u32) -> u32 {
        (1..).find(|_| schedule.next_is_sample(restores)).expect("there is one")
    }

    #[test]
    fn a_settled_set_is_sampled_ever_more_rarely_and_never_not_at_all() {
        let mut schedule = Schedule::default();
        let mut periods = Vec::new();
        for _ in 0..7 {
            periods.push(until_sample(&mut schedule, 10));
            schedule.sampled(false, false);
        }
        assert_eq!(periods, [8, 16, 32, 64, 64, 64, 64]);
        until_sample(&mut schedule, 10);
        schedule.sampled(true, false);
        assert_eq!(
            until_sample(&mut schedule, 10),
            8,
            "a set that changed is looked at again soon"
        );
    }

    #[test]
    fn a_young_set_is_sampled_every_fourth_time() {
        let mut schedule = Schedule::default();
        for _ in 0..5 {
            assert_eq!(until_sample(&mut schedule, 1), 4);
            schedule.sampled(false, false);
        }
    }

    #[test]
    fn a_misfit_is_sampled_at_once_and_less_often_when_that_does_not_help() {
        let mut schedule = Schedule::default();
        for _ in 0..4 {
            until_sample(&mut schedule, 10);
            schedule.sampled(false, false);
        }
        let mut waits = Vec::new();
        for _ in 0..5 {
            assert!(!schedule.next_is_sample(10), "a sample follows no sample");
            schedule.installed(true);
            let more = (1..).find(|_| {
                let sample = schedule.next_is_sample(10);
                schedule.installed(true);
                sample
            });
            waits.push(more.expect("there is one"));
            schedule.sampled(false, false);
        }
        assert_eq!(waits, [1, 2, 4, 8, 16]);
        schedule.installed(false);
        assert!(!schedule.next_is_sample(10));
        schedule.installed(true);
        assert!(schedule.next_is_sample(10), "after a fit, a misfit counts at once again");
    }

    #[test]
    fn one_sample_at_a_time() {
        let mut schedule = Schedule::default();
        until_sample(&mut schedule, 10);
        assert!((0..200).all(|_| !schedule.next_is_sample(10)));
        schedule.ended();
        assert_eq!(until_sample(&mut schedule, 10), 8);
    }
}
