//! Packs in the making: frames are collected, the footer is added, and the object is uploaded
//! while the next pack fills.

use bytes::Bytes;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::fetch::disk::incoming::Leaving;
use crate::format::frame::FrameEntry;
use crate::format::keys::PackId;
use crate::format::manifest::PackedFrame;
use crate::format::pack::{self, Footer, HEADER_BYTES};
use crate::format::record::PackRef;
use crate::id::Hash;
use crate::store::Store;
use crate::{Error, PAGE_SIZE, SnapshotId};

/// A pack is closed when it is this long. Two are in memory at once: one fills, one is on its way.
const PACK_BYTES: u64 = 32 << 20;
/// Or when it has this many pages, because their ids are in memory and in its footer.
const PACK_PAGES: usize = 1 << 17;

pub(super) struct PackWriter<'a> {
    store: &'a Store,
    runtime: &'a Runtime,
    leaving: Option<&'a mut Leaving>,
    finished: Vec<PackRef>,
    uploading: Option<JoinHandle<Result<(), Error>>>,
    open: OpenPack,
}

/// The pack that is being filled.
struct OpenPack {
    id: PackId,
    chunks: Vec<Bytes>,
    bytes: u64,
    hasher: blake3::Hasher,
    footer: Footer,
}

impl OpenPack {
    fn new(id: PackId) -> Self {
        let header = pack::header(id);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&header);
        let bytes = HEADER_BYTES as u64;
        Self { id, chunks: vec![header.into()], bytes, hasher, footer: Footer::default() }
    }

    /// Appends a frame; answers with its place.
    fn append(&mut self, entry: FrameEntry, stored: Bytes, page_ids: &[Hash]) -> PackedFrame {
        debug_assert_eq!(entry.decoded_bytes(), page_ids.len() * PAGE_SIZE);
        let entry = FrameEntry { offset: self.bytes, ..entry };
        self.push(stored);
        self.footer.frames.push(entry);
        self.footer.page_ids.extend_from_slice(page_ids);
        PackedFrame { pack: self.id.number, entry }
    }

    /// Adds footer and trailer.
    fn seal(&mut self) -> PackRef {
        self.push(pack::footer_and_trailer(self.id, &self.footer, self.bytes).into());
        let hash = Hash(*self.hasher.finalize().as_bytes());
        PackRef { pack: self.id, bytes: self.bytes, hash }
    }

    fn push(&mut self, chunk: Bytes) {
        self.hasher.update(&chunk);
        self.bytes += chunk.len() as u64;
        self.chunks.push(chunk);
    }
}

/// A whole pack of one page: its record, its frame, its bytes.
#[cfg(test)]
pub(super) fn small_pack(
    id: PackId,
    page: &[u8; PAGE_SIZE],
) -> Result<(PackRef, PackedFrame, Vec<Bytes>), Error> {
    let encoded = crate::format::frame::encode(page, 1);
    let (entry, stored) = encoded.map_err(|error| Error::local("compressing", error))?;
    let mut pack = OpenPack::new(id);
    let frame = pack.append(entry, stored, &[Hash::of(page)]);
    Ok((pack.seal(), frame, pack.chunks))
}

impl<'a> PackWriter<'a> {
    /// Packs of `txn`, which are also left with `leaving`.
    pub(super) fn new(
        txn: SnapshotId,
        store: &'a Store,
        runtime: &'a Runtime,
        leaving: Option<&'a mut Leaving>,
    ) -> Self {
        let open = OpenPack::new(PackId { txn, number: 0 });
        Self { store, runtime, leaving, finished: Vec::new(), uploading: None, open }
    }

    /// Appends a frame; answers with its place.
    pub(super) fn append(
        &mut self,
        entry: FrameEntry,
        stored: Bytes,
        page_ids: &[Hash],
    ) -> Result<PackedFrame, Error> {
        let packed = self.open.append(entry, stored, page_ids);
        if self.open.bytes >= PACK_BYTES || self.open.footer.page_ids.len() >= PACK_PAGES {
            self.close_pack()?;
        }
        Ok(packed)
    }

    /// Uploads what is left; answers with all packs.
    pub(super) fn finish(mut self) -> Result<Vec<PackRef>, Error> {
        if !self.open.footer.frames.is_empty() {
            self.close_pack()?;
        }
        self.wait_for_upload()?;
        Ok(self.finished)
    }

    fn close_pack(&mut self) -> Result<(), Error> {
        let next = PackId { number: self.open.id.number + 1, ..self.open.id };
        let mut pack = std::mem::replace(&mut self.open, OpenPack::new(next));
        self.finished.push(pack.seal());
        if let Some(leaving) = &mut self.leaving {
            leaving.leave(pack.id, pack.bytes, &pack.chunks);
        }
        self.wait_for_upload()?;
        let objects = self.store.objects().clone();
        let upload = async move { objects.create(&pack.id.key(), &pack.chunks).await };
        self.uploading = Some(self.runtime.spawn(upload));
        Ok(())
    }

    fn wait_for_upload(&mut self) -> Result<(), Error> {
        let Some(uploading) = self.uploading.take() else { return Ok(()) };
        let outcome = self.runtime.block_on(uploading);
        outcome.map_err(|error| Error::local("uploading a pack", error))?
    }
}
