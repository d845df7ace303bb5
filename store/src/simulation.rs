//! Packers, collectors, readers and removals over one bucket, with crashes, stalls, errors before and
//! after effect, hanging requests, late duplicates, wrong bodies and listings of a few keys a page.
//!
//! The actors run the production code, state machines and what carries them out; time is simulated, and
//! a seed decides everything, so that a violation can be looked at again. `bucket.rs` knows what must
//! never happen.

mod actors;
mod bucket;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use actors::World;
use bucket::{Bug, Events, Rates};

use crate::format::keys::{self, PackId};

thread_local! {
    static IDS: RefCell<Option<StdRng>> = const { RefCell::new(None) };
}

/// A random id of the simulation that runs on this thread, if one does.
pub(crate) fn seeded_id() -> Option<[u8; 16]> {
    IDS.with_borrow_mut(|ids| ids.as_mut().map(Rng::random))
}

/// One run; the violation, if there was one.
fn simulate(seed: u64, bug: Bug, events: &mut Events) -> Option<String> {
    IDS.set(Some(StdRng::seed_from_u64(seed)));
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let runtime = builder.enable_time().start_paused(true).build().expect("a runtime");
    let violation = runtime.block_on(async {
        let world = World::new(seed, bug);
        world.bucket.with(|state| state.rates = rates(seed));
        world.run().await;
        // All that is still on its way arrives.
        world.bucket.with(|state| state.rates = Rates::NONE);
        tokio::time::sleep(Duration::from_secs(3 * 3600)).await;
        quiet_end(&world).await;
        let (violation, happened) =
            world.bucket.with(|state| (state.violation.clone(), state.events.clone()));
        for (what, count) in happened.0 {
            *events.0.entry(what).or_default() += count;
        }
        violation
    });
    IDS.set(None);
    violation
}

/// From a good day to the worst.
fn rates(seed: u64) -> Rates {
    let [error_before, error_after, hang, duplicate, wrong_body] = match seed % 4 {
        0 => [0, 0, 0, 300, 0],
        1 => [20, 20, 20, 100, 10],
        2 => [100, 50, 50, 500, 50],
        _ => [500, 200, 100, 500, 100],
    };
    Rates { error_before, error_after, hang, duplicate, wrong_body }
}

/// Nobody packs or reads: two runs leave exactly what live snapshots refer to.
async fn quiet_end(world: &World) {
    world.bucket.with(bucket::State::delete_pins);
    for run in 0..2 {
        if let Err(error) = world.collect_quietly().await {
            world.bucket.with(|state| state.violate(format!("quiet run {run}: {error}")));
        }
    }
    world.bucket.with(|state| {
        let live = state.live();
        let packs: BTreeSet<_> = live.values().flatten().map(PackId::key).collect();
        let manifests: BTreeSet<_> = live.keys().map(|id| keys::manifest(*id)).collect();
        for (prefix, expected) in
            [("pack/", packs), ("manifest/", manifests), ("lease/", BTreeSet::new())]
        {
            let there = state.keys(prefix);
            if there != expected {
                let (garbage, lost): (Vec<_>, Vec<_>) =
                    (there.difference(&expected).collect(), expected.difference(&there).collect());
                state.violate(format!("in the end garbage {garbage:?}, lost {lost:?}"));
            }
        }
    });
    world.check_acknowledged().await;
}

/// Runs seeds until one violates; that one.
fn search(bug: Bug, seeds: std::ops::Range<u64>, events: &mut Events) -> Option<(u64, String)> {
    seeds.into_iter().find_map(|seed| Some((seed, simulate(seed, bug, events)?)))
}

fn nothing_is_lost(seeds: std::ops::Range<u64>) -> Events {
    let mut events = Events::default();
    if let Some((seed, violation)) = search(Bug::None, seeds, &mut events) {
        panic!("seed {seed}: {violation}");
    }
    events
}

/// An error of a test in which too little happened.
fn require(events: &Events) {
    for what in [
        "a commit",
        "a commit refers to packs of others",
        "a commit that is acknowledged",
        "a commit whose outcome is in doubt",
        "a packing that a collector ended",
        "an abort",
        "a pack or manifest is deleted",
        "a collection that ended",
        "a collection that was refused or failed",
        "a reader serves",
        "a reader serves what is removed meanwhile",
        "an opening that finds its snapshot removed",
        "an actor is killed",
        "an actor stalls",
        "an actor is cut off",
        "an error before effect",
        "an error after effect",
        "a hanging request",
        "a late duplicate",
        "a wrong body",
    ] {
        let count = events.0.get(what).copied().unwrap_or_default();
        assert!(count >= 5, "{what}: {count} times, so nothing is proven of it");
    }
}

#[test]
fn nothing_is_lost_whatever_the_store_and_the_others_do() {
    require(&nothing_is_lost(0..1000));
}

/// For `make soak`.
#[cfg(feature = "soak")]
#[test]
fn nothing_is_lost_in_many_seeds() {
    let thousands = parking_lot::Mutex::new((1000..21_000).step_by(1000));
    // Some events are rare: a thousand seeds may have few of them.
    let all = parking_lot::Mutex::new(Events::default());
    let next = || thousands.lock().next();
    let work = || {
        while let Some(thousand) = next() {
            let events = nothing_is_lost(thousand..thousand + 1000);
            println!("seeds {thousand} to {}, no violation", thousand + 999);
            let mut all = all.lock();
            events.0.into_iter().for_each(|(what, count)| *all.0.entry(what).or_default() += count);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    require(&all.lock());
}

#[test]
fn every_bug_is_found() {
    use Bug::*;
    let bugs = [DecisionsAreReplaced, CondemnedIsHidden, LeasesAreHidden, PinsAreHidden];
    let mut events = Events::default();
    let missed: Vec<_> =
        bugs.into_iter().filter(|bug| search(*bug, 0..3000, &mut events).is_none()).collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
}

#[test]
fn a_seed_decides_everything() {
    for seed in 0..8 {
        let [once, again] = [(); 2].map(|()| {
            let mut events = Events::default();
            (simulate(seed, Bug::None, &mut events), events.0)
        });
        assert_eq!(once, again, "seed {seed}");
    }
}
