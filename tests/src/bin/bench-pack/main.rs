//! `make bench-pack`: what packing costs and saves, on real guests' memory, each figure beside what
//! it is compared with, in one run. Ends with lines for docs/BENCHMARKS.md.

mod baseline;
mod guests;
mod packer;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use reap_tests::lab::FUNCTIONS;

use guests::{change_pages, joined, sparse};
use packer::{Packer, store_bytes};

/// Times are medians of so many interleaved rounds.
const ROUNDS: usize = 5;
const MIB: u64 = 1 << 20;

fn main() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let memories = guests::memories(scratch.path())?;
    dedup(scratch.path(), &memories)?;
    let joined = joined(scratch.path(), &memories[..2])?;
    speed(scratch.path(), "two 256 MiB guests, one after the other", &joined, &memories[2])?;
    let guest = guests::memory(scratch.path(), "image_rotate", 512)?;
    speed(scratch.path(), "a 512 MiB guest", &guest, &memories[2])?;
    peak_memory(scratch.path(), &memories, &joined)
}

/// Six functions on one base: stored bytes, and what reading one back costs.
fn dedup(scratch: &Path, memories: &[std::path::PathBuf]) -> Result<()> {
    let packer = Packer::new(&scratch.join("dedup"))?;
    for (function, memory) in FUNCTIONS.iter().zip(memories) {
        let before = store_bytes(&packer.store)?;
        packer.pack(function, memory, &["--label", "base=lab"])?;
        println!("  {function}: {:.1} MB", megabytes(store_bytes(&packer.store)? - before));
    }
    let ours = store_bytes(&packer.store)?;
    let theirs = baseline::chunked_bytes(memories)?;
    println!(
        "six functions, all objects: {:.1} MB; 64 KiB chunks + zstd -3: {:.1} MB; ratio {:.3} (<= 0.80)",
        megabytes(ours),
        megabytes(theirs),
        ours as f64 / theirs as f64
    );
    for function in FUNCTIONS {
        let read = packer.read_all(function, &scratch.join("out"))?;
        println!(
            "  {function}, read to the end: {} GETs, {:.1} MB for {:.1} MB of frames in {} packs; limit {:.0}",
            read.requests,
            megabytes(read.bytes),
            megabytes(read.stored_bytes),
            read.packs,
            (read.stored_bytes as f64 / (4 * MIB) as f64).ceil() * 1.1,
        );
    }
    Ok(())
}

/// Packing against `zstd -3 -T0`, and packing again with one page in a hundred changed.
fn speed(scratch: &Path, what: &str, memory: &Path, other: &Path) -> Result<()> {
    let changed = scratch.join("changed");
    let changed_pages = change_pages(memory, other, &changed, 100)?;
    let compressed = baseline::compressed_bytes(&changed_pages)?;
    let data = reap_tests::lab::count_data_pages(memory)?;
    let pages = std::fs::metadata(memory)?.len() / 4096;
    println!("{what}: {:.0} % of {pages} pages are not zero", data as f64 * 100.0 / pages as f64);
    let (mut first, mut second, mut zstd, mut none) = (vec![], vec![], vec![], vec![]);
    let mut uploaded = 0;
    for round in 0..ROUNDS {
        let packer = Packer::new(&scratch.join(format!("speed-{round}")))?;
        zstd.push(baseline::zstd_seconds(memory, &scratch.join("zstd"))?);
        first.push(packer.pack("f", memory, &[])?);
        let before = store_bytes(&packer.store)?;
        second.push(packer.pack("f", &changed, &[])?);
        uploaded = store_bytes(&packer.store)? - before;
        none.push(packer.pack("f", &changed, &[])?);
        packer.check("f", &changed, &scratch.join("out"))?;
        std::fs::remove_dir_all(scratch.join(format!("speed-{round}")))?;
    }
    let (first, second, zstd, none) = (median(first), median(second), median(zstd), median(none));
    println!(
        "  first pack {first:.3} s, zstd -3 -T0 {zstd:.3} s: ratio {:.2} (<= 1.0)",
        first / zstd
    );
    println!(
        "  1 % changed: {second:.3} s, ratio {:.2} (<= 0.25); nothing changed: {none:.3} s, ratio {:.2}",
        second / first,
        none / first
    );
    println!(
        "  1 % changed: {:.2} MB uploaded, changed pages by zstd -3 {:.2} MB: ratio {:.2} (<= 1.3)",
        megabytes(uploaded),
        megabytes(compressed),
        uploaded as f64 / compressed as f64
    );
    Ok(())
}

fn peak_memory(scratch: &Path, memories: &[std::path::PathBuf], small: &Path) -> Result<()> {
    let packer = Packer::new(&scratch.join("peak"))?;
    let large = sparse(scratch, memories, 8 << 30)?;
    for (what, name, memory) in [
        ("512 MiB", "small", small),
        ("512 MiB again, by its parent", "small", small),
        ("8 GiB sparse", "large", large.as_path()),
        ("8 GiB sparse again, by its parent", "large", large.as_path()),
    ] {
        let peak = packer.peak_bytes(name, memory)?;
        println!("peak memory of pack, {what}: {} MiB (<= 256)", peak / MIB);
    }
    Ok(())
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Runs a command that must go well.
fn succeed(command: &mut std::process::Command) -> Result<std::process::Output> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}
