//! Memory files: of real guests, and put together from theirs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Result;
use reap_tests::lab::{FUNCTIONS, Lab};

const PAGE: usize = 4096;

/// Memory files of a 256 MiB guest of each function.
pub(crate) fn memories(scratch: &Path) -> Result<Vec<PathBuf>> {
    FUNCTIONS.iter().map(|function| memory(scratch, function, 256)).collect()
}

/// The memory file of one guest that has answered once; on the disk, so that no later measurement
/// pays for writing it. With `REAP_BENCH_GUESTS=DIR` guests are kept there for the next run.
pub(crate) fn memory(scratch: &Path, function: &str, memory_mib: u32) -> Result<PathBuf> {
    let root = std::env::var_os("REAP_BENCH_GUESTS").map_or(scratch.to_owned(), PathBuf::from);
    let directory = root.join(format!("{function}-{memory_mib}"));
    let kept = directory.join("snapshot/memory");
    if !kept.exists() {
        println!("booting {function} in {memory_mib} MiB");
        let mut guest = Lab::open()?.boot(function, memory_mib, &directory)?;
        guest.request("one")?;
        guest.snapshot(&directory.join("snapshot"))?;
    }
    File::open(&kept)?.sync_all()?;
    Ok(kept)
}

/// All of `files`, one after the other, with their holes.
pub(crate) fn joined(scratch: &Path, files: &[PathBuf]) -> Result<PathBuf> {
    spread(&scratch.join("joined"), files, 256 << 20, files.len() as u64 * (256 << 20))
}

/// A file of `bytes`, with `files` at even distances and holes between them.
pub(crate) fn sparse(scratch: &Path, files: &[PathBuf], bytes: u64) -> Result<PathBuf> {
    spread(
        &scratch.join("sparse"),
        files,
        bytes / files.len() as u64 / PAGE as u64 * PAGE as u64,
        bytes,
    )
}

fn spread(path: &Path, files: &[PathBuf], distance: u64, bytes: u64) -> Result<PathBuf> {
    let out = File::create(path)?;
    out.set_len(bytes)?;
    for (number, file) in (0..).zip(files) {
        let content = std::fs::read(file)?;
        for (page, page_bytes) in (0..).zip(content.chunks_exact(PAGE)) {
            if page_bytes.iter().any(|byte| *byte != 0) {
                out.write_all_at(page_bytes, number * distance + page * PAGE as u64)?;
            }
        }
    }
    out.sync_all()?;
    Ok(path.to_owned())
}

/// Copies `memory` to `changed`, with one page in `one_in` replaced by a page of `other`, scattered
/// over the pages that are not zero; answers with the new pages.
pub(crate) fn change_pages(
    memory: &Path,
    other: &Path,
    changed: &Path,
    one_in: usize,
) -> Result<Vec<u8>> {
    super::succeed(
        std::process::Command::new("cp").arg("--sparse=always").arg(memory).arg(changed),
    )?;
    let is_data = |page: &[u8]| page.iter().any(|byte| *byte != 0);
    let content = std::fs::read(memory)?;
    let data: Vec<usize> = content
        .chunks_exact(PAGE)
        .enumerate()
        .filter(|(_, page)| is_data(page))
        .map(|(number, _)| number)
        .collect();
    let other = std::fs::read(other)?;
    let strangers: Vec<&[u8]> = other.chunks_exact(PAGE).filter(|page| is_data(page)).collect();
    let wanted = content.len() / PAGE / one_in;
    let out = File::options().write(true).open(changed)?;
    let mut new = Vec::with_capacity(wanted * PAGE);
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut pick = |below: usize| {
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(random >> 33).unwrap_or_default() % below
    };
    for number in 0..wanted {
        let place = data[number * data.len() / wanted];
        let mut page = strangers[pick(strangers.len())].to_vec();
        // Not a page that is there already, by chance.
        page[..8].copy_from_slice(&(number as u64 | 1 << 63).to_le_bytes());
        out.write_all_at(&page, (place * PAGE) as u64)?;
        new.extend_from_slice(&page);
    }
    out.sync_all()?;
    Ok(new)
}
