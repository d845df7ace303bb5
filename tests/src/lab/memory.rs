//! Memory files and guest memory: holes, comparison, page cache.

use super::qemu::Process;
use super::qmp::Qmp;
use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Advice, FallocateFlags, FileType, Mode, fadvise, fallocate};
use serde_json::json;
use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes of a page.
const PAGE: usize = 4096;
/// Bytes that are read at a time.
const BLOCK: usize = 1 << 20;
/// Guest-physical pages that are no RAM on a PC: the window of the VGA memory, 0xA0000 to 0xBFFFF.
const HOLE: std::ops::Range<u64> = 0xA0..0xC0;
/// How long reading all of guest memory may take. Every page may be a fault.
const WHOLE_MEMORY: Duration = Duration::from_secs(300);

/// What a comparison of guest memory with a memory file found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// Pages that were compared.
    pub pages: u64,
    /// The pages that differ, by number.
    pub different: Vec<u64>,
}

impl Comparison {
    /// An error that names the first pages that differ, if any do.
    pub fn expect_equal(&self) -> Result<()> {
        let first = &self.different[..self.different.len().min(8)];
        ensure!(
            first.is_empty(),
            "{} of {} pages of guest memory differ from the memory file, first {first:x?}",
            self.different.len(),
            self.pages
        );
        Ok(())
    }
}

/// Makes holes of the zero pages of a file, so that it takes no more room than its data.
pub(super) fn dig_holes(path: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let mut hole: Option<(u64, u64)> = None;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let punch = |(start, end): (u64, u64)| fallocate(&file, flags, start, end - start);
    each_page(&file, |page, is_zero| {
        let at = page * PAGE as u64;
        match (&mut hole, is_zero) {
            (Some((_, end)), true) => *end = at + PAGE as u64,
            (None, true) => hole = Some((at, at + PAGE as u64)),
            (Some(_), false) => punch(hole.take().unwrap_or_default())?,
            (None, false) => (),
        }
        Ok(())
    })?;
    hole.map_or(Ok(()), punch)?;
    Ok(())
}

/// The pages of a file that are not all zeros.
pub fn count_data_pages(path: &Path) -> Result<u64> {
    let mut pages = 0;
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    each_page(&file, |_, is_zero| {
        pages += u64::from(!is_zero);
        Ok(())
    })?;
    Ok(pages)
}

/// Calls `see` with the number of each page and whether it is all zeros.
fn each_page(file: &File, mut see: impl FnMut(u64, bool) -> Result<()>) -> Result<()> {
    let mut block = vec![0; BLOCK];
    let (length, mut at) = (file.metadata()?.len(), 0);
    ensure!(length % PAGE as u64 == 0, "{length} bytes are no whole number of pages");
    while at < length {
        let wanted = usize::try_from(length - at).map_or(BLOCK, |left| left.min(BLOCK));
        file.read_exact_at(&mut block[..wanted], at)?;
        for (index, page) in (at / PAGE as u64..).zip(block[..wanted].chunks_exact(PAGE)) {
            see(index, page == [0; PAGE])?;
        }
        at += wanted as u64;
    }
    Ok(())
}

/// Reads all of guest memory through QEMU's own mapping and compares it with `memory`.
///
/// QEMU writes it to a pipe (`pmemsave`), so every page that is not there yet is faulted in as if the
/// guest had touched it. Guest-physical addresses are offsets into the memory file: `Lab` allows no
/// guest that is large enough for another layout.
pub(super) fn compare(
    process: &mut Process,
    qmp: &mut Qmp,
    memory: &Path,
    memory_mib: u32,
) -> Result<Comparison> {
    let path = process.directory().join("all-of-memory");
    let _ = fs::remove_file(&path);
    let permissions = Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::Fifo, permissions, 0)?;
    // Open for both directions: neither end ever waits for the other to be opened.
    let mut pipe = OpenOptions::new().read(true).write(true).open(&path)?;
    let length = u64::from(memory_mib) << 20;
    let file = File::open(memory).with_context(|| format!("cannot open {}", memory.display()))?;
    ensure!(file.metadata()?.len() == length, "{} is not {memory_mib} MiB", memory.display());

    let arguments = json!({"val": 0, "size": length, "filename": path});
    qmp.send(process, "pmemsave", &arguments)?;
    let deadline = Instant::now() + WHOLE_MEMORY;
    let (mut expected, mut found) = (vec![0; PAGE], vec![0; PAGE]);
    let mut comparison = Comparison { pages: 0, different: Vec::new() };
    for page in 0..length / PAGE as u64 {
        file.read_exact_at(&mut expected, page * PAGE as u64)?;
        fill(process, &mut pipe, &mut found, deadline)?;
        if !HOLE.contains(&page) {
            comparison.pages += 1;
            if expected != found {
                comparison.different.push(page);
            }
        }
    }
    qmp.answer(process, "pmemsave", WHOLE_MEMORY)?;
    fs::remove_file(&path)?;
    Ok(comparison)
}

/// Reads a page from the pipe; nobody else would notice if QEMU stopped writing.
fn fill(process: &mut Process, pipe: &mut File, page: &mut [u8], deadline: Instant) -> Result<()> {
    let mut filled = 0;
    while filled < page.len() {
        let glance = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
        let mut ready = [PollFd::new(&*pipe, PollFlags::IN)];
        if poll(&mut ready, Some(&glance))? > 0 {
            filled += pipe.read(&mut page[filled..])?;
        } else {
            process.check_alive("reading guest memory")?;
            if Instant::now() > deadline {
                bail!(process.failure("reading guest memory", "takes too long"));
            }
        }
    }
    Ok(())
}

/// Writes all dirty pages of this machine and empties its page cache, inodes and names included.
/// Needs root. QEMU's own files go as well: [`evict`] is the finer tool.
pub fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3\n").context("cannot drop caches: needs root")
}

/// Takes one file out of the page cache, except what somebody has mapped.
pub fn evict(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    // Dirty pages stay. Not every file that can be read can be synced: a mount of ours may say no,
    // and its pages are never dirty.
    let _ = file.sync_all();
    fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(())
}

/// Takes the files of a directory and of those under it out of the page cache.
pub fn evict_tree(directory: &Path) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() { evict_tree(&path)? } else { evict(&path)? }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn digging_holes_changes_no_byte_and_frees_the_zeros() -> Result<()> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("memory");
        let mut bytes = vec![0; 3 * BLOCK + 5 * PAGE];
        // Data in the first page, on both sides of a block's end, and nothing at the file's end.
        for page in [0, BLOCK / PAGE - 1, BLOCK / PAGE, 2 * BLOCK / PAGE + 7] {
            bytes[page * PAGE + 1] = 1;
        }
        fs::write(&path, &bytes)?;
        dig_holes(&path)?;
        assert_eq!(fs::read(&path)?, bytes);
        assert_eq!(count_data_pages(&path)?, 4);
        // Some file systems have larger blocks than a page, none as large as this file.
        assert!(fs::metadata(&path)?.blocks() * 512 < BLOCK as u64);
        Ok(())
    }

    #[test]
    fn a_comparison_names_the_pages_that_differ() {
        let equal = Comparison { pages: 9, different: Vec::new() };
        let other = Comparison { pages: 9, different: vec![3, 0x1f] };
        assert!(equal.expect_equal().is_ok());
        let message = other.expect_equal().err().map(|error| error.to_string());
        assert!(message.is_some_and(|text| text.contains("2 of 9") && text.contains("[3, 1f]")));
    }
}
