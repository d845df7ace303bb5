//! Manifest objects as they are stored: a few bytes and one zstd frame.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reap_store::format::manifest;

fuzz_target!(|object: &[u8]| {
    if let Ok(read) = manifest::decode(object) {
        let written = manifest::encode(&read).expect("what is read can be written");
        assert_eq!(manifest::decode(&written).as_ref(), Ok(&read));
    }
});
