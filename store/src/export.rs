//! A snapshot back into plain files, bit for bit, with its zeros as holes.
//!
//! Frames are read in the order in which they lie in their packs, each once and in long requests, and
//! written to wherever the files have their pages: a snapshot that shares pages with others is
//! scattered over their packs, and reading it in the order of its files would cost a request for
//! every few pages.

use std::collections::HashMap;
use std::fs::File as OpenFile;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::{Error, Frame, FrameIndex, PAGE_SIZE, Snapshot, Source};

/// Stored bytes that are asked for at once, and so at most are in memory: 8 long requests.
const BATCH_BYTES: u64 = 64 << 20;

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
    let mut outputs = Vec::new();
    for (file, description) in snapshot.files().iter().enumerate() {
        let path = directory.join(&description.name);
        let local = |error: std::io::Error| Error::local(path.display(), error);
        let open = OpenFile::create_new(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Error::exists(path.display(), "is there already: choose another directory")
            }
            _ => local(error),
        })?;
        written.push(path.clone());
        outputs.push(Output { file, open, path });
    }
    let total: u64 = snapshot.files().iter().map(|file| file.size).sum();
    let data: u64 = (0..snapshot.files().len()).map(|file| snapshot.data_pages(file)).sum();
    // Holes are there from the start.
    let mut done = total - (data * PAGE_SIZE as u64).min(total);
    let outputs = write_data(snapshot, outputs, &mut |bytes| {
        done += bytes;
        progress(done.min(total), total);
        Ok(())
    })
    .await?;
    for output in outputs.iter() {
        output.open.sync_data().map_err(|error| Error::local(output.path.display(), error))?;
    }
    Ok(())
}

/// Where a file of a snapshot is written to: an empty file.
pub(crate) struct Output {
    pub(crate) file: usize,
    pub(crate) open: OpenFile,
    /// For errors.
    pub(crate) path: PathBuf,
}

/// Gives each output its length and its data; the rest stays holes. After each batch `wrote` gets its bytes, and may end it all.
/// Nothing is synced.
pub(crate) async fn write_data(
    snapshot: &Arc<Snapshot>,
    outputs: Vec<Output>,
    wrote: &mut (dyn FnMut(u64) -> Result<(), Error> + Send),
) -> Result<Arc<Vec<Output>>, Error> {
    for output in &outputs {
        let set = output.open.set_len(snapshot.files()[output.file].size);
        set.map_err(|error| Error::local(output.path.display(), error))?;
    }
    let (frames, pieces) = plan(snapshot, outputs.iter().map(|output| output.file));
    let (pieces, outputs) = (Arc::new(pieces), Arc::new(outputs));
    for batch in batches(snapshot, &frames) {
        wrote(write_batch(snapshot, batch, &pieces, &outputs).await?)?;
    }
    Ok(outputs)
}

/// Pages of a frame, and where they belong.
#[derive(Clone, Copy)]
struct Piece {
    position: u32,
    pages: u32,
    /// By its number among the outputs.
    output: usize,
    first_page: u64,
}

/// All frames of `files` in the order of their packs, and what becomes of each.
fn plan(
    snapshot: &Snapshot,
    files: impl Iterator<Item = usize>,
) -> (Vec<FrameIndex>, HashMap<FrameIndex, Vec<Piece>>) {
    let mut pieces: HashMap<FrameIndex, Vec<Piece>> = HashMap::new();
    for (output, file) in files.enumerate() {
        for (first_page, extent) in snapshot.extents(file, 0..snapshot.files()[file].page_count()) {
            if let Source::Frame { frame, position } = extent.source {
                let pages = u32::try_from(extent.pages).unwrap_or(u32::MAX);
                let piece = Piece { position, pages, output, first_page };
                pieces.entry(frame).or_default().push(piece);
            }
        }
    }
    let mut frames: Vec<FrameIndex> = pieces.keys().copied().collect();
    let place = |frame: &FrameIndex| {
        snapshot.packed_frame(*frame).map(|(pack, entry)| (pack, entry.offset))
    };
    frames.sort_by_key(place);
    (frames, pieces)
}

/// `frames` in slices of [`BATCH_BYTES`].
fn batches<'a>(
    snapshot: &Snapshot,
    mut frames: &'a [FrameIndex],
) -> impl Iterator<Item = &'a [FrameIndex]> {
    let stored = |frame: &FrameIndex| {
        snapshot.packed_frame(*frame).map_or(0, |(_, entry)| u64::from(entry.stored_bytes))
    };
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let count = frames.iter().take_while(|frame| {
            bytes += stored(frame);
            bytes <= BATCH_BYTES
        });
        let (batch, rest) = frames.split_at(count.count().max(1).min(frames.len()));
        frames = rest;
        (!batch.is_empty()).then_some(batch)
    })
}

/// Writes the frames as they come, on the threads that decode them; answers with the bytes written.
async fn write_batch(
    snapshot: &Arc<Snapshot>,
    batch: &[FrameIndex],
    pieces: &Arc<HashMap<FrameIndex, Vec<Piece>>>,
    outputs: &Arc<Vec<Output>>,
) -> Result<u64, Error> {
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    let (pieces, outputs, of) = (pieces.clone(), outputs.clone(), snapshot.clone());
    snapshot.stream(batch.iter().copied(), move |index, frame| {
        let pieces = pieces.get(&index).map(Vec::as_slice).unwrap_or_default();
        let written = frame.and_then(|frame| write(&of, &frame, pieces, &outputs));
        // A receiver that is gone has had its error.
        sender.send(written).unwrap_or_default();
    });
    let mut bytes = 0;
    while let Some(written) = receiver.recv().await {
        bytes += written?;
    }
    Ok(bytes)
}

fn write(
    snapshot: &Snapshot,
    frame: &Frame,
    pieces: &[Piece],
    outputs: &[Output],
) -> Result<u64, Error> {
    let mut written = 0;
    for piece in pieces {
        let output = &outputs[piece.output];
        let bytes = frame.pages(piece.position, piece.pages);
        let offset = piece.first_page * PAGE_SIZE as u64;
        let left = snapshot.files()[output.file].size - offset;
        let inside = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        let done = output.open.write_all_at(&bytes[..inside], offset);
        done.map_err(|error| Error::local(output.path.display(), error))?;
        written += inside as u64;
    }
    Ok(written)
}
