//! From scanned blocks to frames, runs and packs: the sequential middle of packing.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::mpsc::{Receiver, sync_channel};

use bytes::Bytes;

use super::page_table::{PageTable, Place};
use super::parents::{Known, Parents};
use super::source::{Block, Page};
use super::upload::PackWriter;
use super::{Filled, wait};
use crate::format::frame::{self, FrameEntry};
use crate::format::manifest::{Facts, MAX_FRAMES, Manifest, PackedFrame, Run, ZERO_FRAME};
use crate::format::record::{PackRef, Statistics};
use crate::id::Hash;
use crate::workers::Workers;
use crate::{Error, File, PAGE_SIZE, Urgency};

/// Pages of a frame: 64 KiB. Fetching, verifying and decoding one takes some 100 us, and half the
/// size would compress a tenth worse; measured on six guests, see `docs/decisions/0001-frames.md`.
const FRAME_PAGES: usize = 16;
/// Frames that are being compressed while the builder goes on.
const FRAMES_AHEAD: usize = 64;

/// A frame that is being compressed.
struct Compressing {
    frame: u32,
    page_ids: Vec<Hash>,
    encoded: Receiver<std::io::Result<(FrameEntry, Bytes)>>,
}

/// Where a frame of the new snapshot lies.
#[derive(Clone, Copy)]
enum FramePlace {
    /// Not known yet.
    Pending,
    /// In an own pack.
    Own(PackedFrame),
    /// In a parent's pack, by its number in [`Parents`].
    Parent(u32, FrameEntry),
}

pub(super) struct Builder<'a> {
    workers: &'a Workers,
    level: i32,
    packs: PackWriter<'a>,
    table: PageTable,
    /// Unique pages that will be the next frame, and their ids.
    pending: Vec<u8>,
    pending_ids: Vec<Hash>,
    /// The number of the frame that they will be.
    pending_frame: u32,
    compressing: VecDeque<Compressing>,
    frames: Vec<FramePlace>,
    parents: &'a Parents,
    /// Frames of parents that are referred to, by pack and offset.
    referred: HashMap<(u32, u64), u32>,
    files: Vec<(File, Vec<Run>)>,
    next_page: u32,
    statistics: Statistics,
    snapshot: crate::SnapshotId,
}

impl<'a> Builder<'a> {
    pub(super) fn new(
        snapshot: crate::SnapshotId,
        packs: PackWriter<'a>,
        workers: &'a Workers,
        parents: &'a Parents,
        level: i32,
    ) -> Self {
        Self {
            workers,
            level,
            packs,
            table: PageTable::default(),
            pending: Vec::with_capacity(FRAME_PAGES * PAGE_SIZE),
            pending_ids: Vec::new(),
            pending_frame: 0,
            compressing: VecDeque::new(),
            frames: Vec::new(),
            parents,
            referred: HashMap::new(),
            files: Vec::new(),
            next_page: 0,
            statistics: Statistics::default(),
            snapshot,
        }
    }

    pub(super) fn begin_file(&mut self, file: &File) {
        self.files.push((file.clone(), Vec::new()));
        self.next_page = 0;
    }

    pub(super) fn add(&mut self, block: &Block) -> Result<(), Error> {
        self.statistics.pages += block.page_count;
        if block.pages.is_empty() {
            self.statistics.zero_pages += block.page_count;
            return self.push_run(ZERO_FRAME, 0, block.page_count);
        }
        let mut bytes = block.bytes.chunks_exact(PAGE_SIZE);
        for page in &block.pages {
            let place = match page {
                Page::Zero => {
                    self.statistics.zero_pages += 1;
                    Place { frame: ZERO_FRAME, position: 0 }
                }
                Page::Known(known) => {
                    self.statistics.duplicate_pages += 1;
                    self.statistics.parent_pages += 1;
                    Place { frame: self.refer(known)?, position: known.position }
                }
                Page::Bytes(page_id) => match (self.table.get(page_id), bytes.next()) {
                    (Some(place), _) => {
                        self.statistics.duplicate_pages += 1;
                        place
                    }
                    (None, Some(page)) => self.store_page(page, *page_id)?,
                    (None, None) => {
                        let text = "a block lacks a page; this is a bug";
                        return Err(Error::local("packing", text));
                    }
                },
            };
            self.push_run(place.frame, place.position, 1)?;
        }
        Ok(())
    }

    /// Frames do not span files: a file's pages are read together, two files' are not.
    pub(super) fn end_file(&mut self) {
        self.cut_frame();
    }

    /// Waits for everything; the manifest lists what was packed.
    pub(super) fn finish(mut self, facts: Facts) -> Result<Filled, Error> {
        self.cut_frame();
        while !self.compressing.is_empty() {
            self.take_compressed()?;
        }
        let own = self.packs.finish()?;
        let mut statistics = self.statistics;
        statistics.pack_bytes = own.iter().map(|pack| pack.bytes).sum();
        let used: HashSet<u32> = self.referred.keys().map(|(pack, _)| *pack).collect();
        let (packs, frames) = place_frames(own, self.frames, self.parents)?;
        let manifest = Manifest {
            snapshot: self.snapshot,
            facts,
            packs: packs.iter().map(|pack| (pack.pack, pack.bytes)).collect(),
            frames,
            files: self.files,
        };
        Ok(Filled { manifest, statistics, packs, parents: self.parents.of(&used) })
    }

    /// The number of a frame for something that will be known of it.
    fn new_frame(&mut self, place: FramePlace) -> Result<u32, Error> {
        let number = u32::try_from(self.frames.len()).ok().filter(|number| *number < MAX_FRAMES);
        self.frames.push(place);
        number.ok_or_else(|| Error::invalid("a snapshot", "has too many frames for one manifest"))
    }

    fn refer(&mut self, known: &Known) -> Result<u32, Error> {
        let key = (known.pack, known.entry.offset);
        if let Some(frame) = self.referred.get(&key) {
            return Ok(*frame);
        }
        let frame = self.new_frame(FramePlace::Parent(known.pack, known.entry))?;
        self.referred.insert(key, frame);
        Ok(frame)
    }

    fn store_page(&mut self, page: &[u8], page_id: Hash) -> Result<Place, Error> {
        if self.pending_ids.is_empty() {
            self.pending_frame = self.new_frame(FramePlace::Pending)?;
        }
        let position = u32::try_from(self.pending_ids.len()).unwrap_or(u32::MAX);
        let place = Place { frame: self.pending_frame, position };
        self.table.insert(page_id, place);
        self.pending.extend_from_slice(page);
        self.pending_ids.push(page_id);
        self.statistics.unique_pages += 1;
        if self.pending_ids.len() == FRAME_PAGES {
            self.cut_frame();
            while self.compressing.len() > FRAMES_AHEAD {
                self.take_compressed()?;
            }
        }
        Ok(place)
    }

    /// Sends the pending pages to be compressed.
    fn cut_frame(&mut self) {
        if self.pending_ids.is_empty() {
            return;
        }
        let capacity = FRAME_PAGES * PAGE_SIZE;
        let pages = std::mem::replace(&mut self.pending, Vec::with_capacity(capacity));
        let (sender, encoded) = sync_channel(1);
        let level = self.level;
        self.workers.submit(Urgency::Demand, move || {
            // The driver may have given up.
            sender.send(frame::encode(&pages, level)).unwrap_or_default();
        });
        let page_ids = std::mem::take(&mut self.pending_ids);
        let frame = self.pending_frame;
        self.compressing.push_back(Compressing { frame, page_ids, encoded });
    }

    /// Appends the oldest frame that is being compressed to its pack.
    fn take_compressed(&mut self) -> Result<(), Error> {
        let Some(oldest) = self.compressing.pop_front() else { return Ok(()) };
        let encoded = wait(&oldest.encoded)?.map_err(|error| Error::local("compressing", error))?;
        let (entry, stored) = encoded;
        let packed = self.packs.append(entry, stored, &oldest.page_ids)?;
        self.frames[oldest.frame as usize] = FramePlace::Own(packed);
        Ok(())
    }

    fn push_run(&mut self, frame: u32, position: u32, pages: u64) -> Result<(), Error> {
        let too_long = |_| Error::invalid("a file", "is longer than 16 TiB");
        let pages = u32::try_from(pages).map_err(too_long)?;
        let first_page = self.next_page;
        self.next_page += pages;
        let Some((_, runs)) = self.files.last_mut() else { return Ok(()) };
        if let Some(last) = runs.last_mut() {
            let follows = if frame == ZERO_FRAME { 0 } else { last.position + last.pages };
            if last.frame == frame && follows == position {
                last.pages += pages;
                return Ok(());
            }
        }
        runs.push(Run { first_page, pages, frame, position });
        Ok(())
    }
}

/// All packs that the snapshot refers to, its own first, and its frames by their numbers there.
fn place_frames(
    mut packs: Vec<PackRef>,
    places: Vec<FramePlace>,
    parents: &Parents,
) -> Result<(Vec<PackRef>, Vec<PackedFrame>), Error> {
    let mut numbers = HashMap::new();
    let mut frames = Vec::with_capacity(places.len());
    for place in places {
        frames.push(match place {
            FramePlace::Own(packed) => packed,
            FramePlace::Parent(parent, entry) => {
                let pack = *numbers.entry(parent).or_insert_with(|| {
                    packs.push(parents.pack(parent).clone());
                    u32::try_from(packs.len() - 1).unwrap_or(u32::MAX)
                });
                PackedFrame { pack, entry }
            }
            FramePlace::Pending => {
                return Err(Error::local("packing", "a frame was not packed; this is a bug"));
            }
        });
    }
    Ok((packs, frames))
}
