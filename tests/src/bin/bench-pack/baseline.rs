//! What packing is compared with.

use std::collections::HashSet;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::Result;

const CHUNK_BYTES: usize = 64 << 10;
const LEVEL: i32 = 3;

/// Bytes of the distinct 64 KiB chunks of all `files` that are not zero, each compressed by itself.
/// Chunk lists cost nothing here.
pub(crate) fn chunked_bytes(files: &[PathBuf]) -> Result<u64> {
    let mut seen = HashSet::new();
    let mut stored = 0;
    let mut chunk = vec![0; CHUNK_BYTES];
    for file in files {
        let mut file = std::fs::File::open(file)?;
        while file.read_exact(&mut chunk).is_ok() {
            let zero = chunk.iter().all(|byte| *byte == 0);
            if !zero && seen.insert(blake3::hash(&chunk)) {
                stored += zstd::bulk::compress(&chunk, LEVEL)?.len() as u64;
            }
        }
    }
    Ok(stored)
}

/// Bytes of `pages` in one zstd frame.
pub(crate) fn compressed_bytes(pages: &[u8]) -> Result<u64> {
    Ok(zstd::bulk::compress(pages, LEVEL)?.len() as u64)
}

/// Seconds of `zstd -3 -T0`, which syncs nothing.
pub(crate) fn zstd_seconds(file: &Path, out: &Path) -> Result<f64> {
    let began = Instant::now();
    super::succeed(
        Command::new("zstd").args(["-3", "-T0", "-q", "-f", "-k"]).arg(file).arg("-o").arg(out),
    )?;
    Ok(began.elapsed().as_secs_f64())
}
