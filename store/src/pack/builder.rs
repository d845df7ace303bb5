//! From scanned blocks to frames, runs and packs: the sequential middle of packing.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, sync_channel};

use bytes::Bytes;

use super::page_table::{PageTable, Place};
use super::source::Block;
use super::transaction::Transaction;
use super::upload::PackWriter;
use super::{Filled, wait};
use crate::format::frame::{self, FrameEntry};
use crate::format::manifest::{Facts, Manifest, PackedFrame, Run, ZERO_FRAME};
use crate::format::record::Statistics;
use crate::id::Hash;
use crate::workers::Workers;
use crate::{Error, File, PAGE_SIZE, Urgency};

/// Pages of a frame: 64 KiB. Fetching, verifying and decoding one takes some 100 us, and half the
/// size would compress a tenth worse; measured on six guests, see `docs/decisions/0001-frames.md`.
const FRAME_PAGES: usize = 16;
/// Frames that are being compressed while the builder goes on.
const FRAMES_AHEAD: usize = 64;

type Compressed = (Vec<Hash>, Receiver<std::io::Result<(FrameEntry, Bytes)>>);

pub(super) struct Builder<'a> {
    workers: &'a Workers,
    level: i32,
    packs: PackWriter<'a>,
    table: PageTable,
    /// Unique pages that will be the next frame, and their ids.
    pending: Vec<u8>,
    pending_ids: Vec<Hash>,
    compressing: VecDeque<Compressed>,
    /// Frames begun, compressed or not: the number of the frame that `pending` will be.
    next_frame: u32,
    frames: Vec<PackedFrame>,
    files: Vec<(File, Vec<Run>)>,
    next_page: u32,
    statistics: Statistics,
    snapshot: crate::SnapshotId,
}

impl<'a> Builder<'a> {
    pub(super) fn new(transaction: &'a Transaction<'_>, workers: &'a Workers, level: i32) -> Self {
        Self {
            workers,
            level,
            packs: PackWriter::new(transaction),
            table: PageTable::default(),
            pending: Vec::with_capacity(FRAME_PAGES * PAGE_SIZE),
            pending_ids: Vec::new(),
            compressing: VecDeque::new(),
            next_frame: 0,
            frames: Vec::new(),
            files: Vec::new(),
            next_page: 0,
            statistics: Statistics::default(),
            snapshot: transaction.id(),
        }
    }

    pub(super) fn begin_file(&mut self, file: &File) {
        self.files.push((file.clone(), Vec::new()));
        self.next_page = 0;
    }

    pub(super) fn add(&mut self, block: &Block) -> Result<(), Error> {
        self.statistics.pages += block.pages;
        if block.page_ids.is_empty() {
            self.statistics.zero_pages += block.pages;
            self.push_run(ZERO_FRAME, 0, block.pages)?;
        }
        for (page, page_id) in block.bytes.chunks_exact(PAGE_SIZE).zip(&block.page_ids) {
            let place = match page_id {
                None => {
                    self.statistics.zero_pages += 1;
                    Place { frame: ZERO_FRAME, position: 0 }
                }
                Some(page_id) => match self.table.get(page_id) {
                    Some(place) => {
                        self.statistics.duplicate_pages += 1;
                        place
                    }
                    None => self.store_page(page, *page_id)?,
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
        let packs = self.packs.finish()?;
        let mut statistics = self.statistics;
        statistics.pack_bytes = packs.iter().map(|pack| pack.bytes).sum();
        let manifest = Manifest {
            snapshot: self.snapshot,
            facts,
            packs: packs.iter().map(|pack| (pack.pack, pack.bytes)).collect(),
            frames: self.frames,
            files: self.files,
        };
        Ok((manifest, statistics, packs))
    }

    fn store_page(&mut self, page: &[u8], page_id: Hash) -> Result<Place, Error> {
        let position = u32::try_from(self.pending_ids.len()).unwrap_or(u32::MAX);
        let place = Place { frame: self.next_frame, position };
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
        let (sender, receiver) = sync_channel(1);
        let level = self.level;
        self.workers.submit(Urgency::Demand, move || {
            // The driver may have given up.
            sender.send(frame::encode(&pages, level)).unwrap_or_default();
        });
        self.compressing.push_back((std::mem::take(&mut self.pending_ids), receiver));
        self.next_frame += 1;
    }

    /// Appends the oldest frame that is being compressed to its pack.
    fn take_compressed(&mut self) -> Result<(), Error> {
        let Some((page_ids, receiver)) = self.compressing.pop_front() else { return Ok(()) };
        let encoded = wait(&receiver)?.map_err(|error| Error::local("compressing", error))?;
        let (entry, stored) = encoded;
        self.frames.push(self.packs.append(entry, stored, &page_ids)?);
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
