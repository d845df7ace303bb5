//! How many bytes a prefetch may have in flight. Decides and does no I/O; [`super::prefetch`] asks for what
//! it grants.

use crate::PAGE_SIZE;
use crate::format::frame::{FrameEntry, MAX_FRAME_PAGES};

/// What the longest frame may cost: as many bytes stored as decoded. No budget is smaller, so that any
/// frame fits into any.
const LEAST_BYTES: u64 = 2 * MAX_FRAME_PAGES as u64 * PAGE_SIZE as u64;

/// What one frame costs from when it is asked for until whoever asked has had it: its stored bytes, and
/// the decoded ones.
pub(super) fn cost(entry: &FrameEntry) -> u64 {
    u64::from(entry.stored_bytes) + entry.decoded_bytes() as u64
}

/// The bytes in flight of all prefetching, of at most `limit`.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    in_flight: u64,
    highest: u64,
}

impl Budget {
    pub(super) fn new(limit: u64) -> Self {
        Self { limit: limit.max(LEAST_BYTES), in_flight: 0, highest: 0 }
    }

    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    pub(super) fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// The most that ever was in flight.
    pub(super) fn highest(&self) -> u64 {
        self.highest
    }

    /// How many of its next frames a stream may ask for now, by what each costs. It has `held` bytes in
    /// flight.
    ///
    /// A stream may have as much in flight as it leaves free. Alone it has half of the budget; one that
    /// comes then finds the other half, and both come to a third, and so on: equal shares, and always as
    /// much again for the next one.
    pub(super) fn grant(&self, held: u64, costs: impl Iterator<Item = u64>) -> usize {
        let free = self.limit - self.in_flight;
        let most = free.saturating_sub(held) / 2;
        let (mut bytes, mut count, mut rest) = (0, 0, None);
        for cost in costs {
            if bytes + cost > most {
                rest = Some(cost);
                break;
            }
            bytes += cost;
            count += 1;
        }
        match rest {
            // Whoever has nothing in flight may have one frame wherever there is room: shares that are
            // shorter than a frame would keep all from going on.
            Some(cost) if count == 0 && held == 0 => usize::from(cost <= free),
            // A quarter of its share at a time: many short requests take longer than few long ones.
            Some(_) if bytes * 3 < held => 0,
            _ => count,
        }
    }

    /// So many bytes were granted.
    pub(super) fn take(&mut self, bytes: u64) {
        self.in_flight += bytes;
        self.highest = self.highest.max(self.in_flight);
    }

    /// So many bytes are no more in flight.
    pub(super) fn give_back(&mut self, bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Streams that hold so much and want no end of frames of `cost`; asks until nobody is granted any.
    fn settle(budget: &mut Budget, held: &mut [u64], cost: u64) {
        loop {
            let before = budget.in_flight();
            for held in &mut *held {
                let count = budget.grant(*held, std::iter::repeat_n(cost, 10_000));
                budget.take(count as u64 * cost);
                *held += count as u64 * cost;
            }
            if budget.in_flight() == before {
                return;
            }
        }
    }

    #[test]
    fn one_stream_has_half_and_the_next_one_finds_room() {
        let mut budget = Budget::new(64 * MIB);
        let mut held = [0];
        settle(&mut budget, &mut held, MIB / 4);
        assert_eq!(held[0], 32 * MIB);
        let count = budget.grant(0, std::iter::repeat_n(MIB / 4, 1000));
        assert_eq!(count, 64, "half of what is free, at once");
    }

    #[test]
    fn shares_become_equal_as_frames_are_done() {
        let mut budget = Budget::new(64 * MIB);
        let mut held = [0, 0, 0];
        settle(&mut budget, &mut held, MIB / 4);
        // The largest is done with frames, and all ask in turns, the smallest first.
        for _ in 0..1000 {
            held.sort_unstable();
            held[2] -= MIB / 4;
            budget.give_back(MIB / 4);
            settle(&mut budget, &mut held, MIB / 4);
        }
        let fair = 16 * MIB;
        assert!(held.iter().all(|held| (fair * 2 / 3..=fair * 4 / 3).contains(held)), "{held:?}");
        assert!(budget.highest() <= budget.limit());
    }

    #[test]
    fn many_streams_and_long_frames_go_on_within_the_limit() {
        let mut budget = Budget::new(0);
        assert_eq!(budget.limit(), LEAST_BYTES);
        let mut held = [0; 100];
        for _ in 0..1000 {
            settle(&mut budget, &mut held, 5 * MIB);
            let busy = held.iter().position(|held| *held > 0).expect("somebody goes on");
            budget.give_back(held[busy]);
            held[busy] = 0;
            held.rotate_left(busy + 1);
        }
        assert!(budget.highest() <= budget.limit());
    }

    #[test]
    fn more_is_asked_for_in_quarters_and_the_last_frames_at_once() {
        let mut budget = Budget::new(64 * MIB);
        let mut held = [0];
        settle(&mut budget, &mut held, MIB);
        let next =
            |budget: &Budget, held: u64, count| budget.grant(held, std::iter::repeat_n(MIB, count));
        budget.give_back(4 * MIB);
        assert_eq!(next(&budget, 28 * MIB, 1000), 0);
        assert_eq!(next(&budget, 28 * MIB, 2), 2, "there are no more");
        budget.give_back(4 * MIB);
        assert_eq!(next(&budget, 24 * MIB, 1000), 8);
    }
}
