//! The handshake of a VMM: what comes of a message does not depend on the pieces it comes in.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reap_prefetcher::fuzzing::handshake;

const MEMORY_BYTES: u64 = 256 << 20;

fuzz_target!(|message: &[u8]| {
    let whole = handshake(message, MEMORY_BYTES, 0);
    assert_eq!(whole, handshake(message, MEMORY_BYTES, 1));
    assert_eq!(whole, handshake(message, MEMORY_BYTES, 7));
});
