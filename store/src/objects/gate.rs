//! Holds requests back to the [`Pace`] that the store can take, in the order in which they came.

use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::pace::Pace;

/// A gate for one kind of request.
#[derive(Debug)]
pub(super) struct Gate {
    places: Semaphore,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    pace: Pace,
    /// Places that exist: free ones in the semaphore, and those that requests have.
    places: usize,
}

/// A request's place; it is given back on drop.
#[derive(Debug)]
pub(crate) struct Pass<'a> {
    gate: &'a Gate,
    permit: Option<SemaphorePermit<'a>>,
}

impl Gate {
    pub(super) fn new(most: usize) -> Self {
        let pace = Pace::new(most);
        let places = pace.limit();
        Self { places: Semaphore::new(places), state: Mutex::new(State { pace, places }) }
    }

    /// Waits for a place.
    pub(super) async fn enter(&self) -> Pass<'_> {
        // The semaphore is never closed.
        Pass { gate: self, permit: self.places.acquire().await.ok() }
    }

    /// Requests that may be in flight now.
    pub(super) fn limit(&self) -> usize {
        self.state.lock().pace.limit()
    }

    /// See [`Pace::answered`].
    pub(super) fn answered(&self) {
        let mut state = self.state.lock();
        state.pace.answered();
        self.fit(&mut state);
    }

    /// See [`Pace::throttled`].
    pub(super) fn throttled(&self, began: Instant) -> bool {
        let mut state = self.state.lock();
        let cut = state.pace.throttled(began, Instant::now());
        self.fit(&mut state);
        cut
    }

    /// Makes or takes away free places. What requests have is taken when they give it back.
    fn fit(&self, state: &mut State) {
        let limit = state.pace.limit();
        if state.places > limit {
            state.places -= self.places.forget_permits(state.places - limit);
        } else if state.places < limit {
            self.places.add_permits(limit - state.places);
            state.places = limit;
        }
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock();
        if state.places > state.pace.limit()
            && let Some(permit) = self.permit.take()
        {
            permit.forget();
            state.places -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn a_cut_gate_lets_nobody_in_until_enough_have_left() {
        let gate = Gate::new(4);
        let enter = || gate.enter().now_or_never();
        let mut inside: Vec<_> = (0..4).map(|_| enter().expect("there is room")).collect();
        assert!(gate.throttled(Instant::now()));
        assert_eq!(gate.limit(), 2);
        inside.truncate(2);
        assert!(enter().is_none(), "two are inside, and two may be");
        inside.truncate(1);
        inside.push(enter().expect("one left"));
        assert!(enter().is_none());
    }

    #[test]
    fn answers_open_the_gate_again() {
        let gate = Gate::new(4);
        gate.throttled(Instant::now());
        gate.throttled(Instant::now());
        let first = gate.enter().now_or_never().expect("one may always enter");
        assert!(gate.enter().now_or_never().is_none());
        (0..20).for_each(|_| gate.answered());
        let more: Vec<_> = (0..3).filter_map(|_| gate.enter().now_or_never()).collect();
        assert_eq!(more.len(), 3);
        assert!(gate.enter().now_or_never().is_none(), "never more than it was made for");
        drop(first);
    }
}
