//! What is wrong with some snapshots, and what can be done about it. Reads, and changes nothing.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use bytes::Bytes;

use super::{Loss, Repaired, RestoredObject, RewrittenSnapshot, Spares};
use crate::format::frame::FrameEntry;
use crate::format::keys::{self, PackId};
use crate::format::manifest::{self, MAX_MANIFEST_BYTES, Manifest};
use crate::format::pack::MAX_PACK_BYTES;
use crate::format::record;
use crate::format::record::{Commit, Decision, MAX_RECORD_BYTES, PackRef};
use crate::format::working_set::MAX_OBJECT_BYTES;
use crate::id::Hash;
use crate::store::Store;
use crate::verify::{decode_pack, decode_working_set, is_finding};
use crate::{Error, ErrorKind, SnapshotId};

/// Everything that can be done, in an order that leaves every object whole whenever it ends.
#[derive(Default)]
pub(super) struct Plan {
    /// Missing objects: packs first, commit records last.
    pub(super) objects: Vec<Missing>,
    pub(super) rewrites: Vec<Rewritten>,
    /// Damaged working sets that the other store has, to be published again under a later number.
    pub(super) working_sets: Vec<(SnapshotId, Bytes)>,
    pub(super) bad_packs: HashSet<PackId>,
    lost: Vec<Loss>,
    warnings: Vec<String>,
}

/// A missing object, which the other store has.
pub(super) struct Missing {
    pub(super) key: String,
    pub(super) bytes: u64,
    pub(super) hash: Hash,
    /// Who needs it.
    pub(super) snapshots: BTreeSet<SnapshotId>,
}

/// A snapshot that is to be written once more.
pub(super) struct Rewritten {
    pub(super) id: SnapshotId,
    /// As they were committed, wherever they were read.
    pub(super) commit: Commit,
    pub(super) manifest: Manifest,
    /// Its commit record is good, so that it may be a parent.
    pub(super) has_record: bool,
    objects: Vec<String>,
    frames: u64,
}

/// A snapshot whose records are known.
struct Known {
    commit: Commit,
    manifest: Manifest,
    /// Objects that are there and wrong.
    damaged: Vec<String>,
    /// Objects that are not there and can be created again.
    missing: Vec<Missing>,
    has_record: bool,
}

impl Plan {
    /// Looks at every record and every pack of `ids`.
    pub(super) async fn make(
        store: &Store,
        spares: &mut Spares,
        ids: &[SnapshotId],
    ) -> Result<Self, Error> {
        let mut plan = Self::default();
        let mut known = BTreeMap::new();
        for id in ids {
            if let Some(mut one) = plan.read_records(store, spares, *id).await? {
                plan.look_at_working_sets(store, spares, &mut one).await?;
                known.insert(*id, one);
            }
        }
        let mut packs: BTreeMap<PackId, PackRef> = BTreeMap::new();
        for one in known.values() {
            packs.extend(one.commit.packs.iter().map(|pack| (pack.pack, pack.clone())));
        }
        let mut restorable = BTreeMap::new();
        for (id, pack) in packs {
            match plan.look_at_pack(store, spares, &pack).await? {
                State::Good => {}
                State::Restorable => {
                    restorable.insert(id, pack);
                }
                State::Bad => {
                    plan.bad_packs.insert(id);
                }
            }
        }
        let bad = known.values().flat_map(|one| frames_in(&one.manifest, &plan.bad_packs));
        let wanted: HashSet<Hash> = bad.map(|(_, entry)| entry.hash).collect();
        spares.look_elsewhere(&wanted, &plan.bad_packs).await?;
        plan.decide(spares, known, &restorable).await?;
        Ok(plan)
    }

    /// There is nothing to do.
    pub(super) fn is_empty(&self) -> bool {
        self.objects.is_empty() && self.rewrites.is_empty() && self.working_sets.is_empty()
    }

    /// For people.
    pub(super) fn report(&self, snapshots: usize) -> Repaired {
        let restored = |one: &Missing| RestoredObject { key: one.key.clone(), bytes: one.bytes };
        let rewritten = |one: &Rewritten| RewrittenSnapshot {
            snapshot: one.id,
            objects: one.objects.clone(),
            frames: one.frames,
        };
        Repaired {
            snapshots: snapshots as u64,
            objects: self.objects.iter().map(restored).collect(),
            rewrites: self.rewrites.iter().map(rewritten).collect(),
            lost: self.lost.clone(),
            warnings: self.warnings.clone(),
            working_sets: self.working_sets.len() as u64,
            ..Repaired::default()
        }
    }

    fn lose(&mut self, snapshot: SnapshotId, object: String, what: impl std::fmt::Display) {
        self.lost.push(Loss { snapshot, object, what: what.to_string() });
    }

    /// Commit record and manifest, from the store or from the other one.
    async fn read_records(
        &mut self,
        store: &Store,
        spares: &Spares,
        id: SnapshotId,
    ) -> Result<Option<Known>, Error> {
        let (mut damaged, mut missing) = (Vec::new(), Vec::new());
        let mut has_record = true;
        let commit = match store.commit(id).await {
            Ok(commit) => commit,
            Err(error) if is_finding(&error) => {
                let key = keys::snap(id);
                if store.objects().exists(&key).await? && error.kind() == ErrorKind::NotFound {
                    // Its packer was given up: there is nothing to bring back.
                    return Ok(None);
                }
                let Some((commit, object)) = committed_elsewhere(spares, id).await? else {
                    self.lose(id, key, error);
                    return Ok(None);
                };
                match error.kind() {
                    ErrorKind::NotFound => missing.push(Missing::of(key, &object, id)),
                    _ => {
                        damaged.push(key);
                        has_record = false;
                    }
                }
                commit
            }
            Err(error) => return Err(error),
        };
        let key = keys::manifest(id);
        let hash = commit.manifest_hash;
        let object = match store.objects().get(&key, MAX_MANIFEST_BYTES).await {
            Ok(object) if Hash::of(&object) == hash => object,
            Ok(_) => match spares.object(&key, commit.manifest_bytes, hash).await? {
                Some(object) => {
                    damaged.push(key.clone());
                    object
                }
                None => {
                    self.lose(id, key, "does not match the hash in its commit record");
                    return Ok(None);
                }
            },
            Err(error) if is_finding(&error) => {
                match spares.object(&key, commit.manifest_bytes, hash).await? {
                    Some(object) => {
                        match error.kind() {
                            ErrorKind::NotFound => {
                                missing.push(Missing::of(key.clone(), &object, id))
                            }
                            _ => damaged.push(key.clone()),
                        }
                        object
                    }
                    None => {
                        self.lose(id, key, error);
                        return Ok(None);
                    }
                }
            }
            Err(error) => return Err(error),
        };
        match manifest::decode(&object) {
            Ok(manifest) => Ok(Some(Known { commit, manifest, damaged, missing, has_record })),
            Err(why) => {
                self.lose(id, key, why);
                Ok(None)
            }
        }
    }

    /// They cost speed only; but what the other store has is brought back.
    async fn look_at_working_sets(
        &mut self,
        store: &Store,
        spares: &Spares,
        one: &mut Known,
    ) -> Result<(), Error> {
        let id = one.commit.snapshot;
        let mut usable = BTreeMap::new();
        for listed in store.working_sets(id).await? {
            let read = read_working_set(store, one, listed.sequence).await?;
            usable.insert(listed.sequence, read.is_some());
        }
        let newest_usable = usable.iter().filter(|(_, usable)| **usable).map(|(at, _)| *at).max();
        let theirs = match spares.from() {
            Some(from) => from.working_sets(id).await?,
            None => Vec::new(),
        };
        let mut brought_back = BTreeSet::new();
        for listed in theirs {
            let is_there = usable.get(&listed.sequence);
            let is_newer = Some(listed.sequence) > newest_usable;
            if is_there == Some(&true) || (is_there == Some(&false) && !is_newer) {
                continue;
            }
            let Some(from) = spares.from() else { continue };
            let Some(object) = read_working_set(from, one, listed.sequence).await? else {
                continue;
            };
            let key = keys::working_set(id, listed.sequence);
            match is_there {
                None => one.missing.push(Missing::of(key, &object, id)),
                Some(_) => {
                    brought_back.insert(listed.sequence);
                    self.working_sets.push((id, object));
                }
            }
        }
        for (sequence, usable) in usable {
            if !usable && !brought_back.contains(&sequence) {
                let key = keys::working_set(id, sequence);
                self.warnings.push(format!("{key}: is damaged, and is passed over"));
            }
        }
        Ok(())
    }

    /// Reads a pack whole.
    async fn look_at_pack(
        &mut self,
        store: &Store,
        spares: &Spares,
        pack: &PackRef,
    ) -> Result<State, Error> {
        let key = pack.pack.key();
        match store.objects().get(&key, MAX_PACK_BYTES).await {
            Ok(object) => {
                let reference = pack.clone();
                let decode = move || decode_pack(&reference, &object);
                let decoded = tokio::task::spawn_blocking(decode).await;
                let decoded = decoded.map_err(|error| Error::local(&key, error))?;
                Ok(if decoded.is_ok() { State::Good } else { State::Bad })
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let spare = spares.pack(pack).await?;
                Ok(if spare.is_some() { State::Restorable } else { State::Bad })
            }
            Err(error) if is_finding(&error) => Ok(State::Bad),
            Err(error) => Err(error),
        }
    }

    /// What becomes of each snapshot.
    async fn decide(
        &mut self,
        spares: &Spares,
        known: BTreeMap<SnapshotId, Known>,
        restorable: &BTreeMap<PackId, PackRef>,
    ) -> Result<(), Error> {
        let mut objects: BTreeMap<(u8, String), Missing> = BTreeMap::new();
        // Asked for once, however many snapshots need them.
        let mut found: BTreeMap<(PackId, u64), bool> = BTreeMap::new();
        for (id, one) in known {
            let bad = frames_in(&one.manifest, &self.bad_packs);
            let (mut lost, mut frames) = (BTreeMap::<PackId, u64>::new(), 0);
            for (pack, entry) in bad {
                let place = (pack, entry.offset);
                let is_found = match found.get(&place) {
                    Some(is_found) => *is_found,
                    None => spares.frame(pack, entry).await?.is_some(),
                };
                found.insert(place, is_found);
                frames += 1;
                if !is_found {
                    *lost.entry(pack).or_default() += u64::from(entry.pages);
                }
            }
            for (pack, pages) in &lost {
                let text = format!("{pages} pages of it are nowhere to be had");
                self.lose(id, pack.key(), text);
            }
            if !lost.is_empty() {
                continue;
            }
            let packs: BTreeSet<PackId> = one.commit.packs.iter().map(|pack| pack.pack).collect();
            let needed = packs.iter().filter_map(|pack| restorable.get(pack));
            for missing in needed.map(|pack| Missing::pack(pack, id)).chain(one.missing) {
                let key = (missing.rank(), missing.key.clone());
                objects.entry(key).or_insert(missing).snapshots.insert(id);
            }
            let bad = packs.iter().filter(|pack| self.bad_packs.contains(pack)).map(PackId::key);
            let wrong: Vec<String> = one.damaged.into_iter().chain(bad).collect();
            if !wrong.is_empty() {
                let (commit, manifest, has_record) = (one.commit, one.manifest, one.has_record);
                self.rewrites.push(Rewritten {
                    id,
                    commit,
                    manifest,
                    has_record,
                    objects: wrong,
                    frames,
                });
            }
        }
        self.objects = objects.into_values().collect();
        Ok(())
    }
}

enum State {
    Good,
    /// Missing, and the other store has it.
    Restorable,
    /// Damaged, or missing everywhere: its frames may be had.
    Bad,
}

impl Missing {
    fn of(key: String, object: &Bytes, id: SnapshotId) -> Self {
        Self { key, bytes: object.len() as u64, hash: Hash::of(object), snapshots: [id].into() }
    }

    fn pack(pack: &PackRef, id: SnapshotId) -> Self {
        let snapshots = [id].into();
        Self { key: pack.pack.key(), bytes: pack.bytes, hash: pack.hash, snapshots }
    }

    /// In the order in which a packer writes: what a record refers to is there before it.
    fn rank(&self) -> u8 {
        match self.key.split('/').next() {
            Some("pack") => 0,
            Some("manifest") => 1,
            Some("ws") => 2,
            _ => 3,
        }
    }
}

/// A working set of a store, if it is one of this snapshot and whole.
async fn read_working_set(
    store: &Store,
    one: &Known,
    sequence: u64,
) -> Result<Option<Bytes>, Error> {
    let id = one.commit.snapshot;
    let key = keys::working_set(id, sequence);
    match store.objects().get(&key, MAX_OBJECT_BYTES).await {
        Ok(object) => {
            let read = decode_working_set(id, one.commit.manifest_hash, &one.manifest, &object);
            Ok(read.is_ok().then_some(object))
        }
        Err(error) if is_finding(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The frames of a snapshot that lie in some packs.
fn frames_in(manifest: &Manifest, packs: &HashSet<PackId>) -> Vec<(PackId, FrameEntry)> {
    let place = |packed: &manifest::PackedFrame| {
        let (pack, _) = manifest.packs[packed.pack as usize];
        packs.contains(&pack).then_some((pack, packed.entry))
    };
    manifest.frames.iter().filter_map(place).collect()
}

/// The commit record of a snapshot in the other store, if that is a replica of this one.
async fn committed_elsewhere(
    spares: &Spares,
    id: SnapshotId,
) -> Result<Option<(Commit, Bytes)>, Error> {
    let Some(from) = spares.from() else { return Ok(None) };
    let object = match from.objects().get(&keys::snap(id), MAX_RECORD_BYTES).await {
        Ok(object) => object,
        Err(error) if is_finding(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    Ok(match record::unseal::<Decision>(&object) {
        Ok(Decision::Commit(commit)) if commit.snapshot == id => Some((*commit, object)),
        _ => None,
    })
}
