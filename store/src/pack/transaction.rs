//! One packing transaction, in the order of the collection protocol.

use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Runtime;

use super::lease::Lease;
use super::{Filled, Packed, Request};
use crate::format::keys;
use crate::format::manifest;
use crate::format::record::{self, Commit, Decision, FileRecord, MAX_RECORD_BYTES};
use crate::id::Hash;
use crate::store::{Store, read_record};
use crate::{Error, ErrorKind, SnapshotId};

/// A packer that took longer gives up before it commits; part of the protocol.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// How long an unknown outcome of the commit is asked for.
const DOUBT: Duration = Duration::from_secs(120);

pub(super) struct Transaction<'a> {
    id: SnapshotId,
    store: &'a Store,
    runtime: &'a Runtime,
    began: Instant,
    lease: Mutex<Option<Lease>>,
}

impl<'a> Transaction<'a> {
    /// Takes a new id and a lease on it, which is durable before anything else is written.
    pub(super) fn begin(store: &'a Store, runtime: &'a Runtime) -> Result<Self, Error> {
        let id = SnapshotId::random();
        let lease = runtime.block_on(Lease::take(store, id))?;
        Ok(Self { id, store, runtime, began: Instant::now(), lease: Mutex::new(Some(lease)) })
    }

    pub(super) fn id(&self) -> SnapshotId {
        self.id
    }

    pub(super) fn store(&self) -> &'a Store {
        self.store
    }

    pub(super) fn runtime(&self) -> &'a Runtime {
        self.runtime
    }

    /// Writes manifest, commit record and name; all packs are in the store.
    pub(super) fn commit(&self, request: &Request, filled: Filled) -> Result<Packed, Error> {
        self.runtime.block_on(self.write_records(request, filled))
    }

    async fn write_records(&self, request: &Request, filled: Filled) -> Result<Packed, Error> {
        let Filled { manifest, statistics, packs, parents } = filled;
        let object =
            manifest::encode(&manifest).map_err(|error| Error::local(&request.name, error))?;
        let files = manifest.files.iter().map(|(file, _)| FileRecord {
            name: file.name.clone(),
            kind: file.kind,
            bytes: file.size,
        });
        let commit = Commit {
            snapshot: self.id,
            nonce: SnapshotId::random(),
            created_unix_ms: record::now_unix_ms(),
            name: request.name.to_string(),
            manifest_hash: Hash::of(&object),
            manifest_bytes: object.len() as u64,
            packs,
            files: files.collect(),
            parents: parents.clone(),
            labels: request.labels.clone(),
            statistics,
        };
        let (file_bytes, manifest_bytes) =
            (commit.files.iter().map(|file| file.bytes).sum(), commit.manifest_bytes);
        self.store.objects().create(&keys::manifest(self.id), &[object.into()]).await?;
        self.decide(commit).await?;
        let sequence = match request.replaces {
            None => Some(self.store.tag(&request.name, self.id).await?),
            // Names are moved one by one, each only if it still stands for what is replaced.
            Some(_) => None,
        };
        let (id, name) = (self.id, request.name.clone());
        Ok(Packed { id, name, sequence, statistics, file_bytes, manifest_bytes, parents })
    }

    /// Creates the commit record. From then on the snapshot exists.
    async fn decide(&self, commit: Commit) -> Result<(), Error> {
        if self.began.elapsed() > LONGEST {
            return Err(Error::refused(self.id, "packing took over 24 hours: start it again"));
        }
        let key = keys::snap(self.id);
        let nonce = commit.nonce;
        let sealed = record::seal(&Decision::Commit(Box::new(commit)));
        if sealed.len() as u64 > MAX_RECORD_BYTES {
            return Err(Error::refused(self.id, "refers to too many packs: repack it first"));
        }
        let doubt_began = Instant::now();
        loop {
            let created = self.store.objects().create(&key, &[sealed.clone().into()]).await;
            let doubtful = match created {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Exists => {
                    return self.read_decision(&key, nonce).await;
                }
                Err(error) => error,
            };
            // It may have arrived all the same; asking again is safe, guessing is not.
            if doubtful.kind() != ErrorKind::Unreachable || doubt_began.elapsed() > DOUBT {
                return Err(doubtful);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    async fn read_decision(&self, key: &str, nonce: SnapshotId) -> Result<(), Error> {
        match read_record::<Decision>(self.store.objects(), key).await? {
            Decision::Commit(commit) if commit.nonce == nonce => Ok(()),
            Decision::Commit(_) => Err(Error::exists(key, "was written by somebody else")),
            Decision::Abort(abort) => {
                let text =
                    format!("a collector ended this packing ({}): start it again", abort.reason);
                Err(Error::refused(self.id, text))
            }
        }
    }

    /// Gives up the lease, whatever came of it. What an unfinished transaction wrote is garbage
    /// that the collector takes.
    pub(super) fn end(&self) {
        if let Some(lease) = self.lease.lock().take() {
            self.runtime.block_on(lease.release());
        }
    }
}
