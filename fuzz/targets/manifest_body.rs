//! Manifests without their compression, which would hide them from a fuzzer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use reap_store::fuzzing::{decode_manifest_body, encode_manifest_body};

fuzz_target!(|body: &[u8]| {
    let Ok(read) = decode_manifest_body(body) else { return };
    for (file, runs) in &read.files {
        // What every reader leans on: runs cover the file, and lie inside their frames.
        let pages: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
        assert_eq!(pages, file.page_count());
        let inside = |run: &reap_store::format::manifest::Run| {
            let frame = read.frames.get(run.frame as usize);
            frame.is_none_or(|frame| run.position + run.pages <= u32::from(frame.entry.pages))
        };
        assert!(runs.iter().all(inside));
    }
    let written = encode_manifest_body(&read).expect("what is read can be written");
    assert_eq!(decode_manifest_body(&written).as_ref(), Ok(&read));
});
