//! Small records: JSON, sealed with its hash so that no changed bit goes unnoticed.
//!
//! `<JSON>\n<BLAKE3 of the JSON, 64 hex digits>\n`: a person can read it with `cat`.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::keys::PackId;
use super::{Malformed, require};
use crate::id::Hash;
use crate::{FileKind, SnapshotId};

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

/// The record in `bytes`, if not a bit of it was changed.
pub fn unseal<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Malformed> {
    // '\n' + 64 hex digits + '\n'
    let at = bytes.len().checked_sub(66).ok_or("a record is truncated")?;
    let (json, tail) = bytes.split_at(at);
    let expected = format!("\n{}\n", Hash::of(json));
    require(tail == expected.as_bytes(), "a record does not match its hash")?;
    serde_json::from_slice(json)
        .map_err(|error| Malformed(format!("a record is not valid ({error})")))
}

/// Now, in milliseconds since 1970.
pub(crate) fn now_unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

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
