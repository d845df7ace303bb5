//! The store's records: commits, removals, manifests, working sets; names are in [`names`].

mod names;

use bytes::Bytes;
use serde::Serialize;

use crate::fetch::Ahead;
use crate::format::keys;
use crate::format::manifest::{self, MAX_MANIFEST_BYTES, Manifest, Run};
use crate::format::record::{
    self, Commit, Decision, MAX_RECORD_BYTES, Marker, Record, StoreRecord, VERSION,
};
use crate::format::working_set::{self, Header, PRELUDE_BYTES};
use crate::format::{Malformed, require};
use crate::id::Hash;
use crate::objects::{ListedObject, Objects};
use crate::{Error, ErrorKind, Snapshot, SnapshotId, Source, WorkingSetRun, probe, snapshot};

/// How often a create-only sequence is tried when others create in it too.
const SEQUENCE_TRIES: usize = 16;
/// What is read of a working set at once: the header of any set up to some 10,000 runs.
const FIRST_READ_BYTES: u64 = 256 << 10;

pub use names::Named;

/// An opened store. Clones share connections.
#[derive(Clone)]
pub struct Store {
    objects: Objects,
    record: StoreRecord,
}

/// A working set in a listing.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ListedWorkingSet {
    /// Its sequence; the highest usable one serves.
    pub sequence: u64,
    /// Bytes of its object.
    pub stored_bytes: u64,
}

impl Store {
    /// Makes a store at `url`, which must be empty. A local directory is made.
    pub async fn init(url: &str) -> Result<Self, Error> {
        let objects = Objects::connect(url, true)?;
        if objects.exists(keys::FORMAT).await? {
            return Err(Error::exists(url, "is a store already"));
        }
        // A killed `init` leaves its staged record at most.
        let is_staged = |name: &std::ffi::OsStr| name.as_encoded_bytes().starts_with(b"format#");
        let stray = objects.local_root().is_some_and(|root| {
            std::fs::read_dir(root).is_ok_and(|mut entries| {
                entries.any(|entry| entry.is_ok_and(|entry| !is_staged(&entry.file_name())))
            })
        });
        if stray || objects.any().await? {
            return Err(Error::refused(url, "is not empty: choose an empty place for a new store"));
        }
        if objects.local_root().is_none() {
            probe::probe(&objects).await?;
        }
        let record = StoreRecord {
            version: VERSION,
            store: SnapshotId::random(),
            created_unix_ms: record::now_unix_ms(),
        };
        objects.create(keys::FORMAT, &[record::seal(&record).into()]).await?;
        Ok(Self { objects, record })
    }

    /// Over objects of a test's own.
    #[cfg(test)]
    pub(crate) fn over(objects: Objects) -> Self {
        let store = SnapshotId::from_bytes([0; 16]);
        Self { objects, record: StoreRecord { version: VERSION, store, created_unix_ms: 0 } }
    }

    /// Opens the store at `url`.
    pub async fn open(url: &str) -> Result<Self, Error> {
        let objects = Objects::connect(url, false)?;
        let record: StoreRecord = match read_record(&objects, keys::FORMAT).await {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let remedy =
                    "is not a store (it has no 'format' object): make one with 'reap-pack init'";
                return Err(Error::not_found(url, remedy));
            }
            other => other?,
        };
        if record.version != VERSION {
            let text = format!(
                "has format version {}, this program reads version {VERSION}",
                record.version
            );
            return Err(Error::refused(url, text));
        }
        Ok(Self { objects, record })
    }

    /// An error of kind [`ErrorKind::Refused`] if the store does not keep create-only, on which packing and collection
    /// are built. Writes and deletes some small objects.
    pub async fn probe(&self) -> Result<(), Error> {
        probe::probe(&self.objects).await
    }

    /// The store's random id.
    pub fn id(&self) -> SnapshotId {
        self.record.store
    }

    /// Its objects.
    pub fn objects(&self) -> &Objects {
        &self.objects
    }

    /// Ids of all snapshots that exist: decided (to commit, for all that a listing tells) and not
    /// removed.
    pub async fn ids(&self) -> Result<Vec<SnapshotId>, Error> {
        let (decided, removed) =
            futures::try_join!(self.ids_under("snap/"), self.ids_under("tomb/"))?;
        Ok(decided.into_iter().filter(|id| removed.binary_search(id).is_err()).collect())
    }

    async fn ids_under(&self, prefix: &str) -> Result<Vec<SnapshotId>, Error> {
        let objects = self.objects.list(prefix).await?;
        let unknown = |key: &str| Error::damaged(key, "is not a key that this program knows");
        let mut ids = objects
            .iter()
            .map(|object| keys::id_of(&object.key).ok_or_else(|| unknown(&object.key)))
            .collect::<Result<Vec<_>, _>>()?;
        ids.sort_unstable();
        Ok(ids)
    }

    /// The commit record of a snapshot, removed or not.
    pub async fn commit(&self, id: SnapshotId) -> Result<Commit, Error> {
        let key = keys::snap(id);
        match read_record(&self.objects, &key).await {
            Ok(Decision::Commit(commit)) if commit.snapshot == id => Ok(*commit),
            Ok(Decision::Commit(_)) => Err(Error::damaged(key, "belongs to another snapshot")),
            Ok(Decision::Abort(abort)) => {
                let text = format!("was given up while it was packed: {}", abort.reason);
                Err(Error::not_found(id, text))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Err(Error::not_found(id, "there is no such snapshot"))
            }
            Err(error) => Err(error),
        }
    }

    /// Whether a snapshot is removed.
    pub async fn is_removed(&self, id: SnapshotId) -> Result<bool, Error> {
        self.objects.exists(&keys::tomb(id)).await
    }

    /// Commit record and manifest of a snapshot, read at the same time.
    pub(crate) async fn read_snapshot(&self, id: SnapshotId) -> Result<(Commit, Manifest), Error> {
        let key = keys::manifest(id);
        let (commit, object) =
            futures::join!(self.commit(id), self.objects.get(&key, MAX_MANIFEST_BYTES));
        let commit = commit?;
        let mut object = object?;
        if Hash::of(&object) != commit.manifest_hash {
            // As in `read_record`.
            object = self.objects.get(&key, MAX_MANIFEST_BYTES).await?;
        }
        if Hash::of(&object) != commit.manifest_hash {
            return Err(Error::damaged(key, "does not match the hash in its commit record"));
        }
        let manifest = manifest::decode(&object).map_err(|why| Error::damaged(&key, why))?;
        let same_packs = manifest.packs.len() == commit.packs.len()
            && manifest.packs.iter().zip(&commit.packs).all(|((pack, bytes), reference)| {
                (*pack, *bytes) == (reference.pack, reference.bytes)
            });
        if manifest.snapshot != id || !same_packs {
            return Err(Error::damaged(key, "does not belong to its commit record"));
        }
        Ok((commit, manifest))
    }

    /// Removes a snapshot, for ever: its names are no more, and collection may take its packs.
    /// Nodes that serve from it go on.
    pub async fn remove(&self, id: SnapshotId, node: SnapshotId) -> Result<(), Error> {
        let marker = self.marker(id, node);
        match self.objects.create(&keys::tomb(id), &[record::seal(&marker).into()]).await {
            Err(error) if error.kind() == ErrorKind::Exists => Ok(()),
            other => other,
        }
    }

    /// A marker about `snapshot`, by `node`, now.
    pub(crate) fn marker(&self, snapshot: SnapshotId, node: SnapshotId) -> Marker {
        let nonce = SnapshotId::random();
        Marker { snapshot, node, nonce, written_unix_ms: record::now_unix_ms() }
    }

    /// The working sets of a snapshot, newest first.
    pub async fn working_sets(&self, id: SnapshotId) -> Result<Vec<ListedWorkingSet>, Error> {
        let objects = self.objects.list(&keys::working_sets(id)).await?;
        let listed = objects.iter().rev().filter_map(|object| {
            let sequence = keys::sequence_of(&object.key)?;
            Some(ListedWorkingSet { sequence, stored_bytes: object.bytes })
        });
        Ok(listed.collect())
    }

    /// The header of a working set, which must be one of `snapshot`; from bytes that are read ahead, where there
    /// are any.
    pub(crate) async fn working_set_header(
        &self,
        snapshot: &Snapshot,
        listed: ListedWorkingSet,
        ahead: Option<&Ahead>,
    ) -> Result<Header, Error> {
        let (id, manifest_hash) = (snapshot.id(), snapshot.manifest_hash());
        let runs = |file: usize| snapshot.runs(file);
        self.bound_working_set(id, manifest_hash, runs, listed, ahead).await
    }

    /// The same, of a snapshot that is not open: its manifest's hash, and the runs of its files.
    pub(crate) async fn bound_working_set<'a>(
        &self,
        snapshot: SnapshotId,
        manifest_hash: Hash,
        runs: impl Fn(usize) -> &'a [Run],
        listed: ListedWorkingSet,
        ahead: Option<&Ahead>,
    ) -> Result<Header, Error> {
        let key = keys::working_set(snapshot, listed.sequence);
        let damaged = |why: Malformed| Error::damaged(&key, why);
        if listed.stored_bytes < PRELUDE_BYTES as u64 {
            return Err(Error::damaged(&key, "is truncated"));
        }
        let first = ahead.map_or(FIRST_READ_BYTES, Ahead::first_bytes).min(listed.stored_bytes);
        let mut bytes = self.start_of(&key, first, ahead).await?;
        if bytes.len() < PRELUDE_BYTES {
            return Err(Error::damaged(&key, "is truncated"));
        }
        let end = working_set::header_end(&bytes[..PRELUDE_BYTES]).map_err(damaged)?;
        if end > listed.stored_bytes {
            return Err(Error::damaged(&key, "is truncated"));
        }
        if end > bytes.len() as u64 {
            bytes = self.start_of(&key, end, ahead).await?;
        }
        let end = usize::try_from(end).unwrap_or(usize::MAX).min(bytes.len());
        let header = working_set::decode(&bytes[..end], listed.stored_bytes).map_err(damaged)?;
        check_bound(&header, snapshot, manifest_hash, runs).map_err(damaged)?;
        Ok(header)
    }

    /// The first bytes of an object.
    async fn start_of(&self, key: &str, end: u64, ahead: Option<&Ahead>) -> Result<Bytes, Error> {
        if let Some(ahead) = ahead
            && let Some(bytes) = ahead.bytes(0..end).await
        {
            return Ok(bytes);
        }
        self.objects.get_range(key, 0..end).await
    }

    /// Creates the next object of a create-only sequence; `object` gives key and chunks for a
    /// sequence number.
    pub(crate) async fn create_next(
        &self,
        prefix: &str,
        object: impl Fn(u64) -> (String, Vec<Bytes>),
    ) -> Result<u64, Error> {
        for _ in 0..SEQUENCE_TRIES {
            let sequence = keys::next_sequence(prefix, self.newest_sequence(prefix).await?)?;
            let (key, chunks) = object(sequence);
            match self.objects.create(&key, &chunks).await {
                Ok(()) => return Ok(sequence),
                Err(error) if error.kind() == ErrorKind::Exists => {}
                Err(error) => return Err(error),
            }
        }
        Err(Error::refused(prefix, "others write to it all the time: try again"))
    }

    async fn newest_sequence(&self, prefix: &str) -> Result<Option<u64>, Error> {
        Ok(newest_of(&self.objects.list(prefix).await?))
    }
}

/// The highest sequence among these objects.
fn newest_of(listed: &[ListedObject]) -> Option<u64> {
    listed.iter().filter_map(|object| keys::sequence_of(&object.key)).max()
}

/// A working set may be installed in guests of this snapshot and of no other, and has no page of zeros that
/// is not zero there: that would be a wrong byte in a guest.
pub(crate) fn check_bound<'a>(
    header: &Header,
    snapshot: SnapshotId,
    manifest_hash: Hash,
    runs: impl Fn(usize) -> &'a [Run],
) -> Result<(), Malformed> {
    let ours = header.snapshot == snapshot && header.manifest_hash == manifest_hash;
    require(ours, "was recorded from another snapshot")?;
    let end = |run: &WorkingSetRun| run.first_page + u64::from(run.pages);
    let inside = header.runs.iter().chain(&header.zero_runs).all(|run| {
        let last = runs(run.file as usize).last();
        last.is_some_and(|last| end(run) <= u64::from(last.first_page) + u64::from(last.pages))
    });
    require(inside, "has pages outside its files")?;
    let all = |recorded: &[WorkingSetRun], zero: bool| {
        let mut extents = recorded
            .iter()
            .flat_map(|run| snapshot::extents(runs(run.file as usize), run.first_page..end(run)));
        extents.all(|(_, extent)| (extent.source == Source::Zero) == zero)
    };
    let same = all(&header.zero_runs, true) && all(&header.runs, false);
    require(same, "has other zero pages than its snapshot")
}

/// Reads a sealed record. One that does not unseal is read once more: it may be whole in the store.
pub(crate) async fn read_record<T: Record>(objects: &Objects, key: &str) -> Result<T, Error> {
    let mut unsealed = record::unseal(&objects.get(key, MAX_RECORD_BYTES).await?);
    if unsealed.is_err() {
        unsealed = record::unseal(&objects.get(key, MAX_RECORD_BYTES).await?);
    }
    unsealed.map_err(|why| Error::damaged(format!("{}/{key}", objects.url()), why))
}
