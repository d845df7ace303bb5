//! Page tables of a node's index: the first 8 bytes are looked up, the rest is the table. A wrong table
//! gives wrong hints, in bounded time.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reap_store::{Hash, SnapshotId};

fuzz_target!(|data: &[u8]| {
    let Some((wanted, table)) = data.split_first_chunk::<8>() else { return };
    let mut page_id = [0; 32];
    page_id[..8].copy_from_slice(wanted);
    let snapshot = SnapshotId::from_bytes([7; 16]);
    if let Ok(hints) = reap_store::fuzzing::page_table(snapshot, table, &Hash(page_id)) {
        assert!(hints <= table.len() / 16);
    }
});
