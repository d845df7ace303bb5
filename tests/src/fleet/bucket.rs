//! The bucket as it is, read past the proxy and past the code under test as far as that is possible.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use reap_store::SnapshotId;
use reap_store::format::keys::{self, PackId};
use reap_store::format::record::{Commit, Decision, MAX_RECORD_BYTES, unseal};
use reap_store::objects::Objects;
use tokio::runtime::Runtime;

pub(super) type Live = BTreeMap<SnapshotId, Commit>;

pub(super) struct Bucket {
    objects: Objects,
    runtime: Runtime,
    /// Decisions never change: each is read once.
    decisions: parking_lot::Mutex<BTreeMap<SnapshotId, Option<Commit>>>,
}

impl Bucket {
    pub(super) fn connect(url: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let objects = Objects::connect(url, false)?;
        Ok(Self { objects, runtime, decisions: parking_lot::Mutex::default() })
    }

    /// Keys and lengths below a prefix.
    fn list(&self, prefix: &str) -> Result<BTreeMap<String, u64>> {
        let listed = self.runtime.block_on(self.objects.list(prefix))?;
        Ok(listed.into_iter().map(|object| (object.key, object.bytes)).collect())
    }

    fn ids(&self, prefix: &str) -> Result<BTreeSet<SnapshotId>> {
        let id = |key: &String| keys::id_of(key).with_context(|| format!("{key} is no id"));
        self.list(prefix)?.keys().map(id).collect()
    }

    fn decide(&self) -> Result<()> {
        let known: BTreeSet<_> = self.decisions.lock().keys().copied().collect();
        for id in self.ids("snap/")?.difference(&known) {
            let key = keys::snap(*id);
            let bytes = self.runtime.block_on(self.objects.get(&key, MAX_RECORD_BYTES))?;
            let decision =
                unseal::<Decision>(&bytes).map_err(|why| anyhow::anyhow!("{id}: {why}"))?;
            let commit = match decision {
                Decision::Commit(commit) => Some(*commit),
                Decision::Abort(_) => None,
            };
            self.decisions.lock().insert(*id, commit);
        }
        Ok(())
    }

    /// Snapshots that are committed and not removed.
    pub(super) fn live(&self) -> Result<Live> {
        self.decide()?;
        let removed = self.ids("tomb/")?;
        let decisions = self.decisions.lock();
        let live = decisions.iter().filter(|(id, _)| !removed.contains(id));
        Ok(live.filter_map(|(id, commit)| Some((*id, commit.clone()?))).collect())
    }

    /// How many transactions collectors have ended.
    pub(super) fn aborted(&self) -> Result<u64> {
        self.decide()?;
        Ok(self.decisions.lock().values().filter(|commit| commit.is_none()).count() as u64)
    }

    /// Every object that a live snapshot names is there and as long as it says; nobody halted collection.
    pub(super) fn require_nothing_dangling(&self, live: &Live) -> Result<()> {
        let objects = [self.list("pack/")?, self.list("manifest/")?];
        for (id, commit) in live {
            let packs = commit.packs.iter().map(|pack| (pack.pack.key(), pack.bytes));
            let named = packs.chain([(keys::manifest(*id), commit.manifest_bytes)]);
            for (key, bytes) in named {
                let found = objects.iter().find_map(|listed| listed.get(&key));
                ensure!(found == Some(&bytes), "{id} names {key} of {bytes} bytes: {found:?}");
            }
        }
        let halted = self.list("gc/")?.contains_key(keys::HALT);
        ensure!(!halted, "collection is halted, and nothing is missing");
        Ok(())
    }

    /// There are no packs, manifests, working sets and leases but those of live snapshots.
    pub(super) fn require_nothing_else(&self, live: &Live) -> Result<()> {
        let packs = live.values().flat_map(|commit| &commit.packs).map(|pack| pack.pack.key());
        let wanted: BTreeSet<_> = packs.chain(live.keys().map(|id| keys::manifest(*id))).collect();
        for prefix in ["pack/", "manifest/", "ws/", "lease/"] {
            for (key, bytes) in self.list(prefix)? {
                ensure!(wanted.contains(&key), "garbage is left: {key}, {bytes} bytes");
            }
        }
        Ok(())
    }

    /// References of live snapshots to packs whose own snapshots are removed.
    pub(super) fn shares_with_removed(
        &self,
        live: &Live,
    ) -> Result<BTreeSet<(SnapshotId, PackId)>> {
        let removed = self.ids("tomb/")?;
        let references = live
            .iter()
            .flat_map(|(id, commit)| commit.packs.iter().map(move |pack| (*id, pack.pack)));
        Ok(references.filter(|(_, pack)| removed.contains(&pack.txn)).collect())
    }

    /// As an operator does for nodes that will not come back; answers how many there were.
    pub(super) fn remove_pins(&self) -> Result<u64> {
        let pins: Vec<_> = self.list("pin/")?.into_keys().collect();
        self.runtime.block_on(self.objects.delete_all(&pins))?;
        Ok(pins.len() as u64)
    }
}
