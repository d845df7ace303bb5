//! Sealed records. The first byte says which; the rest is the JSON, which is sealed here because no
//! fuzzer guesses a hash.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reap_store::Hash;
use reap_store::format::record::{
    CollectionReport, Condemned, Decision, Record, Reference, StoreRecord, seal, unseal,
};
use serde::Serialize;

fuzz_target!(|data: &[u8]| {
    let Some((kind, json)) = data.split_first() else { return };
    let mut sealed = json.to_vec();
    sealed.extend_from_slice(format!("\n{}\n", Hash::of(json)).as_bytes());
    match kind % 7 {
        0 => round_trip::<StoreRecord>(&sealed),
        1 => round_trip::<Decision>(&sealed),
        2 => round_trip::<Reference>(&sealed),
        3 => round_trip::<Condemned>(&sealed),
        4 => round_trip::<CollectionReport>(&sealed),
        5 => drop(reap_store::fuzzing::kinships(&sealed)),
        _ => assert!(unseal::<Decision>(json).is_err(), "a fuzzer has found a hash"),
    }
});

/// What is read is written as it is read.
fn round_trip<T: Record + Serialize>(sealed: &[u8]) {
    let Ok(record) = unseal::<T>(sealed) else { return };
    let again = seal(&record);
    let read = unseal::<T>(&again).expect("what was written is read");
    assert_eq!(seal(&read), again);
}
