//! Ids, names, pack ids and sequence numbers: what is taken is written as it was read.
#![no_main]

use std::fmt::Display;
use std::str::FromStr;

use libfuzzer_sys::fuzz_target;
use reap_store::format::keys::{self, NameKey, PackId};
use reap_store::{Name, SnapshotId};

fuzz_target!(|text: &str| {
    same::<SnapshotId>(text);
    same::<Name>(text);
    same::<PackId>(text);
    if let Ok(name) = text.parse::<Name>() {
        assert!(!text.contains('/') && !text.contains("..") && text.len() <= 128);
        let key = keys::reference(&name, 7);
        assert_eq!(keys::sequence_of(&key), Some(7));
    }
    if let Some(sequence) = keys::sequence_of(text) {
        assert!(sequence <= keys::MAX_SEQUENCE && text.ends_with(&format!("{sequence:012}")));
    }
    if let Some(NameKey::Hint(sequence, id)) = keys::name_key(text) {
        assert!(sequence <= keys::MAX_SEQUENCE && text.ends_with(&format!("{sequence:012}.{id}")));
    }
    if let Some(id) = keys::id_of(text) {
        assert!(text.ends_with(&id.to_string()));
    }
});

fn same<T: FromStr + Display>(text: &str) {
    if let Ok(read) = text.parse::<T>() {
        assert_eq!(read.to_string(), text);
    }
}
