//! What a prepared snapshot learns from its restores: which of them are watched, and when a set is
//! published. What is learned is decided in `reap_store::working_set`.

use std::sync::Arc;

use parking_lot::Mutex;
use reap_prefetcher::Mode;
use reap_store::working_set::learning::{LearnedSet, Observation};
use reap_store::working_set::schedule::Schedule;
use reap_store::{Error, Node, Profile, Snapshot, Source, Touch, WorkingSet};
use serde::Serialize;

use super::kept::KeptFrames;

/// One profile of a snapshot.
pub(super) struct Subject {
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) profile: Profile,
    /// For the log.
    pub(super) name: String,
    /// Most bytes of its set's pages.
    pub(super) limit_bytes: u64,
    /// Where its set's frames stay.
    pub(super) kept: KeptFrames,
}

/// One profile of a snapshot, in learning.
pub(super) struct Learner {
    node: Node,
    subject: Subject,
    state: Mutex<State>,
    /// One observation after the other.
    turn: tokio::sync::Mutex<()>,
}

struct State {
    /// What the next restore gets.
    set: Option<Arc<WorkingSet>>,
    /// The sequence that was read last, and what it holds.
    sequence: Option<u64>,
    base: Arc<LearnedSet>,
    now: Arc<LearnedSet>,
    schedule: Schedule,
    /// What is learned takes the place of what was read, however like it.
    anew: bool,
    /// A restore without a set is being recorded.
    recording: bool,
    published: u64,
    missed: Option<f64>,
}

/// How far it has come, as the API shows it.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Learning {
    /// Restores that were watched without installs, all nodes'.
    restores: u32,
    /// Pages that the set would have now, published or not.
    pages: usize,
    /// One restore of so many is watched without installs.
    sample_every: u32,
    /// Part of what the last restore touched that its set did not have.
    missed: Option<f64>,
    /// Sets that this daemon has published.
    published: u64,
}

impl Learner {
    /// Goes on from `set`, or starts a new one in its place if `anew`.
    pub(super) fn new(
        node: Node,
        subject: Subject,
        set: Option<Arc<WorkingSet>>,
        anew: bool,
    ) -> Self {
        let base = Arc::new(set.as_ref().map(|set| LearnedSet::of(set)).unwrap_or_default());
        let state = State {
            sequence: set.as_ref().map(|set| set.sequence()),
            now: if anew { Arc::default() } else { base.clone() },
            base,
            set: set.filter(|_| !anew),
            schedule: Schedule::default(),
            anew,
            recording: false,
            published: 0,
            missed: None,
        };
        if let Some(set) = &state.set {
            subject.kept.keep(&node, set);
        }
        let (state, turn) = (Mutex::new(state), tokio::sync::Mutex::default());
        Self { node, subject, state, turn }
    }

    /// What of it stays in the node's cache.
    pub(super) fn kept(&self) -> &KeptFrames {
        &self.subject.kept
    }

    /// The set that the next restore gets.
    pub(super) fn set(&self) -> Option<Arc<WorkingSet>> {
        self.state.lock().set.clone()
    }

    pub(super) fn progress(&self) -> Learning {
        let state = self.state.lock();
        Learning {
            restores: state.now.restores(),
            pages: state.now.page_count(),
            sample_every: state.schedule.period(state.now.restores()),
            missed: state.missed,
            published: state.published,
        }
    }

    /// How the next restore is served: with the set, now and then with a look at it, recorded where
    /// there is none. Never waits.
    pub(super) fn next(self: &Arc<Self>) -> Mode {
        let mut state = self.state.lock();
        let Some(set) = state.set.clone() else {
            drop(state);
            return self.record();
        };
        let restores = state.now.restores();
        let sample = state.schedule.next_is_sample(restores);
        drop(state);
        let done = Watch::new(self, sample).callback();
        if sample { Mode::Sample(set, done) } else { Mode::Learn(set, done) }
    }

    /// Records, if no other restore is being recorded.
    pub(super) fn record(self: &Arc<Self>) -> Mode {
        if std::mem::replace(&mut self.state.lock().recording, true) {
            return Mode::Demand;
        }
        Mode::Record(Watch::new(self, true).callback())
    }

    /// Learns from a restore, and publishes when the set has changed by enough.
    async fn observed(&self, seen: Observation) {
        let _turn = self.turn.lock().await;
        let (base, now, anew) = {
            let state = self.state.lock();
            (state.base.clone(), state.now.clone(), state.anew)
        };
        let fit = base.fit(&seen);
        let is_zero = |(file, page): (u32, u64)| {
            let extent = self.subject.snapshot.extent(file as usize, page)?;
            Some(extent.source == Source::Zero)
        };
        let before = now.clone();
        let next = match seen.touches.is_empty() || (!seen.complete && fit.is_foreign()) {
            // A VM that ended before it ran, or one of which all memory was read.
            true => now,
            false => Arc::new(now.learn(&seen, is_zero, self.subject.limit_bytes)),
        };
        let moved = next.has_moved(&before);
        let changed = !next.is_empty() && (anew || next.is_worth_publishing(&base));
        let misfit = fit.is_bad() && !base.is_empty();
        {
            let mut state = self.state.lock();
            state.now = next;
            state.missed = (!base.is_empty()).then_some(fit.missed);
            match seen.complete {
                true => state.schedule.sampled(moved, misfit),
                false => state.schedule.installed(misfit),
            }
        }
        if changed && let Err(error) = self.publish().await {
            // What was learned stays, and is tried again with the next restore.
            tracing::warn!("{}: no working set is published: {error}", self.subject.name);
        }
        if seen.complete {
            self.state.lock().recording = false;
        }
    }

    /// Publishes what was learned. The caller has the turn.
    async fn publish(&self) -> Result<(), Error> {
        let (sequence, base, now) = {
            let state = self.state.lock();
            (state.sequence, state.base.clone(), state.now.clone())
        };
        let learned = reap_store::node::Learned { sequence, base: &base, now: &now };
        let published = self.node.publish_learned(
            &self.subject.snapshot,
            &self.subject.profile,
            &learned,
            self.subject.limit_bytes,
        );
        let set = published.await?;
        let stored = Arc::new(LearnedSet::of(&set));
        tracing::info!(
            "{}: working set {}: {} pages and {} zero pages, learned from {} restores",
            self.subject.name,
            set.sequence(),
            set.data_pages(),
            set.zero_pages(),
            set.restores()
        );
        self.subject.kept.keep(&self.node, &set);
        let mut state = self.state.lock();
        state.sequence = Some(set.sequence());
        state.base = stored.clone();
        state.now = stored;
        state.set = Some(set);
        state.anew = false;
        state.published += 1;
        Ok(())
    }

    /// A watched restore ended without a word: it was killed, or handed over.
    fn gave_up(&self, complete: bool) {
        let mut state = self.state.lock();
        if complete {
            state.recording = false;
            state.schedule.ended();
        }
    }
}

/// A restore that is watched. Dropped without a result it leaves the way free for another.
struct Watch {
    learner: Option<Arc<Learner>>,
    complete: bool,
}

impl Watch {
    fn new(learner: &Arc<Learner>, complete: bool) -> Self {
        Self { learner: Some(learner.clone()), complete }
    }

    fn callback(mut self) -> Box<dyn FnOnce(Vec<Touch>) + Send> {
        Box::new(move |touches| {
            let Some(learner) = self.learner.take() else { return };
            let seen = Observation { touches, complete: self.complete };
            // It may be called on the fault thread, which must not wait.
            learner.node.clone().spawn(async move { learner.observed(seen).await });
        })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(learner) = self.learner.take() {
            learner.gave_up(self.complete);
        }
    }
}
