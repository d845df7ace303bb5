//! A file of a snapshot that is there already, as a source of pages: by itself when it is written once
//! more, or below a diff.

use std::collections::{BTreeSet, HashMap};
use std::fs::File as OpenFile;
use std::path::Path;
use std::sync::Arc;

use super::parents::Parents;
use super::source::{Block, Page};
use crate::repair::Spares;
use crate::{Error, Frame, FrameIndex, Snapshot, Source};

/// A file of a snapshot that is there already.
pub(crate) struct SnapshotFile {
    pub(crate) snapshot: Arc<Snapshot>,
    pub(crate) file: usize,
    /// The new snapshot goes to the same store, so frames may be referred to as they are.
    pub(crate) same_store: bool,
    /// Where frames of packs come from that are missing or damaged.
    pub(crate) spares: Option<Arc<Spares>>,
}

impl SnapshotFile {
    /// A diff must be one: as long as what it differs from, and with the holes that tell what is new.
    pub(super) fn check_diff(&self, path: &Path, file: &OpenFile, bytes: u64) -> Result<(), Error> {
        let path = path.display();
        let parent_bytes = self.snapshot.files()[self.file].size;
        if bytes != parent_bytes {
            let text = format!(
                "is {bytes} bytes long, its parent's memory is {parent_bytes}: a diff is as long"
            );
            return Err(Error::invalid(path, text));
        }
        let hole = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(0));
        if hole.is_ok_and(|at| at < bytes) {
            return Ok(());
        }
        let text = "has no holes, so it is no diff (or its file system does not keep holes): pack it \
                without --diff";
        Err(Error::invalid(path, text))
    }

    /// Some pages. Frames that may be referred to are; others are fetched.
    pub(super) fn read(
        &self,
        first: u64,
        page_count: u64,
        parents: &Parents,
    ) -> Result<Block, Error> {
        let snapshot = &self.snapshot;
        let extents: Vec<_> = snapshot.extents(self.file, first..first + page_count).collect();
        let known = |frame: FrameIndex, position: u32| {
            let (pack, entry) = snapshot.packed_frame(frame)?;
            parents.frame(pack, entry, position).filter(|_| self.same_store)
        };
        let mut wanted = BTreeSet::new();
        for (_, extent) in &extents {
            if let Source::Frame { frame, position } = extent.source
                && known(frame, position).is_none()
            {
                wanted.insert(frame);
            }
        }
        let frames = fetch(snapshot, wanted, self.spares.as_deref())?;
        let mut block = Block { page_count, pages: Vec::new(), bytes: Vec::new() };
        let mut before = None;
        for (_, extent) in extents {
            for page in 0..u32::try_from(extent.pages).unwrap_or(u32::MAX) {
                let Source::Frame { frame, position } = extent.source else {
                    block.pages.push(Page::Zero);
                    continue;
                };
                match (frames.get(&frame), known(frame, position + page)) {
                    (Some(bytes), _) => {
                        block.push(bytes.pages(position + page, 1), parents, &mut before);
                    }
                    (None, Some(known)) => block.pages.push(Page::Known(known)),
                    (None, None) => {
                        let text = "a frame was not fetched; this is a bug";
                        return Err(Error::local("packing", text));
                    }
                }
            }
        }
        Ok(block)
    }
}

/// Frames of a snapshot, whatever it takes; on a packing worker, which may wait.
fn fetch(
    snapshot: &Arc<Snapshot>,
    mut wanted: BTreeSet<FrameIndex>,
    spares: Option<&Spares>,
) -> Result<HashMap<FrameIndex, Frame>, Error> {
    let mut frames = HashMap::new();
    if let Some(spares) = spares {
        for index in wanted.clone() {
            let place = snapshot.packed_frame(index).filter(|(pack, _)| spares.is_for(pack));
            let Some((pack, entry)) = place else { continue };
            let frame = snapshot.block_on(spares.frame(pack, entry))?;
            let gone = || Error::damaged(pack.key(), "a frame of it is nowhere to be had any more");
            frames.insert(index, frame.ok_or_else(gone)?);
            wanted.remove(&index);
        }
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    snapshot.stream(wanted, move |index, frame| {
        // A receiver that is gone has had its error.
        sender.send((index, frame)).unwrap_or_default();
    });
    for (index, frame) in receiver {
        frames.insert(index, frame?);
    }
    Ok(frames)
}
