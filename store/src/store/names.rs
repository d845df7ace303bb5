//! Names: what they stand for, and moving them.
//!
//! A name is a sequence of create-only records, of which the newest counts: finding it takes a listing and a read, one
//! after the other. Beside each record lies a hint, an empty object whose key holds the snapshot's id, so that the same
//! listing tells which snapshot it will be; whoever opens it at once has it by the time the record is read. Only the
//! record decides.

use std::collections::BTreeMap;

use futures::{StreamExt, TryStreamExt};

use super::{SEQUENCE_TRIES, Store, newest_of, read_record};
use crate::format::keys::{self, NameKey};
use crate::format::record::{self, Reference};
use crate::{Error, ErrorKind, Name, SnapshotId};

/// Records that are read at the same time when many are.
const PARALLEL_READS: usize = 32;

/// A name and what it stands for.
#[derive(Clone, Debug)]
pub struct Named {
    /// The name.
    pub name: Name,
    /// What it stands for.
    pub snapshot: SnapshotId,
    /// Since when, milliseconds since 1970.
    pub since_unix_ms: u64,
}

/// What a listing tells about a name.
pub(crate) struct LookedUp {
    /// Of the record that counts.
    sequence: u64,
    /// That record, if it was read meanwhile.
    record: Option<Reference>,
    /// What it will stand for, very likely.
    pub(crate) hint: Option<SnapshotId>,
}

impl Store {
    /// What `name` stands for.
    pub async fn resolve(&self, name: &Name) -> Result<SnapshotId, Error> {
        let looked_up = self.look_up(name).await?;
        self.read_name(name, looked_up).await
    }

    /// Which record of `name` counts.
    pub(crate) async fn look_up(&self, name: &Name) -> Result<LookedUp, Error> {
        // Most names are given once: the first record is read while it is asked which is the newest.
        let records = keys::refs(name);
        let (listed, first) =
            futures::join!(self.objects.list(&records), self.reference(name, keys::FIRST_SEQUENCE));
        let listed = listed?;
        let sequence = newest_of(&listed).ok_or_else(|| {
            let text = "there is no snapshot of this name: 'reap-pack ls' lists them";
            Error::not_found(name, text)
        })?;
        let hint = listed.iter().find_map(|object| match keys::name_key(&object.key)? {
            NameKey::Hint(of, snapshot) if of == sequence => Some(snapshot),
            _ => None,
        });
        let record = first.ok().filter(|_| sequence == keys::FIRST_SEQUENCE);
        Ok(LookedUp { sequence, record, hint })
    }

    /// What the record that counts says.
    pub(crate) async fn read_name(
        &self,
        name: &Name,
        looked_up: LookedUp,
    ) -> Result<SnapshotId, Error> {
        match looked_up.record {
            Some(record) => Ok(record.snapshot),
            None => Ok(self.reference(name, looked_up.sequence).await?.snapshot),
        }
    }

    async fn reference(&self, name: &Name, sequence: u64) -> Result<Reference, Error> {
        let key = keys::reference(name, sequence);
        let reference: Reference = read_record(&self.objects, &key).await?;
        if reference.name != name.as_str() || reference.sequence != sequence {
            return Err(Error::damaged(key, "belongs to another name"));
        }
        Ok(reference)
    }

    /// All names and what they stand for, removed snapshots left out; by name.
    pub async fn names(&self) -> Result<Vec<Named>, Error> {
        let (refs, removed) =
            futures::try_join!(self.objects.list("ref/"), self.ids_under("tomb/"))?;
        let mut newest = BTreeMap::new();
        for object in refs {
            let name = keys::name_of(&object.key);
            let (Some(name), Some(key)) = (name, keys::name_key(&object.key)) else {
                return Err(Error::damaged(object.key, "is not a key that this program knows"));
            };
            if let NameKey::Record(sequence) = key {
                newest.insert(name, sequence);
            }
        }
        let named = futures::stream::iter(newest)
            .map(|(name, sequence)| async move {
                let reference = self.reference(&name, sequence).await?;
                let (snapshot, since_unix_ms) = (reference.snapshot, reference.created_unix_ms);
                Ok::<_, Error>(Named { name, snapshot, since_unix_ms })
            })
            .buffered(PARALLEL_READS)
            .try_collect::<Vec<_>>()
            .await?;
        let kept = |named: &Named| removed.binary_search(&named.snapshot).is_err();
        Ok(named.into_iter().filter(kept).collect())
    }

    /// Makes `name` stand for `snapshot` from now on; answers with the record's sequence.
    pub async fn tag(&self, name: &Name, snapshot: SnapshotId) -> Result<u64, Error> {
        let nonce = SnapshotId::random();
        let record = |sequence| name_record(name, sequence, snapshot, nonce);
        let sequence = self.create_next(&keys::refs(name), record).await?;
        self.leave_hint(name, sequence, snapshot).await;
        Ok(sequence)
    }

    /// Makes `name` stand for `to` if it stands for `from` now; says whether it does.
    pub(crate) async fn move_name(
        &self,
        name: &Name,
        from: SnapshotId,
        to: SnapshotId,
    ) -> Result<bool, Error> {
        let nonce = SnapshotId::random();
        for _ in 0..SEQUENCE_TRIES {
            let Some(newest) = self.newest_sequence(&keys::refs(name)).await? else {
                return Ok(false);
            };
            if self.reference(name, newest).await?.snapshot != from {
                return Ok(false);
            }
            let next = keys::next_sequence(&keys::refs(name), Some(newest))?;
            let (key, chunks) = name_record(name, next, to, nonce);
            match self.objects.create(&key, &chunks).await {
                Ok(()) => {
                    self.leave_hint(name, next, to).await;
                    return Ok(true);
                }
                // Somebody moved it meanwhile, perhaps elsewhere.
                Err(error) if error.kind() == ErrorKind::Exists => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::refused(name, "others move it all the time: try again"))
    }

    /// After the record, so that there is no hint to a record that lost. Without one, opening by name takes a round more.
    async fn leave_hint(&self, name: &Name, sequence: u64, snapshot: SnapshotId) {
        let key = keys::hint(name, sequence, snapshot);
        if let Err(error) = self.objects.create(&key, &[bytes::Bytes::new()]).await {
            tracing::warn!("{key}: {error}");
        }
    }
}

/// The record that makes `name` stand for `snapshot`: its key and its bytes.
fn name_record(
    name: &Name,
    sequence: u64,
    snapshot: SnapshotId,
    nonce: SnapshotId,
) -> (String, Vec<bytes::Bytes>) {
    let reference = Reference {
        name: name.to_string(),
        sequence,
        snapshot,
        nonce,
        created_unix_ms: record::now_unix_ms(),
    };
    (keys::reference(name, sequence), vec![record::seal(&reference).into()])
}
