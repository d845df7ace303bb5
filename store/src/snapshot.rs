//! The opened snapshot: "give me these frames, at this urgency".

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;

use crate::fetch::{Done, Fetcher, FrameSpec, ObjectId};
use crate::format::frame::FrameEntry;
use crate::format::keys::PackId;
use crate::format::manifest::{Facts, Manifest, Run, ZERO_FRAME};
use crate::format::record::Commit;
use crate::id::Hash;
use crate::plain::CopiesOf;
use crate::reads::Watchers;
use crate::{Error, PAGE_SIZE, SnapshotId};

/// What a file of a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FileKind {
    /// Guest memory.
    Memory,
    /// Device state, opaque to us.
    State,
    /// A disk image.
    Disk,
}

/// A file of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// `memory`, `state`, or the disk's name; unique in the snapshot.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// Length in bytes; need not be a multiple of a page.
    pub size: u64,
}

impl File {
    /// Length in pages; the last may be only partly inside the file.
    pub fn page_count(&self) -> u64 {
        self.size.div_ceil(PAGE_SIZE as u64)
    }
}

/// A frame of the snapshot, by its position in the manifest's frame table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrameIndex(pub u32);

/// Where a run of file pages comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Zero bytes; nothing is stored.
    Zero,
    /// Consecutive pages of a frame, from `position` on.
    Frame {
        /// Which frame.
        frame: FrameIndex,
        /// Page number within the frame.
        position: u32,
    },
}

/// A run of file pages with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// How many pages, at least one.
    pub pages: u64,
    /// Where they come from.
    pub source: Source,
}

/// Whether somebody waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// Ahead of need; gives way to demand at every stage.
    Prefetch,
    /// A fault or a read waits for it.
    Demand,
}

/// Decoded bytes of a frame that have been verified; whole pages. Only the fetch path makes them.
#[derive(Clone)]
pub struct Frame(Bytes);

impl Frame {
    /// `decoded` must have been compared with its hash.
    pub(crate) fn new(decoded: Vec<u8>) -> Self {
        Self(Bytes::from(decoded))
    }

    /// How many pages it holds.
    pub fn page_count(&self) -> u32 {
        u32::try_from(self.0.len() / PAGE_SIZE).unwrap_or(u32::MAX)
    }

    /// The bytes of `count` pages from `position` on. Panics outside the frame.
    pub fn pages(&self, position: u32, count: u32) -> &[u8] {
        &self.0[position as usize * PAGE_SIZE..][..count as usize * PAGE_SIZE]
    }

    pub(crate) fn byte_count(&self) -> u64 {
        self.0.len() as u64
    }
}

/// An opened snapshot. While it is open it is pinned: collection leaves its objects alone.
pub struct Snapshot {
    fetcher: Fetcher,
    commit: Commit,
    facts: Facts,
    files: Vec<File>,
    runs: Vec<Vec<Run>>,
    data_pages: Vec<u64>,
    frames: Vec<FrameSpec>,
    watchers: Watchers,
    copies: CopiesOf,
}

impl Snapshot {
    /// `manifest` must be the one that `commit` names by hash.
    pub(crate) fn new(fetcher: Fetcher, commit: Commit, manifest: Manifest) -> Self {
        let Manifest { facts, packs, frames, files, .. } = manifest;
        let frames = frames
            .into_iter()
            .map(|frame| FrameSpec {
                object: ObjectId::Pack(packs[frame.pack as usize].0),
                entry: frame.entry,
            })
            .collect();
        let (files, runs): (Vec<_>, Vec<_>) = files.into_iter().unzip();
        let data = |runs: &Vec<Run>| {
            runs.iter().filter(|run| run.frame != ZERO_FRAME).map(|run| u64::from(run.pages)).sum()
        };
        let data_pages = runs.iter().map(data).collect();
        let (watchers, copies) = (Watchers::default(), CopiesOf::default());
        Self { fetcher, commit, facts, files, runs, data_pages, frames, watchers, copies }
    }

    /// The snapshot's id.
    pub fn id(&self) -> SnapshotId {
        self.commit.snapshot
    }

    /// When it was committed.
    pub fn created(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_millis(self.commit.created_unix_ms)
    }

    /// Its commit record.
    pub fn commit(&self) -> &Commit {
        &self.commit
    }

    /// What a restore must match.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Its files; memory first, then state, then disks.
    pub fn files(&self) -> &[File] {
        &self.files
    }

    /// Pages of file number `file` that are not zero.
    pub fn data_pages(&self, file: usize) -> u64 {
        self.data_pages[file]
    }

    /// The longest known run at `page` of file number `file`; `None` at or after the end of file.
    /// Pure lookup, microseconds, no I/O.
    pub fn extent(&self, file: usize, page: u64) -> Option<Extent> {
        extent(self.runs.get(file)?, page)
    }

    /// The runs of a file; none where there is no such file.
    pub(crate) fn runs(&self, file: usize) -> &[Run] {
        self.runs.get(file).map_or(&[], Vec::as_slice)
    }

    /// The extents of `pages` of file number `file`, each with its first page, cut to the range; up
    /// to the end of the file.
    pub fn extents(
        &self,
        file: usize,
        pages: std::ops::Range<u64>,
    ) -> impl Iterator<Item = (u64, Extent)> + '_ {
        extents(self.runs(file), pages)
    }

    /// The distinct frames that `pages` of file number `file` come from, in order of their index;
    /// none where all is zeros.
    pub fn frames_of(&self, file: usize, pages: std::ops::Range<u64>) -> Vec<FrameIndex> {
        let frame = |(_, extent): (u64, Extent)| match extent.source {
            Source::Frame { frame, .. } => Some(frame),
            Source::Zero => None,
        };
        let mut frames: Vec<_> = self.extents(file, pages).filter_map(frame).collect();
        frames.sort_unstable();
        frames.dedup();
        frames
    }

    /// The frame, if it is decoded in memory now. Never waits.
    pub fn cached(&self, frame: FrameIndex) -> Option<Frame> {
        self.fetcher.cached(&self.frames[frame.0 as usize].key())
    }

    /// Brings `frames` (any order, duplicates allowed) and calls `done` once for each distinct
    /// one: later on a decode thread, or with `Demand` at once on this thread where the frame is in memory.
    /// Never waits for the network or a disk. Neighbours in a pack are merged into one request.
    /// `Demand` for a frame that is being prefetched promotes it. `Prefetch` waits for its share of the node's
    /// budget ([`crate::NodeConfig::prefetch_bytes`]) and asks for frames in their order as it has room.
    ///
    /// `done` gets an error of kind [`Damaged`](crate::ErrorKind::Damaged) where stored bytes do
    /// not match their hash even after a second read, of kind
    /// [`Unreachable`](crate::ErrorKind::Unreachable) where the store did not answer for 60 s.
    pub fn fetch(
        self: &Arc<Self>,
        frames: &[FrameIndex],
        urgency: Urgency,
        done: impl Fn(FrameIndex, Result<Frame, Error>) + Send + Sync + 'static,
    ) {
        let mut distinct = frames.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        self.fetcher.fetch(self.specs(distinct), urgency, &by_frame(done));
    }

    /// Keeps pages of a file that is read through the mount in memory, from `bytes` of them that a working
    /// set had: whole frames that match their hash as they are, others from their packs.
    pub fn warm(self: &Arc<Self>, file: usize, first_page: u64, bytes: &[u8]) {
        let pages = first_page..first_page + (bytes.len() / PAGE_SIZE) as u64;
        let mut missing = Vec::new();
        for (page, extent) in self.extents(file, pages) {
            let Source::Frame { frame, position } = extent.source else { continue };
            let spec = &self.frames[frame.0 as usize];
            let whole = position == 0 && extent.pages == u64::from(spec.entry.pages);
            let from = usize::try_from(page - first_page).unwrap_or(usize::MAX) * PAGE_SIZE;
            if !whole || !self.fetcher.keep(spec, &bytes[from..][..spec.entry.decoded_bytes()]) {
                missing.push(frame);
            }
        }
        // One that cannot be had costs speed only, and whoever reads it will be told.
        self.fetch(&missing, Urgency::Prefetch, |_, _| {});
    }

    pub(crate) fn watchers(&self) -> &Watchers {
        &self.watchers
    }

    pub(crate) fn copies(&self) -> &CopiesOf {
        &self.copies
    }

    /// Brings distinct frames in as few requests as possible; otherwise like [`Self::fetch`] at the
    /// lower urgency.
    pub(crate) fn stream(
        &self,
        frames: impl IntoIterator<Item = FrameIndex>,
        done: impl Fn(FrameIndex, Result<Frame, Error>) + Send + Sync + 'static,
    ) {
        self.fetcher.stream(self.specs(frames), &by_frame(done));
    }

    /// What the fetch path needs of frames, each under its index.
    fn specs(
        &self,
        frames: impl IntoIterator<Item = FrameIndex>,
    ) -> impl Iterator<Item = (FrameSpec, usize)> {
        let indices = frames.into_iter().map(|frame| frame.0 as usize);
        indices.map(|index| (self.frames[index], index))
    }

    /// What the fetch path needs of every frame.
    pub(crate) fn all_specs(&self) -> &[FrameSpec] {
        &self.frames
    }

    /// Where a frame is packed.
    pub(crate) fn packed_frame(&self, frame: FrameIndex) -> Option<(PackId, FrameEntry)> {
        let spec = self.frames.get(frame.0 as usize)?;
        match spec.object {
            ObjectId::Pack(pack) => Some((pack, spec.entry)),
            ObjectId::WorkingSet(..) => None,
        }
    }

    /// Runs `task` to its end on this thread, which must not belong to a runtime.
    pub(crate) fn block_on<T>(&self, task: impl Future<Output = T>) -> T {
        self.fetcher.block_on(task)
    }

    pub(crate) fn fetcher(&self) -> &Fetcher {
        &self.fetcher
    }

    pub(crate) fn manifest_hash(&self) -> Hash {
        self.commit.manifest_hash
    }

    /// How many frames it refers to.
    pub fn frame_count(&self) -> u32 {
        u32::try_from(self.frames.len()).unwrap_or(u32::MAX)
    }
}

/// The longest known run at `page` of a file with these runs.
fn extent(runs: &[Run], page: u64) -> Option<Extent> {
    let page = u32::try_from(page).ok()?;
    let after = runs.partition_point(|run| run.first_page <= page);
    let run = runs[..after].last()?;
    let skipped = page - run.first_page;
    let pages = u64::from(run.pages.checked_sub(skipped).filter(|pages| *pages > 0)?);
    let source = match run.frame {
        ZERO_FRAME => Source::Zero,
        frame => Source::Frame { frame: FrameIndex(frame), position: run.position + skipped },
    };
    Some(Extent { pages, source })
}

/// See [`Snapshot::extents`].
pub(crate) fn extents(
    runs: &[Run],
    pages: std::ops::Range<u64>,
) -> impl Iterator<Item = (u64, Extent)> + '_ {
    let mut page = pages.start;
    std::iter::from_fn(move || {
        let left = pages.end.checked_sub(page).filter(|left| *left > 0)?;
        let extent = extent(runs, page)?;
        let extent = Extent { pages: extent.pages.min(left), ..extent };
        let first = page;
        page += extent.pages;
        Some((first, extent))
    })
}

/// `done` for the fetch path, which gives back the index that a frame was asked under.
fn by_frame(done: impl Fn(FrameIndex, Result<Frame, Error>) + Send + Sync + 'static) -> Done {
    let index = |tag: usize| FrameIndex(u32::try_from(tag).unwrap_or(u32::MAX));
    Arc::new(move |tag, frame| done(index(tag), frame))
}
