//! Pack footers: the trailer, the footer behind its hash, and what packers read of it from their index.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reap_store::SnapshotId;
use reap_store::format::keys::PackId;
use reap_store::format::pack::{self, TRAILER_BYTES};
use reap_store::fuzzing::{decode_footer, pack_pages};

const FOOTER_OFFSET: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let id = PackId { txn: SnapshotId::from_bytes([7; 16]), number: 3 };
    let trailer = &data[data.len().saturating_sub(TRAILER_BYTES)..];
    if let Ok(range) = pack::footer_range(trailer, data.len() as u64) {
        assert!(range.start <= range.end && range.end <= data.len() as u64);
    }
    assert!(pack::read_footer(id, FOOTER_OFFSET, data).is_err(), "a fuzzer has found a hash");

    let Ok(footer) = decode_footer(FOOTER_OFFSET, data) else { return };
    let object_end = pack::footer_and_trailer(id, &footer, FOOTER_OFFSET);
    // There is one way to write it.
    assert_eq!(object_end[..object_end.len() - TRAILER_BYTES], *data);
    assert_eq!(pack::read_footer(id, FOOTER_OFFSET, &object_end).as_ref(), Ok(&footer));
    let (pages, places) = pack_pages(id, FOOTER_OFFSET + object_end.len() as u64, &object_end)
        .expect("a good footer");
    assert_eq!((pages as usize, places), (footer.page_ids.len(), footer.page_ids.len()));
});
