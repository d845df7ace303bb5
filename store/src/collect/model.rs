//! Explores every interleaving of packers, readers, removals and collectors over a small store.
//!
//! All of them are the production machines: [`Collector`], [`Packer`], [`Reader`]. An actor that is never
//! scheduled again is one that crashed or hangs. Each mutant breaks one rule and must be caught, or the
//! exploration proves nothing.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use super::machine::{Answer, Collector, Fate, Request};
use crate::SnapshotId;
use crate::format::keys::{self, PackId};
use crate::pack::machine::{Answer as Told, Outcome, Packer, Request as Wish, Verdict};
use crate::reader::{Answer as Seen, Reader, Request as Look};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    None,
    PackerIgnoresCondemned,
    PackerReadsCondemnedBeforeLease,
    PackerChoosesParentsBeforeCondemned,
    PackerChoosesParentsBeforeLease,
    PackerRefersToWhatIsListed,
    PackerInDoubtEndsItsLease,
    PacksAreNamedByContent,
    CommitOverwrites,
    CollectorDoesNotWait,
    CollectorListsLeasesBeforeCondemned,
    CollectorIgnoresPackersAtWork,
    CollectorDoesNotLookAgain,
    CollectorReadsPinsBeforeTombs,
    CollectorForgetsOwnCondemned,
    CollectorRemovesAborts,
    ReaderLooksForTombBeforePin,
}

#[derive(Clone, Copy)]
struct Scope {
    packers: u8,
    collectors: usize,
    readers: usize,
    /// Somebody clears condemned lists away that a collector still needs.
    cleaner: bool,
    /// Commits may arrive late, when their packers have given up.
    doubt: bool,
    mutant: Mutant,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Packing {
    packer: Packer,
    refers_to: BTreeSet<PackId>,
    /// Sent, and not arrived.
    commit_is_on_its_way: bool,
    /// What a mutant saw too early.
    early_condemned: Option<BTreeSet<PackId>>,
    early_parents: Option<BTreeSet<PackId>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Reading {
    Begin,
    /// For the mutant: the tomb was looked for, nothing is pinned yet.
    Looked(SnapshotId),
    Open(SnapshotId, Reader),
    End,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Collecting {
    collector: Collector,
    deleting: Option<Vec<String>>,
    /// What a mutant saw too early.
    early_leases: Option<BTreeSet<SnapshotId>>,
    early_pins: Option<BTreeSet<SnapshotId>>,
    early: Option<(BTreeSet<SnapshotId>, BTreeSet<SnapshotId>, BTreeSet<SnapshotId>)>,
    has_condemned: bool,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct World {
    packs: BTreeSet<PackId>,
    manifests: BTreeSet<SnapshotId>,
    leases: BTreeSet<SnapshotId>,
    snaps: BTreeMap<SnapshotId, Fate>,
    tombs: BTreeSet<SnapshotId>,
    condemned: BTreeMap<usize, BTreeSet<PackId>>,
    packers: Vec<Packing>,
    collectors: Vec<Collecting>,
    readers: Vec<Reading>,
    pins: BTreeMap<usize, SnapshotId>,
}

fn txn(number: u8) -> SnapshotId {
    SnapshotId::from_bytes([number; 16])
}

fn pack(number: u8) -> PackId {
    PackId { txn: txn(number), number: 0 }
}

fn listed(ids: impl IntoIterator<Item = SnapshotId>, key: impl Fn(SnapshotId) -> String) -> Answer {
    Answer::Listed(ids.into_iter().map(|id| (key(id), 1)).collect())
}

impl Collecting {
    fn new() -> Self {
        Self {
            collector: Collector::new(),
            deleting: None,
            early_leases: None,
            early_pins: None,
            early: None,
            has_condemned: false,
        }
    }
}

impl World {
    /// One snapshot that was there before; nobody has begun.
    fn new(scope: &Scope) -> Self {
        let packer = |number: u8| Packing {
            packer: Packer::new(txn(number + 1), true, false),
            refers_to: BTreeSet::new(),
            commit_is_on_its_way: false,
            early_condemned: None,
            early_parents: None,
        };
        Self {
            packs: BTreeSet::from([pack(0)]),
            manifests: BTreeSet::from([txn(0)]),
            leases: BTreeSet::new(),
            snaps: BTreeMap::from([(txn(0), Fate::Committed(BTreeSet::from([pack(0)])))]),
            tombs: BTreeSet::new(),
            condemned: BTreeMap::new(),
            packers: (0..scope.packers).map(packer).collect(),
            collectors: vec![Collecting::new(); scope.collectors],
            readers: vec![Reading::Begin; scope.readers],
            pins: BTreeMap::new(),
        }
    }

    fn committed(&self) -> impl Iterator<Item = (SnapshotId, &BTreeSet<PackId>)> {
        self.snaps.iter().filter_map(|(id, fate)| match fate {
            Fate::Committed(packs) => Some((*id, packs)),
            Fate::Aborted => None,
        })
    }

    fn loss(&self) -> Option<String> {
        let served = self.readers.iter().filter_map(|reader| match reader {
            Reading::Open(id, reader) if reader.is_serving() => Some(*id),
            _ => None,
        });
        let served: BTreeSet<_> = served.collect();
        self.committed()
            .filter(|(id, _)| !self.tombs.contains(id) || served.contains(id))
            .find(|(id, packs)| !packs.is_subset(&self.packs) || !self.manifests.contains(id))
            .map(|(id, _)| format!("an object of {id} is gone"))
    }

    fn successors(&self, scope: &Scope, each: &mut impl FnMut(World)) {
        for number in 0..scope.packers {
            self.packer(number, scope, each);
        }
        for (id, _) in self.committed().filter(|(id, _)| !self.tombs.contains(id)) {
            let mut next = self.clone();
            next.tombs.insert(id);
            each(next);
        }
        for reader in 0..scope.readers {
            self.reader(reader, scope, each);
        }
        for number in 0..scope.collectors {
            self.collector(number, scope, each);
            if scope.cleaner && self.condemned.contains_key(&number) {
                let mut next = self.clone();
                next.condemned.remove(&number);
                each(next);
            }
        }
    }

    fn packer(&self, number: u8, scope: &Scope, each: &mut impl FnMut(World)) {
        let (index, own) = (usize::from(number), txn(number + 1));
        let me = &self.packers[index];
        if me.commit_is_on_its_way {
            let mut next = self.clone();
            next.packers[index].commit_is_on_its_way = false;
            next.decide(own, Fate::Committed(me.refers_to.clone()));
            each(next);
        }
        let mutant = scope.mutant;
        let mut step = |told: Option<Told>, change: &dyn Fn(&mut World)| {
            let mut next = self.clone();
            change(&mut next);
            if let Some(told) = told {
                next.packers[index].packer.take(told).expect("an answer");
            }
            each(next);
        };
        match me.packer.next() {
            None if mutant == Mutant::PackerInDoubtEndsItsLease
                && me.packer.outcome() == Some(Outcome::InDoubt)
                && self.leases.contains(&own) =>
            {
                step(None, &|world| _ = world.leases.remove(&own));
            }
            None => {}
            Some(Wish::TakeLease)
                if mutant == Mutant::PackerReadsCondemnedBeforeLease
                    && me.early_condemned.is_none() =>
            {
                step(None, &|world| {
                    world.packers[index].early_condemned = Some(world.all_condemned());
                });
            }
            Some(Wish::TakeLease)
                if mutant == Mutant::PackerChoosesParentsBeforeLease
                    && me.early_parents.is_none() =>
            {
                step(None, &|world| {
                    world.packers[index].early_parents = Some(world.parents(mutant));
                });
            }
            Some(Wish::TakeLease) => {
                step(Some(Told::Done), &|world| _ = world.leases.insert(own));
            }
            Some(Wish::Condemned)
                if mutant == Mutant::PackerChoosesParentsBeforeCondemned
                    && me.early_parents.is_none() =>
            {
                step(None, &|world| {
                    world.packers[index].early_parents = Some(world.parents(mutant));
                });
            }
            Some(Wish::Condemned) => {
                let condemned = match mutant {
                    Mutant::PackerIgnoresCondemned => BTreeSet::new(),
                    _ => me.early_condemned.clone().unwrap_or_else(|| self.all_condemned()),
                };
                step(Some(Told::Condemned(condemned)), &|_| {});
            }
            Some(Wish::Parents) => {
                let parents = me.early_parents.clone().unwrap_or_else(|| self.parents(mutant));
                step(Some(Told::Parents(parents)), &|_| {});
            }
            Some(Wish::Store) => self.store(number, scope, &mut step),
            Some(Wish::Commit) => self.commit(index, scope, &mut step),
            Some(Wish::ReadDecision) => {
                let verdict = self.snaps.get(&own).map(|fate| match fate {
                    Fate::Committed(_) => Verdict::Ours,
                    Fate::Aborted => Verdict::Aborted,
                });
                step(Some(Told::Decision(verdict)), &|_| {});
            }
            Some(Wish::Name) => unreachable!("it gets no name"),
            Some(Wish::EndLease) => {
                step(Some(Told::Done), &|world| _ = world.leases.remove(&own));
            }
        }
    }

    /// An own pack, or one that the packer may refer to.
    fn store(
        &self,
        number: u8,
        scope: &Scope,
        step: &mut impl FnMut(Option<Told>, &dyn Fn(&mut World)),
    ) {
        let (index, own) = (usize::from(number), number + 1);
        let by_content = scope.mutant == Mutant::PacksAreNamedByContent;
        let foreign = (0..=scope.packers).map(pack);
        let foreign = foreign.filter(|pack| self.packers[index].packer.may_refer_to(pack));
        for used in foreign.chain([pack(own)]) {
            let stored = Told::Stored(BTreeSet::from([used]), Duration::ZERO);
            // All content is the same here.
            let used = if by_content { pack(0) } else { used };
            step(Some(stored), &|world| {
                if used == pack(own) || by_content {
                    world.packs.insert(used);
                }
                world.manifests.insert(txn(own));
                world.packers[index].refers_to = BTreeSet::from([used]);
            });
        }
    }

    fn commit(
        &self,
        index: usize,
        scope: &Scope,
        step: &mut impl FnMut(Option<Told>, &dyn Fn(&mut World)),
    ) {
        let own = txn(u8::try_from(index).expect("few") + 1);
        let mine = Fate::Committed(self.packers[index].refers_to.clone());
        if scope.mutant == Mutant::CommitOverwrites {
            return step(Some(Told::Created), &|world| {
                world.snaps.insert(own, mine.clone());
            });
        }
        match self.snaps.contains_key(&own) {
            true => step(Some(Told::Exists), &|_| {}),
            false => step(Some(Told::Created), &|world| world.decide(own, mine.clone())),
        }
        if scope.doubt {
            step(Some(Told::Unknown(Duration::MAX)), &|world| {
                world.packers[index].commit_is_on_its_way = true;
            });
        }
    }

    fn decide(&mut self, txn: SnapshotId, fate: Fate) {
        self.snaps.entry(txn).or_insert(fate);
    }

    fn all_condemned(&self) -> BTreeSet<PackId> {
        self.condemned.values().flatten().copied().collect()
    }

    /// The packs that a packer finds now.
    fn parents(&self, mutant: Mutant) -> BTreeSet<PackId> {
        if mutant == Mutant::PackerRefersToWhatIsListed {
            return self.packs.clone();
        }
        let live = self.committed().filter(|(id, _)| !self.tombs.contains(id));
        live.flat_map(|(_, packs)| packs.iter().copied()).collect()
    }

    fn reader(&self, reader: usize, scope: &Scope, each: &mut impl FnMut(World)) {
        let mut step = |at: Reading, pin: Option<SnapshotId>| {
            let mut next = self.clone();
            next.readers[reader] = at;
            match pin {
                Some(id) => next.pins.insert(reader, id),
                None => next.pins.remove(&reader),
            };
            each(next);
        };
        let pinned = || {
            let mut reader = Reader::default();
            assert_eq!(reader.next(), Some(Look::Pin));
            reader.take(Seen::Done);
            reader
        };
        match &self.readers[reader] {
            Reading::Begin => {
                for (id, _) in self.committed() {
                    match scope.mutant == Mutant::ReaderLooksForTombBeforePin {
                        true if self.tombs.contains(&id) => {}
                        true => step(Reading::Looked(id), None),
                        false => step(Reading::Open(id, pinned()), Some(id)),
                    }
                }
            }
            Reading::Looked(id) => {
                let mut reader = pinned();
                reader.take(Seen::Tomb(false));
                step(Reading::Open(*id, reader), Some(*id));
            }
            Reading::Open(id, reader) => {
                let mut reader = reader.clone();
                if reader.next() == Some(Look::LookForTomb) {
                    reader.take(Seen::Tomb(self.tombs.contains(id)));
                    return step(Reading::Open(*id, reader), Some(*id));
                }
                reader.let_go();
                assert_eq!(reader.next(), Some(Look::Unpin));
                step(Reading::End, None);
            }
            Reading::End => {}
        }
    }

    fn pinned(&self) -> BTreeSet<SnapshotId> {
        self.pins.values().copied().collect()
    }

    fn collector(&self, number: usize, scope: &Scope, each: &mut impl FnMut(World)) {
        let me = &self.collectors[number];
        let Some(request) = me.collector.next() else { return };
        let mut next = self.clone();
        if let Request::Settle { txns, wait } = &request {
            let open: Vec<_> = txns.iter().filter(|txn| !self.snaps.contains_key(txn)).collect();
            for txn in &open {
                // The packer seems to be gone.
                let mut next = self.clone();
                next.snaps.insert(**txn, Fate::Aborted);
                each(next);
            }
            if *wait && !open.is_empty() && scope.mutant != Mutant::CollectorDoesNotWait {
                return;
            }
        }
        let answer = next.answer(number, request, scope.mutant);
        if let Some(answer) = answer {
            next.collectors[number].collector.take(answer).expect("listings hold no surprise");
        }
        each(next);
    }

    /// Carries out a request; `None` while there is more of it to do.
    fn answer(&mut self, number: usize, request: Request, mutant: Mutant) -> Option<Answer> {
        let pins = self.pinned();
        let (leases, tombs) = (self.leases.clone(), self.tombs.clone());
        let me = &mut self.collectors[number];
        let again = me.has_condemned;
        Some(match request {
            Request::List("pack") => {
                Answer::Listed(self.packs.iter().map(|pack| (pack.key(), 1)).collect())
            }
            Request::List("manifest") => listed(self.manifests.iter().copied(), keys::manifest),
            Request::List("lease") if !again && mutant == Mutant::CollectorIgnoresPackersAtWork => {
                listed([], keys::lease)
            }
            Request::List("lease") => listed(me.early_leases.take().unwrap_or(leases), keys::lease),
            Request::List("tomb") => {
                let early = me.early.as_ref().filter(|_| again).map(|early| early.0.clone());
                listed(early.unwrap_or(tombs), keys::tomb)
            }
            Request::List("pin") => {
                let early = me.early.as_ref().filter(|_| again).map(|early| early.1.clone());
                let pins = me.early_pins.take().or(early).unwrap_or(pins);
                listed(pins, |id| keys::pin(txn(99), txn(99), id))
            }
            Request::List("snap") => {
                let early = me.early.as_ref().filter(|_| again).map(|early| early.2.clone());
                listed(early.unwrap_or_else(|| self.snaps.keys().copied().collect()), keys::snap)
            }
            Request::List(_) => Answer::Listed(Vec::new()),
            Request::Fates(txns) => {
                match mutant {
                    Mutant::CollectorListsLeasesBeforeCondemned if !again => {
                        me.early_leases = Some(leases);
                    }
                    Mutant::CollectorDoesNotLookAgain if !again => {
                        me.early = Some((tombs, pins, self.snaps.keys().copied().collect()));
                    }
                    _ => {}
                }
                Answer::Fates(self.fates(&txns))
            }
            Request::Condemn(packs) => {
                me.has_condemned = true;
                self.condemned.insert(number, packs);
                Answer::Done
            }
            Request::Settle { txns, .. } => {
                if mutant == Mutant::CollectorReadsPinsBeforeTombs {
                    me.early_pins = Some(pins);
                }
                match &mut me.early {
                    // Even a collector that does not look again knows what it settled.
                    Some(early) => {
                        early.2.extend(
                            txns.iter().filter(|txn| self.snaps.get(txn) == Some(&Fate::Aborted)),
                        );
                        let known = early.2.clone();
                        Answer::Fates(self.fates(&txns.intersection(&known).copied().collect()))
                    }
                    None => Answer::Fates(self.fates(&txns)),
                }
            }
            Request::OwnCondemned => Answer::There(
                self.condemned.contains_key(&number)
                    || mutant == Mutant::CollectorForgetsOwnCondemned,
            ),
            Request::Delete(keys) => {
                let mut left = me.deleting.take().unwrap_or(keys);
                if let Some(key) = left.pop() {
                    me.deleting = Some(left);
                    self.delete(&key);
                    return None;
                }
                Answer::Done
            }
            Request::Release => {
                if mutant == Mutant::CollectorRemovesAborts {
                    self.snaps.retain(|_, fate| *fate != Fate::Aborted);
                }
                self.condemned.remove(&number);
                Answer::Done
            }
        })
    }

    fn fates(&self, txns: &BTreeSet<SnapshotId>) -> BTreeMap<SnapshotId, Fate> {
        let fate = |txn: &SnapshotId| Some((*txn, self.snaps.get(txn)?.clone()));
        txns.iter().filter_map(fate).collect()
    }

    fn delete(&mut self, key: &str) {
        if let Some(pack) = key.strip_prefix("pack/") {
            self.packs.remove(&pack.parse().expect("a pack id"));
        } else {
            let id = keys::id_of(key).expect("an id");
            let kind =
                if key.starts_with("lease/") { &mut self.leases } else { &mut self.manifests };
            kind.remove(&id);
        }
    }

    /// When everybody has ended or died where they were: two runs leave exactly what live snapshots refer to.
    fn is_clean_after_two_runs(&self) -> bool {
        let mut world = self.clone();
        world.pins.clear();
        world.readers.clear();
        world.condemned.clear();
        for _ in 0..2 {
            world.collectors = vec![Collecting::new()];
            while let Some(request) = world.collectors[0].collector.next() {
                if let Request::Settle { txns, .. } = &request {
                    for txn in txns {
                        world.snaps.entry(*txn).or_insert(Fate::Aborted);
                    }
                }
                if let Some(answer) = world.answer(0, request, Mutant::None) {
                    world.collectors[0].collector.take(answer).expect("no surprise");
                }
            }
        }
        let live: Vec<_> = world.committed().filter(|(id, _)| !world.tombs.contains(id)).collect();
        let packs: BTreeSet<_> = live.iter().flat_map(|(_, packs)| packs.iter().copied()).collect();
        let manifests: BTreeSet<_> = live.iter().map(|(id, _)| *id).collect();
        world.packs == packs && world.manifests == manifests && world.leases.is_empty()
    }
}

struct Explored {
    states: usize,
    loss: Option<String>,
    leaks: usize,
    cleaned: usize,
}

fn explore(scope: &Scope) -> Explored {
    let fingerprint = |world: &World| {
        let (mut one, mut other) = (DefaultHasher::new(), DefaultHasher::new());
        world.hash(&mut one);
        17u8.hash(&mut other);
        world.hash(&mut other);
        (one.finish(), other.finish())
    };
    let first = World::new(scope);
    let mut seen = HashSet::from([fingerprint(&first)]);
    let mut open = vec![first];
    let mut explored = Explored { states: 0, loss: None, leaks: 0, cleaned: 0 };
    while let Some(world) = open.pop() {
        explored.states += 1;
        explored.loss = world.loss();
        if explored.loss.is_some() {
            return explored;
        }
        if explored.states % 97 == 1 {
            explored.cleaned += 1;
            explored.leaks += usize::from(!world.is_clean_after_two_runs());
        }
        world.successors(scope, &mut |next| {
            if seen.insert(fingerprint(&next)) {
                open.push(next);
            }
        });
    }
    explored
}

fn scope(packers: u8, collectors: usize, readers: usize, mutant: Mutant) -> Scope {
    let cleaner = collectors > 1 || mutant == Mutant::CollectorForgetsOwnCondemned;
    Scope { packers, collectors, readers, cleaner, doubt: false, mutant }
}

fn holds(scope: &Scope) {
    let explored = explore(scope);
    let Explored { states, loss, leaks, cleaned } = explored;
    assert_eq!(loss, None, "after {states} states");
    assert!(
        states > 1000 && cleaned > 10,
        "{states} states, {cleaned} cleaned: nothing was explored"
    );
    assert_eq!(leaks, 0, "of {cleaned} quiet ends, with {states} states");
}

#[test]
fn nothing_is_lost_with_two_packers_and_a_collector() {
    holds(&scope(2, 1, 0, Mutant::None));
}

#[test]
fn nothing_is_lost_when_commits_arrive_late() {
    holds(&Scope { doubt: true, ..scope(1, 1, 0, Mutant::None) });
}

#[test]
fn nothing_is_lost_with_a_packer_a_reader_and_a_collector() {
    holds(&scope(1, 1, 1, Mutant::None));
}

#[test]
fn nothing_is_lost_when_condemned_lists_are_cleared_away() {
    holds(&Scope { cleaner: true, ..scope(1, 1, 1, Mutant::None) });
}

/// What a packer at work owns would survive anyway, because its decision is waited for: leaving it off the
/// condemned list spares it from being ended, and nothing more.
#[test]
fn condemning_what_packers_at_work_own_loses_nothing() {
    holds(&scope(2, 1, 0, Mutant::CollectorIgnoresPackersAtWork));
}

/// Millions of states: for `make soak`.
#[cfg(feature = "soak")]
#[test]
fn nothing_is_lost_in_larger_scopes() {
    holds(&scope(1, 2, 0, Mutant::None));
    holds(&scope(2, 1, 1, Mutant::None));
    holds(&Scope { doubt: true, ..scope(2, 1, 0, Mutant::None) });
}

#[test]
fn every_broken_rule_loses_something() {
    use Mutant::*;
    let caught = [
        scope(2, 1, 0, PackerIgnoresCondemned),
        scope(2, 1, 0, PackerReadsCondemnedBeforeLease),
        scope(2, 1, 0, PackerChoosesParentsBeforeCondemned),
        scope(2, 1, 0, PackerChoosesParentsBeforeLease),
        scope(2, 2, 0, PackerRefersToWhatIsListed),
        Scope { doubt: true, ..scope(1, 1, 0, PackerInDoubtEndsItsLease) },
        scope(2, 1, 0, PacksAreNamedByContent),
        scope(2, 1, 0, CommitOverwrites),
        scope(2, 1, 0, CollectorDoesNotWait),
        scope(2, 1, 0, CollectorListsLeasesBeforeCondemned),
        scope(2, 1, 0, CollectorDoesNotLookAgain),
        scope(1, 1, 1, CollectorReadsPinsBeforeTombs),
        scope(2, 1, 0, CollectorForgetsOwnCondemned),
        scope(2, 1, 0, CollectorRemovesAborts),
        scope(1, 1, 1, ReaderLooksForTombBeforePin),
    ];
    let missed: Vec<_> = caught
        .iter()
        .filter(|scope| explore(scope).loss.is_none())
        .map(|scope| scope.mutant)
        .collect();
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
