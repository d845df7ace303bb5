//! Headers of working sets: a byte of version, 8 bytes of the length of the object, and the header's body,
//! which gets its magic and its hash here.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reap_store::Hash;
use reap_store::format::working_set::{self, Header};

fuzz_target!(|data: &[u8]| {
    let _ = working_set::header_end(data);
    let Some((version, data)) = data.split_first() else { return };
    let Some((object_bytes, body)) = data.split_first_chunk() else { return };
    let object_bytes = u64::from_le_bytes(*object_bytes);
    let mut bytes = [b"REAPWST".as_slice(), &[*version]].concat();
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&Hash::of(body).0);
    bytes.extend_from_slice(body);
    let Ok(header) = working_set::decode(&bytes, object_bytes) else { return };

    // A writer's offsets count from the end of the header. What an older version wrote is written as the
    // newest, and means the same.
    let frame_bytes = object_bytes - bytes.len() as u64;
    let written = working_set::encode(&moved(&header, -i128::from(bytes.len() as u64)));
    let again = working_set::decode(&written, written.len() as u64 + frame_bytes);
    let longer = i128::from(written.len() as u64) - i128::from(bytes.len() as u64);
    assert_eq!(again, Ok(moved(&header, longer)));
});

/// The same with every frame further on.
fn moved(header: &Header, by: i128) -> Header {
    let mut moved = header.clone();
    for frame in &mut moved.frames {
        let offset = i128::from(frame.entry.offset) + by;
        frame.entry.offset = u64::try_from(offset).expect("frames lie behind the header");
    }
    moved
}
