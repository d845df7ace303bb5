//! Object keys. Their shapes are part of the collection protocol: see `docs/FORMAT.md`.

use std::fmt;
use std::str::FromStr;

use crate::{Error, Name, SnapshotId};

/// The store's own record, create-only, written by `init`.
pub const FORMAT: &str = "format";

/// A pack, by the transaction that wrote it and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackId {
    /// The transaction.
    pub txn: SnapshotId,
    /// Counted from 0 in the transaction.
    pub number: u32,
}

impl PackId {
    /// Its object key.
    pub fn key(&self) -> String {
        format!("pack/{self}")
    }
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:04}", self.txn, self.number)
    }
}

impl FromStr for PackId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || Error::invalid(text, "a pack id is <transaction>-<number>");
        let (txn, number) = text.split_once('-').ok_or_else(wrong)?;
        let id = Self { txn: txn.parse()?, number: number.parse().map_err(|_| wrong())? };
        if id.to_string() == text { Ok(id) } else { Err(wrong()) }
    }
}

impl serde::Serialize for PackId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for PackId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A packer at work.
pub fn lease(txn: SnapshotId) -> String {
    format!("lease/{txn}")
}

/// The page maps of a snapshot.
pub fn manifest(txn: SnapshotId) -> String {
    format!("manifest/{txn}")
}

/// The decision of a transaction.
pub fn snap(txn: SnapshotId) -> String {
    format!("snap/{txn}")
}

/// A snapshot is removed.
pub fn tomb(txn: SnapshotId) -> String {
    format!("tomb/{txn}")
}

/// The working sets of a snapshot.
pub fn working_sets(txn: SnapshotId) -> String {
    format!("ws/{txn}/")
}

/// One of them.
pub fn working_set(txn: SnapshotId, sequence: u64) -> String {
    format!("ws/{txn}/{sequence:012}")
}

/// The records of a name.
pub fn refs(name: &Name) -> String {
    format!("ref/{name}/")
}

/// One of them; the highest sequence wins.
pub fn reference(name: &Name, sequence: u64) -> String {
    format!("ref/{name}/{sequence:012}")
}

/// Beside it: which snapshot it names, for whoever lists and has not read it yet.
pub fn hint(name: &Name, sequence: u64, snapshot: SnapshotId) -> String {
    format!("ref/{name}/{sequence:012}.{snapshot}")
}

/// What a key under `ref/` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NameKey {
    /// The record of this sequence.
    Record(u64),
    /// The hint beside it.
    Hint(u64, SnapshotId),
}

/// What this key under `ref/` is.
pub fn name_key(key: &str) -> Option<NameKey> {
    match key.rsplit_once('.') {
        // A name may have dots as well; no name ends a key.
        Some((record, snapshot)) if !snapshot.contains('/') => {
            Some(NameKey::Hint(sequence_of(record)?, snapshot.parse().ok()?))
        }
        _ => sequence_of(key).map(NameKey::Record),
    }
}

/// Whose name this key under `ref/` is about.
pub fn name_of(key: &str) -> Option<Name> {
    key.split('/').nth(1)?.parse().ok()
}

/// The pins of a node.
pub fn pins(node: SnapshotId) -> String {
    format!("pin/{node}/")
}

/// A node serves from a snapshot; each opening has a pin of its own.
pub fn pin(node: SnapshotId, opening: SnapshotId, txn: SnapshotId) -> String {
    format!("pin/{node}/{opening}/{txn}")
}

/// While it is there, nothing is collected.
pub const HALT: &str = "gc/HALT";

/// The lowest sequence number.
pub const FIRST_SEQUENCE: u64 = 1;
/// The highest sequence number: twelve digits.
pub const MAX_SEQUENCE: u64 = 999_999_999_999;

/// What follows the last `/` of a key, as a sequence number.
pub fn sequence_of(key: &str) -> Option<u64> {
    let digits = key.rsplit('/').next()?;
    let twelve = digits.len() == 12 && digits.bytes().all(|digit| digit.is_ascii_digit());
    twelve.then(|| digits.parse().ok()).flatten()
}

/// The sequence number after the newest.
pub fn next_sequence(prefix: &str, newest: Option<u64>) -> Result<u64, Error> {
    match newest.map_or(FIRST_SEQUENCE, |newest| newest + 1) {
        next if next <= MAX_SEQUENCE => Ok(next),
        _ => Err(Error::refused(prefix, "has had all its 10^12 records: choose another name")),
    }
}

/// What follows the last `/` of a key, as an id.
pub fn id_of(key: &str) -> Option<SnapshotId> {
    key.rsplit('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_a_name_and_its_hint_are_told_apart() {
        let (name, id): (Name, _) =
            ("a.b".parse().expect("a name"), SnapshotId::from_bytes([7; 16]));
        let (record, hint) = (reference(&name, 5), hint(&name, 5, id));
        assert_eq!(name_key(&record), Some(NameKey::Record(5)));
        assert_eq!(name_key(&hint), Some(NameKey::Hint(5, id)));
        assert_eq!((name_of(&record), name_of(&hint)), (Some(name.clone()), Some(name)));
        assert_eq!(sequence_of(&hint), None, "a hint is no record");
        for wrong in ["ref/f/5.07", "ref/f/000000000005.07", "ref/a.b/x", "ref/f/000000000005."] {
            assert_eq!(name_key(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_sequence_number_is_twelve_digits_and_ends_there() {
        assert_eq!(sequence_of("ref/f/000000000005"), Some(5));
        for key in ["ref/f/+00000000005", "ref/f/5", "ref/f/0000000000005", "ref/f/00000000000x"] {
            assert_eq!(sequence_of(key), None, "{key}");
        }
        assert_eq!(next_sequence("ref/f/", None).expect("first"), 1);
        assert_eq!(next_sequence("ref/f/", Some(MAX_SEQUENCE - 1)).expect("last"), MAX_SEQUENCE);
        assert!(next_sequence("ref/f/", Some(MAX_SEQUENCE)).is_err());
    }
}
