//! A snapshot back into plain files, bit for bit, with its zeros as holes.

use std::collections::BTreeSet;
use std::fs::File as OpenFile;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::working_set::fetch_all;
use crate::{Error, Extent, FrameIndex, PAGE_SIZE, Snapshot, Source};

/// Frames that are fetched, and so decoded in memory, at once: 32 MiB of usual frames.
const BATCH_FRAMES: usize = 512;

/// Writes all files of `snapshot` into `directory`, which is made if need be; a file that is there
/// is not touched and ends the export. `progress` gets bytes done and bytes in all. On an error
/// nothing is left behind.
pub async fn export(
    snapshot: &Arc<Snapshot>,
    directory: &Path,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<Vec<PathBuf>, Error> {
    let made = !directory.exists();
    std::fs::create_dir_all(directory).map_err(|error| Error::local(directory.display(), error))?;
    let mut written = Vec::new();
    let outcome = write_files(snapshot, directory, &mut written, progress).await;
    if outcome.is_err() {
        for path in &written {
            std::fs::remove_file(path).unwrap_or_default();
        }
        if made {
            std::fs::remove_dir(directory).unwrap_or_default();
        }
    }
    outcome.map(|()| written)
}

async fn write_files(
    snapshot: &Arc<Snapshot>,
    directory: &Path,
    written: &mut Vec<PathBuf>,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<(), Error> {
    let total = snapshot.files().iter().map(|file| file.size).sum();
    let mut done = 0;
    for (number, file) in snapshot.files().iter().enumerate() {
        let path = directory.join(&file.name);
        let local = |error: std::io::Error| Error::local(path.display(), error);
        let open = OpenFile::create_new(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::exists(path.display(), "is there already: choose another directory")
            }
            _ => local(error),
        })?;
        written.push(path.clone());
        open.set_len(file.size).map_err(local)?;
        let mut page = 0;
        while let Some((batch, next)) = next_batch(snapshot, number, page) {
            write_batch(snapshot, &open, file.size, &batch).await.map_err(|error| match error {
                Failure::Fetch(error) => error,
                Failure::Write(error) => local(error),
            })?;
            page = next;
            progress(done + (page * PAGE_SIZE as u64).min(file.size), total);
        }
        done += file.size;
        open.sync_data().map_err(local)?;
    }
    Ok(())
}

enum Failure {
    Fetch(Error),
    Write(std::io::Error),
}

/// Extents with bytes from `page` on, and the page after them; `None` at the end of the file.
type Batch = Vec<(u64, Extent)>;

fn next_batch(snapshot: &Snapshot, file: usize, mut page: u64) -> Option<(Batch, u64)> {
    let mut batch = Vec::new();
    let mut frames = BTreeSet::new();
    let first = page;
    while frames.len() < BATCH_FRAMES
        && let Some(extent) = snapshot.extent(file, page)
    {
        if let Source::Frame { frame, .. } = extent.source {
            frames.insert(frame);
            batch.push((page, extent));
        }
        page += extent.pages;
    }
    (page > first).then_some((batch, page))
}

async fn write_batch(
    snapshot: &Arc<Snapshot>,
    open: &OpenFile,
    file_bytes: u64,
    batch: &[(u64, Extent)],
) -> Result<(), Failure> {
    let wanted: Vec<FrameIndex> = batch
        .iter()
        .filter_map(|(_, extent)| match extent.source {
            Source::Frame { frame, .. } => Some(frame),
            Source::Zero => None,
        })
        .collect();
    let frames = fetch_all(snapshot, &wanted).await.map_err(Failure::Fetch)?;
    for (page, extent) in batch {
        let Source::Frame { frame, position } = extent.source else { continue };
        let count = u32::try_from(extent.pages).unwrap_or(u32::MAX);
        let bytes = frames[&frame].pages(position, count);
        let offset = page * PAGE_SIZE as u64;
        let inside = usize::try_from(file_bytes - offset).unwrap_or(usize::MAX).min(bytes.len());
        open.write_all_at(&bytes[..inside], offset).map_err(Failure::Write)?;
    }
    Ok(())
}
