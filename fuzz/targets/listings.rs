//! What a collector makes of listings: a key a line. Whatever the keys are, it ends, and deletes nothing
//! that was not listed.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let keys: Vec<(String, u64)> = text.lines().map(|line| (line.to_owned(), 1)).collect();
    if let Ok(deleted) = reap_store::fuzzing::listings(&keys) {
        assert!(deleted <= keys.len());
    }
});
