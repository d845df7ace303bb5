//! Records, manifests and names, and whether what they refer to is there: no byte of a pack is read.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, TryStreamExt};

use super::sample::Sample;
use super::{Findings, Level, Needed, is_finding};
use crate::format::keys::{self, NameKey};
use crate::format::manifest::{Manifest, Run};
use crate::format::record::{
    CollectionReport, Commit, Condemned, Decision, Halt, MAX_RECORD_BYTES, Marker, Record,
    Reference,
};
use crate::format::{Malformed, record};
use crate::objects::ListedObject;
use crate::store::{Store, read_record};
use crate::{Error, ErrorKind, SnapshotId};

/// Records that are read at the same time.
const PARALLEL_RECORDS: usize = 32;
/// Snapshots whose records and manifests are read at the same time: manifests may be long.
const PARALLEL_SNAPSHOTS: usize = 4;

impl Findings<'_> {
    /// Commit records, manifests, and headers of working sets.
    pub(super) async fn check_snapshots(
        &mut self,
        snapshots: &[SnapshotId],
        level: Level,
        sample: &mut Sample,
    ) -> Result<(), Error> {
        let store = self.store;
        let mut read = futures::stream::iter(snapshots)
            .map(|id| async move { (*id, store.read_snapshot(*id).await) })
            .buffered(PARALLEL_SNAPSHOTS);
        while let Some((id, read)) = read.next().await {
            self.report.snapshots += 1;
            match read {
                Ok((commit, manifest)) => {
                    self.report.records += 1;
                    sample.offer(&manifest);
                    self.need(&commit);
                    // Its frames and all are read later.
                    if level != Level::Everything {
                        self.check_working_set_headers(&commit, &manifest).await?;
                    }
                }
                Err(error) => self.unreadable(id, error).await?,
            }
        }
        Ok(())
    }

    fn need(&mut self, commit: &Commit) {
        for pack in &commit.packs {
            let new = Needed { bytes: pack.bytes, snapshots: Vec::new(), is_lost: false };
            self.needed.entry(pack.pack).or_insert(new).snapshots.push(commit.snapshot);
        }
    }

    /// A snapshot without a usable commit record or manifest.
    pub(super) async fn unreadable(&mut self, id: SnapshotId, error: Error) -> Result<(), Error> {
        if !is_finding(&error) {
            return Err(error);
        }
        if error.kind() == ErrorKind::Damaged {
            self.problem(id, error);
            return Ok(());
        }
        match read_record::<Decision>(self.store.objects(), &keys::snap(id)).await {
            // Listed among the decisions, and decided otherwise.
            Ok(Decision::Abort(_)) => self.report.snapshots -= 1,
            Ok(Decision::Commit(_)) => self.missing(id, &keys::manifest(id), &error).await?,
            Err(error) if is_finding(&error) => self.problem(id, error),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn check_working_set_headers(
        &mut self,
        commit: &Commit,
        manifest: &Manifest,
    ) -> Result<(), Error> {
        let runs = |file: usize| runs_of(manifest, file);
        for listed in self.store.working_sets(commit.snapshot).await? {
            let (id, hash) = (commit.snapshot, commit.manifest_hash);
            match self.store.bound_working_set(id, hash, runs, listed, None).await {
                Ok(_) => self.report.working_sets += 1,
                // It costs speed only, and the rest is to be looked at.
                Err(error) if is_finding(&error) => self.report.warnings.push(error.to_string()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Everything but snapshots: names and their history, removals, what collectors, packers and nodes
    /// wrote.
    pub(super) async fn check_other_records(&mut self) -> Result<(), Error> {
        let objects = self.store.objects();
        let decided: BTreeSet<SnapshotId> =
            objects.list("snap/").await?.iter().filter_map(|one| keys::id_of(&one.key)).collect();
        self.check_names(&decided).await?;
        self.check_aborts(&decided).await?;
        for prefix in ["tomb/", "lease/", "pin/", "gc/"] {
            let listed = objects.list(prefix).await?;
            let read = futures::stream::iter(listed)
                .map(|object| check_record(self.store, object))
                .buffered(PARALLEL_RECORDS);
            let read: Vec<_> = read.try_collect().await?;
            self.report.records += read.len() as u64;
            // Their keys say what counts; what is in them is for people.
            self.report.warnings.extend(read.into_iter().flatten());
        }
        Ok(())
    }

    /// Every record of every name. The newest decides what it stands for; a removed snapshot is no problem.
    async fn check_names(&mut self, decided: &BTreeSet<SnapshotId>) -> Result<(), Error> {
        let mut newest: BTreeMap<String, (u64, Result<SnapshotId, String>)> = BTreeMap::new();
        let listed = self.store.objects().list("ref/").await?;
        let store = self.store;
        let is_hint = |key: &str| matches!(keys::name_key(key), Some(NameKey::Hint(..)));
        let records = listed.into_iter().filter(|object| !is_hint(&object.key));
        let mut read = futures::stream::iter(records)
            .map(|object| async move { read_reference(store, &object.key).await })
            .buffered(PARALLEL_RECORDS);
        while let Some(read) = read.next().await {
            self.report.records += 1;
            let (name, sequence, read) = read?;
            if let Err(why) = &read {
                self.report.problems.push(why.clone());
            }
            newest.insert(name, (sequence, read));
        }
        for (name, (_, stands_for)) in newest {
            if let Ok(id) = stands_for
                && !decided.contains(&id)
            {
                let text = format!("name {name}: stands for snapshot {id}, which has no record");
                self.report.problems.push(text);
            }
        }
        Ok(())
    }

    /// Decisions of removed snapshots and of packers that were given up: nobody reads them but collectors,
    /// who stop at one that is damaged.
    async fn check_aborts(&mut self, decided: &BTreeSet<SnapshotId>) -> Result<(), Error> {
        let live: BTreeSet<SnapshotId> = self.store.ids().await?.into_iter().collect();
        let store = self.store;
        let mut read = futures::stream::iter(decided.difference(&live).copied())
            .map(
                |id| async move { read_record::<Decision>(store.objects(), &keys::snap(id)).await },
            )
            .buffered(PARALLEL_RECORDS);
        while let Some(read) = read.next().await {
            self.report.records += 1;
            match read {
                Ok(_) => {}
                Err(error) if is_finding(&error) => self.report.problems.push(error.to_string()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The runs of a file; none where there is no such file.
pub(super) fn runs_of(manifest: &Manifest, file: usize) -> &[Run] {
    manifest.files.get(file).map_or(&[], |(_, runs)| runs.as_slice())
}

/// A name's record: name, sequence, and what it stands for or what is wrong.
async fn read_reference(
    store: &Store,
    key: &str,
) -> Result<(String, u64, Result<SnapshotId, String>), Error> {
    let name = key.split('/').nth(1).unwrap_or_default().to_owned();
    let (Some(parsed), Some(sequence)) = (keys::name_of(key), keys::sequence_of(key)) else {
        return Ok((name, 0, Err(format!("{key}: is no key of this format"))));
    };
    match read_record::<Reference>(store.objects(), key).await {
        Ok(read) if read.name == parsed.as_str() && read.sequence == sequence => {
            Ok((name, sequence, Ok(read.snapshot)))
        }
        Ok(_) => Ok((name, sequence, Err(format!("{key}: belongs to another name")))),
        Err(error) if is_finding(&error) => Ok((name, sequence, Err(error.to_string()))),
        Err(error) => Err(error),
    }
}

/// What is wrong with a record of a collector, a packer, a node or a removal; nothing where it is gone.
async fn check_record(store: &Store, object: ListedObject) -> Result<Option<String>, Error> {
    let key = &object.key;
    let bytes = match store.objects().get(key, MAX_RECORD_BYTES).await {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) if is_finding(&error) => return Ok(Some(error.to_string())),
        Err(error) => return Err(error),
    };
    let checked = match key.split('/').collect::<Vec<_>>()[..] {
        ["gc", "condemned", _] => checked::<Condemned>(&bytes),
        ["gc", "report", _] => checked::<CollectionReport>(&bytes),
        ["gc", "probe", _] => Ok(()),
        ["gc", "HALT"] => checked::<Halt>(&bytes),
        ["tomb" | "lease", id] | ["pin", _, _, id] => {
            record::unseal::<Marker>(&bytes).and_then(|marker| {
                let same = marker.snapshot.to_string() == id;
                crate::format::require(same, "it is about another snapshot")
            })
        }
        _ => Err("it is no key of this format".into()),
    };
    Ok(checked.err().map(|why| format!("{key}: {why}")))
}

fn checked<T: Record>(bytes: &[u8]) -> Result<(), Malformed> {
    record::unseal::<T>(bytes).map(|_| ())
}
