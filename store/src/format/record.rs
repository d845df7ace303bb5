//! Small records: JSON, sealed with its hash so that no changed bit goes unnoticed.
//!
//! `<JSON>\n<BLAKE3 of the JSON, 64 hex digits>\n`: a person can read it with `cat`.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::keys::PackId;
use super::manifest::{MAX_FILE_BYTES, MAX_FILES, MAX_MANIFEST_BYTES, MAX_PACKS};
use super::pack::{EMPTY_BYTES, MAX_PACK_BYTES};
use super::{Malformed, require};
use crate::id::{Hash, check_name};
use crate::{FileKind, PAGE_SIZE, SnapshotId};

/// Largest record that is read.
pub const MAX_RECORD_BYTES: u64 = 4 << 20;
/// The format version that this code writes.
pub const VERSION: u32 = 1;

/// `format`: what this store is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoreRecord {
    /// Version of the store's layout.
    pub version: u32,
    /// Random id of the store.
    pub store: SnapshotId,
    /// When it was made, milliseconds since 1970.
    pub created_unix_ms: u64,
}

/// `snap/<txn>`: the decision of a transaction.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "decision", rename_all = "lowercase")]
pub enum Decision {
    /// The snapshot exists.
    Commit(Box<Commit>),
    /// It never will: a collector ended a packer that seemed dead.
    Abort(Abort),
}

/// A snapshot exists.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Commit {
    /// The transaction, which is the snapshot's id.
    pub snapshot: SnapshotId,
    /// Tells our record from another's when a PUT's answer was lost.
    pub nonce: SnapshotId,
    /// When, milliseconds since 1970.
    pub created_unix_ms: u64,
    /// The name it was packed under.
    pub name: String,
    /// BLAKE3 of the manifest object.
    pub manifest_hash: Hash,
    /// Length of the manifest object.
    pub manifest_bytes: u64,
    /// Every pack that the manifest refers to.
    pub packs: Vec<PackRef>,
    /// Its files, in the order of the manifest.
    pub files: Vec<FileRecord>,
    /// Snapshots whose packs it refers to, newest first; for people. It needs none of them.
    #[serde(default)]
    pub parents: Vec<SnapshotId>,
    /// What the packer was told.
    pub labels: BTreeMap<String, String>,
    /// Counts for people.
    pub statistics: Statistics,
}

/// A pack that a snapshot refers to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackRef {
    /// Which.
    pub pack: PackId,
    /// Length of the object.
    pub bytes: u64,
    /// BLAKE3 of the whole object.
    pub hash: Hash,
}

/// A file of a snapshot, for listings.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FileRecord {
    /// `memory`, `state` or the disk's name.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// Length in bytes.
    pub bytes: u64,
}

/// What packing found and did, in pages of 4 KiB and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Pages of all files.
    pub pages: u64,
    /// Of those, zero.
    pub zero_pages: u64,
    /// Stored by this snapshot.
    pub unique_pages: u64,
    /// Found stored already.
    pub duplicate_pages: u64,
    /// Of those, in a parent's pack.
    #[serde(default)]
    pub parent_pages: u64,
    /// Bytes of the packs that this snapshot wrote.
    pub pack_bytes: u64,
}

/// A transaction was ended by a collector.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Abort {
    /// The transaction.
    pub snapshot: SnapshotId,
    /// See [`Commit::nonce`].
    pub nonce: SnapshotId,
    /// The collector's run.
    pub run: SnapshotId,
    /// For people.
    pub reason: String,
}

/// `ref/<name>/<sequence>`: what a name stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// The name, as in the key.
    pub name: String,
    /// The sequence, as in the key.
    pub sequence: u64,
    /// What it stands for.
    pub snapshot: SnapshotId,
    /// See [`Commit::nonce`].
    pub nonce: SnapshotId,
    /// When, milliseconds since 1970.
    pub created_unix_ms: u64,
}

/// `lease/<txn>`, `pin/<node>/<txn>`, `tomb/<txn>`: the key says it; this is for people.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Marker {
    /// The snapshot or transaction.
    pub snapshot: SnapshotId,
    /// Who wrote it.
    pub node: SnapshotId,
    /// See [`Commit::nonce`].
    pub nonce: SnapshotId,
    /// When, milliseconds since 1970.
    pub written_unix_ms: u64,
}

/// `gc/condemned/<run>`: packs that a collector's run may delete.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Condemned {
    /// The run.
    pub run: SnapshotId,
    /// The packs.
    pub packs: Vec<PackId>,
}

/// `gc/report/<run>`: what the last collection did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CollectionReport {
    /// The run.
    pub run: SnapshotId,
    /// Snapshots that existed or were served from.
    pub live_snapshots: u64,
    /// Objects that it deleted.
    pub deleted_objects: u64,
    /// Their bytes.
    pub deleted_bytes: u64,
    /// When, milliseconds since 1970.
    pub written_unix_ms: u64,
}

/// `gc/HALT`: why nothing is collected.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Halt {
    /// The object that a live snapshot refers to and that is not there.
    pub missing: String,
    /// When it was missed, milliseconds since 1970.
    pub written_unix_ms: u64,
}

/// The bytes of a record.
pub fn seal(record: &impl Serialize) -> Vec<u8> {
    let mut bytes =
        serde_json::to_vec(record).expect("records have string keys and finite numbers");
    let hash = Hash::of(&bytes);
    bytes.extend_from_slice(format!("\n{hash}\n").as_bytes());
    bytes
}

/// A record that is read back: whatever its hash says, its numbers must make sense to those who add and
/// allocate.
pub trait Record: DeserializeOwned {
    /// Whether they do.
    fn check(&self) -> Result<(), Malformed>;
}

/// The end of the year 9999: what is later is nobody's clock.
const LAST_UNIX_MS: u64 = 253_402_300_799_999;

fn check_time(unix_ms: u64) -> Result<(), Malformed> {
    require(unix_ms <= LAST_UNIX_MS, "a time is after the year 9999")
}

impl Record for StoreRecord {
    fn check(&self) -> Result<(), Malformed> {
        check_time(self.created_unix_ms)
    }
}

impl Record for Decision {
    fn check(&self) -> Result<(), Malformed> {
        match self {
            Self::Commit(commit) => commit.check(),
            Self::Abort(_) => Ok(()),
        }
    }
}

impl Commit {
    fn check(&self) -> Result<(), Malformed> {
        check_time(self.created_unix_ms)?;
        require(self.manifest_bytes <= MAX_MANIFEST_BYTES, "a manifest is too long")?;
        require(self.packs.len() <= MAX_PACKS as usize, "a snapshot has too many packs")?;
        let possible = |pack: &PackRef| (EMPTY_BYTES..=MAX_PACK_BYTES).contains(&pack.bytes);
        require(self.packs.iter().all(possible), "a pack has an impossible length")?;
        require(self.files.len() <= MAX_FILES as usize, "a snapshot has too many files")?;
        require(self.files.iter().all(|file| file.bytes <= MAX_FILE_BYTES), "a file is too long")?;
        for name in self.files.iter().map(|file| &file.name).chain([&self.name]) {
            check_name(name).map_err(|error| Malformed(error.to_string()))?;
        }
        let counts = &self.statistics;
        let pages: u64 = self.files.iter().map(|file| file.bytes.div_ceil(PAGE_SIZE as u64)).sum();
        let counted = counts
            .zero_pages
            .checked_add(counts.unique_pages)
            .and_then(|sum| sum.checked_add(counts.duplicate_pages));
        let add_up = counted == Some(counts.pages) && counts.pages == pages;
        require(add_up, "the counts of a snapshot's pages do not add up")
    }
}

impl Record for Reference {
    fn check(&self) -> Result<(), Malformed> {
        check_time(self.created_unix_ms)?;
        check_name(&self.name).map_err(|error| Malformed(error.to_string()))
    }
}

impl Record for Condemned {
    fn check(&self) -> Result<(), Malformed> {
        Ok(())
    }
}

impl Record for Marker {
    fn check(&self) -> Result<(), Malformed> {
        check_time(self.written_unix_ms)
    }
}

impl Record for Halt {
    fn check(&self) -> Result<(), Malformed> {
        check_time(self.written_unix_ms)
    }
}

impl Record for CollectionReport {
    fn check(&self) -> Result<(), Malformed> {
        check_time(self.written_unix_ms)
    }
}

/// The record in `bytes`, if not a bit of it was changed and it makes sense.
pub fn unseal<T: Record>(bytes: &[u8]) -> Result<T, Malformed> {
    // '\n' + 64 hex digits + '\n'
    let at = bytes.len().checked_sub(66).ok_or("a record is truncated")?;
    let (json, tail) = bytes.split_at(at);
    let expected = format!("\n{}\n", Hash::of(json));
    require(tail == expected.as_bytes(), "a record does not match its hash")?;
    let record: T = serde_json::from_slice(json)
        .map_err(|error| Malformed(format!("a record is not valid ({error})")))?;
    record.check()?;
    Ok(record)
}

/// Now, in milliseconds since 1970.
pub(crate) fn now_unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commit() -> Commit {
        let file = FileRecord { name: "memory".into(), kind: FileKind::Memory, bytes: 4097 };
        Commit {
            snapshot: SnapshotId::random(),
            nonce: SnapshotId::random(),
            created_unix_ms: 5,
            name: "n".into(),
            manifest_hash: Hash([0; 32]),
            manifest_bytes: 10,
            packs: Vec::new(),
            files: vec![file],
            parents: Vec::new(),
            labels: BTreeMap::new(),
            statistics: Statistics { pages: 2, zero_pages: 2, ..Statistics::default() },
        }
    }

    #[test]
    fn sealed_numbers_that_make_no_sense_are_refused() {
        let read = |change: &dyn Fn(&mut Commit)| {
            let mut commit = commit();
            change(&mut commit);
            unseal::<Decision>(&seal(&Decision::Commit(Box::new(commit)))).map(|_| ())
        };
        assert_eq!(read(&|_| {}), Ok(()));
        let pack = PackRef {
            pack: PackId { txn: SnapshotId::random(), number: 0 },
            bytes: u64::MAX,
            hash: Hash([0; 32]),
        };
        let refused: [&dyn Fn(&mut Commit); 7] = [
            &|commit| commit.statistics.zero_pages = 3,
            &|commit| commit.statistics.unique_pages = u64::MAX,
            &|commit| commit.statistics.pages = 3,
            &|commit| commit.created_unix_ms = u64::MAX,
            &|commit| commit.manifest_bytes = u64::MAX,
            &|commit| commit.packs = vec![pack.clone()],
            &|commit| commit.files[0].name = "../memory".into(),
        ];
        for (number, change) in refused.iter().enumerate() {
            assert!(read(change).is_err(), "change {number}");
        }
    }

    #[test]
    fn any_changed_bit_of_a_record_is_noticed() {
        let record = Reference {
            name: "n".into(),
            sequence: 1,
            snapshot: SnapshotId::random(),
            nonce: SnapshotId::random(),
            created_unix_ms: 5,
        };
        let bytes = seal(&record);
        assert_eq!(unseal::<Reference>(&bytes).expect("unseals"), record);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(unseal::<Reference>(&flipped).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(unseal::<Reference>(&bytes[..length]).is_err(), "length {length}");
        }
    }
}
