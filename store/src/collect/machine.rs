//! The collector's decisions, without I/O: it asks for one thing at a time and is told what came of it.
//!
//! Steps G0 to G10 of the collection protocol in `docs/FORMAT.md`. The exhaustive test in `model.rs`
//! explores this very code.

use std::collections::{BTreeMap, BTreeSet};

use crate::SnapshotId;
use crate::format::keys::{self, PackId};

/// What the collector wants done next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// LIST everything under a prefix, whole.
    List(&'static str),
    /// GET these decisions; all of them are there.
    Fates(BTreeSet<SnapshotId>),
    /// Create `gc/condemned/<run>`. It must be durable before the answer.
    Condemn(BTreeSet<PackId>),
    /// Make sure that each of these transactions has a decision: abort for a packer that is gone and, if
    /// `wait`, wait for one at work. Answer with the decisions.
    Settle {
        /// Which.
        txns: BTreeSet<SnapshotId>,
        /// Something is condemned, which a packer at work may refer to.
        wait: bool,
    },
    /// Is `gc/condemned/<run>` still there?
    OwnCondemned,
    /// DELETE these keys, in any order.
    Delete(Vec<String>),
    /// DELETE `gc/condemned/<run>`.
    Release,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Keys and lengths.
    Listed(Vec<(String, u64)>),
    /// Decisions, one for each that was asked for.
    Fates(BTreeMap<SnapshotId, Fate>),
    /// Whether it is there.
    There(bool),
    /// Done.
    Done,
}

/// What a decision comes to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fate {
    /// The snapshot will never exist.
    Aborted,
    /// It exists and refers to these packs.
    Committed(BTreeSet<PackId>),
}

/// Where a run is; in the order of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum At {
    Packs,
    Manifests,
    WorkingSets,
    Leases,
    Tombs,
    Pins,
    Snaps,
    Fates,
    Condemn,
    LeasesAgain,
    Settle,
    TombsAgain,
    PinsAgain,
    SnapsAgain,
    FatesAgain,
    OwnCondemned,
    Delete,
    Release,
    End,
}

/// One run. Errors of I/O are the driver's: it drops the machine, and nothing more is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Collector {
    at: At,
    packs: BTreeMap<PackId, u64>,
    /// Manifests and working sets: key to owner and length.
    others: BTreeMap<String, (SnapshotId, u64)>,
    leases: BTreeSet<SnapshotId>,
    tombs: BTreeSet<SnapshotId>,
    pins: BTreeSet<SnapshotId>,
    fates: BTreeMap<SnapshotId, Fate>,
    /// Decisions that were listed and not read yet.
    unread: BTreeSet<SnapshotId>,
    condemned: BTreeSet<PackId>,
    condemned_others: BTreeSet<String>,
    doomed: Vec<String>,
    has_deleted: bool,
}

impl Collector {
    /// A run that has asked for nothing yet.
    pub(super) fn new() -> Self {
        Self {
            at: At::Packs,
            packs: BTreeMap::new(),
            others: BTreeMap::new(),
            leases: BTreeSet::new(),
            tombs: BTreeSet::new(),
            pins: BTreeSet::new(),
            fates: BTreeMap::new(),
            unread: BTreeSet::new(),
            condemned: BTreeSet::new(),
            condemned_others: BTreeSet::new(),
            doomed: Vec::new(),
            has_deleted: false,
        }
    }

    /// What to do next; `None` when the run is over.
    pub(super) fn next(&self) -> Option<Request> {
        Some(match self.at {
            At::Packs => Request::List("pack"),
            At::Manifests => Request::List("manifest"),
            At::WorkingSets => Request::List("ws"),
            At::Leases | At::LeasesAgain => Request::List("lease"),
            At::Tombs | At::TombsAgain => Request::List("tomb"),
            At::Pins | At::PinsAgain => Request::List("pin"),
            At::Snaps | At::SnapsAgain => Request::List("snap"),
            At::Fates | At::FatesAgain => Request::Fates(self.unread.clone()),
            At::Condemn => Request::Condemn(self.condemned.clone()),
            At::Settle => Request::Settle { txns: self.unsettled(), wait: !self.is_idle() },
            At::OwnCondemned => Request::OwnCondemned,
            At::Delete => Request::Delete(self.doomed.clone()),
            At::Release => Request::Release,
            At::End => return None,
        })
    }

    /// The run has decided what to condemn, and nothing was written yet.
    pub(super) fn is_about_to_condemn(&self) -> bool {
        self.at == At::Condemn
    }

    /// From here on objects are deleted.
    pub(super) fn is_about_to_delete(&self) -> bool {
        self.at == At::Delete
    }

    /// Takes the answer to [`Collector::next`]. An error is a surprise in a listing: the run must stop.
    pub(super) fn take(&mut self, answer: Answer) -> Result<(), String> {
        match (self.at, answer) {
            (At::Packs, Answer::Listed(listed)) => self.take_packs(listed)?,
            (At::Manifests | At::WorkingSets, Answer::Listed(listed)) => {
                self.take_others(listed)?
            }
            (At::Leases | At::LeasesAgain, Answer::Listed(listed)) => self.leases = ids(&listed)?,
            (At::Tombs | At::TombsAgain, Answer::Listed(listed)) => self.tombs = ids(&listed)?,
            (At::Pins | At::PinsAgain, Answer::Listed(listed)) => self.pins = ids(&listed)?,
            (At::Snaps | At::SnapsAgain, Answer::Listed(listed)) => self.take_snaps(&listed)?,
            (At::Fates | At::FatesAgain | At::Settle, Answer::Fates(fates)) => {
                self.fates.extend(fates)
            }
            (At::OwnCondemned, Answer::There(there)) => {
                // Somebody cleared it away: packers no longer see it, so nothing may go.
                self.at = if there { At::Delete } else { At::End };
                return Ok(());
            }
            (At::Condemn | At::Delete | At::Release, Answer::Done) => {}
            (at, answer) => return Err(format!("{answer:?} answers nothing at {at:?}")),
        }
        self.advance();
        Ok(())
    }

    fn take_packs(&mut self, listed: Vec<(String, u64)>) -> Result<(), String> {
        for (key, bytes) in listed {
            let pack = key.strip_prefix("pack/").and_then(|id| id.parse().ok());
            self.packs.insert(pack.ok_or_else(|| surprise(&key))?, bytes);
        }
        Ok(())
    }

    fn take_others(&mut self, listed: Vec<(String, u64)>) -> Result<(), String> {
        for (key, bytes) in listed {
            let owner = match key.split('/').collect::<Vec<_>>()[..] {
                ["manifest", txn] => txn.parse().ok(),
                ["ws", txn, _] => keys::sequence_of(&key).and_then(|_| txn.parse().ok()),
                _ => None,
            };
            let owner = owner.ok_or_else(|| surprise(&key))?;
            self.others.insert(key, (owner, bytes));
        }
        Ok(())
    }

    fn take_snaps(&mut self, listed: &[(String, u64)]) -> Result<(), String> {
        let there = ids(listed)?;
        if let Some(lost) = self.fates.keys().find(|id| !there.contains(id)) {
            return Err(format!("the decision snap/{lost} was there and is no longer listed"));
        }
        self.unread = there.into_iter().filter(|id| !self.fates.contains_key(id)).collect();
        Ok(())
    }

    fn advance(&mut self) {
        self.has_deleted |= self.at == At::Delete;
        self.at = match self.at {
            At::Packs => At::Manifests,
            At::Manifests => At::WorkingSets,
            At::WorkingSets => At::Leases,
            At::Leases => At::Tombs,
            At::Tombs => At::Pins,
            At::Pins => At::Snaps,
            At::Snaps => At::Fates,
            At::Fates => {
                self.mark();
                // A lease may be a dead packer's: it is ended now, and the next run takes what it wrote.
                if self.is_idle() && self.leases.is_empty() { At::End } else { At::Condemn }
            }
            At::Condemn => At::LeasesAgain,
            At::LeasesAgain => At::Settle,
            At::Settle => At::TombsAgain,
            At::TombsAgain => At::PinsAgain,
            At::PinsAgain => At::SnapsAgain,
            At::SnapsAgain => At::FatesAgain,
            At::FatesAgain => {
                self.mark_again();
                At::OwnCondemned
            }
            At::OwnCondemned | At::Delete => At::Release,
            At::Release | At::End => At::End,
        };
    }

    /// Whether nothing is condemned.
    fn is_idle(&self) -> bool {
        self.condemned.is_empty() && self.condemned_others.is_empty()
    }

    /// Whether a snapshot exists for somebody: not removed, or still served from.
    fn is_live(&self, txn: &SnapshotId) -> bool {
        matches!(self.fates.get(txn), Some(Fate::Committed(_)))
            && (!self.tombs.contains(txn) || self.pins.contains(txn))
    }

    /// The packs that live snapshots refer to.
    fn referenced(&self) -> BTreeSet<PackId> {
        let packs = |(txn, fate): (&SnapshotId, &Fate)| match fate {
            Fate::Committed(packs) if self.is_live(txn) => packs.clone(),
            _ => BTreeSet::new(),
        };
        self.fates.iter().flat_map(packs).collect()
    }

    /// Step G4: what no live snapshot refers to and no packer at work owns.
    fn mark(&mut self) {
        let referenced = self.referenced();
        let at_work = |txn: &SnapshotId| self.leases.contains(txn) && !self.fates.contains_key(txn);
        let packs =
            self.packs.keys().filter(|pack| !referenced.contains(pack) && !at_work(&pack.txn));
        self.condemned = packs.copied().collect();
        let others =
            self.others.iter().filter(|(_, (owner, _))| !self.is_live(owner) && !at_work(owner));
        self.condemned_others = others.map(|(key, _)| key.clone()).collect();
    }

    /// Step G7: who must have a decision before anything goes. Packers that began before the condemned
    /// list was durable may refer to what is on it; and a commit of an owner that is on its way must
    /// meet an abort.
    fn unsettled(&self) -> BTreeSet<SnapshotId> {
        let owners = self.condemned.iter().map(|pack| pack.txn);
        let others = self.condemned_others.iter().filter_map(|key| self.others.get(key));
        owners
            .chain(others.map(|(owner, _)| *owner))
            .chain(self.leases.iter().copied())
            .filter(|txn| !self.fates.contains_key(txn))
            .collect()
    }

    /// Step G8: what is live now stays; leases of decided transactions protect nothing any more.
    fn mark_again(&mut self) {
        let referenced = self.referenced();
        let packs = self.condemned.iter().filter(|pack| !referenced.contains(pack));
        let dead =
            |key: &&String| self.others.get(*key).is_some_and(|(owner, _)| !self.is_live(owner));
        let spent = self.leases.iter().filter(|txn| self.fates.contains_key(txn));
        self.doomed = spent
            .map(|txn| keys::lease(*txn))
            .chain(self.condemned_others.iter().filter(dead).cloned())
            .chain(packs.map(PackId::key))
            .collect();
    }

    /// What would go if nothing changed from now on: key, length, why.
    pub(super) fn plan(&self) -> Vec<(String, u64, &'static str)> {
        let packs = self.condemned.iter().map(|pack| {
            (pack.key(), self.packs.get(pack).copied().unwrap_or_default(), self.reason(&pack.txn))
        });
        let others = self.condemned_others.iter().filter_map(|key| {
            let (owner, bytes) = self.others.get(key)?;
            Some((key.clone(), *bytes, self.reason(owner)))
        });
        packs.chain(others).collect()
    }

    fn reason(&self, owner: &SnapshotId) -> &'static str {
        match self.fates.get(owner) {
            Some(Fate::Aborted) => "its packing was ended before it committed",
            Some(Fate::Committed(_)) => "its snapshot was removed and nobody serves from it",
            None => "its packer is gone and never committed",
        }
    }

    /// Snapshots that are live as far as is known.
    pub(super) fn live(&self) -> BTreeSet<SnapshotId> {
        self.fates.keys().filter(|txn| self.is_live(txn)).copied().collect()
    }

    /// Objects that a live snapshot needs and that were not listed: written since, or lost.
    pub(super) fn not_listed(&self) -> Vec<(String, SnapshotId)> {
        let mut missing = Vec::new();
        for (txn, fate) in self.fates.iter().filter(|(txn, _)| self.is_live(txn)) {
            let Fate::Committed(packs) = fate else { continue };
            let packs = packs.iter().filter(|pack| !self.packs.contains_key(pack));
            let manifest = Some(keys::manifest(*txn)).filter(|key| !self.others.contains_key(key));
            let keys = packs.map(PackId::key).chain(manifest);
            missing.extend(keys.map(|key| (key, *txn)));
        }
        missing
    }

    /// Bytes of all packs that were listed.
    pub(super) fn pack_bytes(&self) -> u64 {
        self.packs.values().sum()
    }

    /// What was deleted; nothing before all of it is.
    pub(super) fn deleted(&self) -> &[String] {
        if self.has_deleted { &self.doomed } else { &[] }
    }

    /// Whether a transaction is known to have a decision.
    pub(super) fn is_decided(&self, txn: &SnapshotId) -> bool {
        self.fates.contains_key(txn)
    }
}

fn ids(listed: &[(String, u64)]) -> Result<BTreeSet<SnapshotId>, String> {
    listed.iter().map(|(key, _)| keys::id_of(key).ok_or_else(|| surprise(key))).collect()
}

fn surprise(key: &str) -> String {
    format!("{key} is no key of this format")
}
