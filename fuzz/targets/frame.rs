//! Frame entries, and stored bytes of frames. Where the first byte is even, the rest is an entry and
//! what it describes; where it is odd, bytes to be encoded and decoded again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reap_store::Hash;
use reap_store::PAGE_SIZE;
use reap_store::format::frame::{self, Codec, FRAME_ENTRY_BYTES, FrameEntry};
use reap_store::fuzzing::frame_entry;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    if kind % 2 == 0 { read(data) } else { round_trip(data) }
});

fn read(data: &[u8]) {
    let Ok((entry, written)) = frame_entry(data, u64::MAX) else { return };
    assert_eq!(written, data[..FRAME_ENTRY_BYTES]);
    let stored = &data[FRAME_ENTRY_BYTES..];
    if let Ok(decoded) = frame::decode(&entry, stored) {
        assert_eq!(Hash::of(&decoded), entry.hash);
    }
    // As long as it says, and through the decompressor.
    let stored_bytes = u32::try_from(stored.len()).expect("a short input");
    let long = FrameEntry { stored_bytes, codec: Codec::Zstd, pages: entry.pages.min(16), ..entry };
    if let Ok(decoded) = frame::decode(&long, stored) {
        assert_eq!(Hash::of(&decoded), entry.hash);
    }
}

fn round_trip(data: &[u8]) {
    let mut page = vec![0; PAGE_SIZE];
    let length = data.len().min(PAGE_SIZE);
    page[..length].copy_from_slice(&data[..length]);
    let (entry, stored) = frame::encode(&page, 1).expect("any page can be stored");
    assert_eq!(frame::decode(&entry, &stored), Ok(page));
}
