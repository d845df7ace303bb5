//! Whole packs and working sets: by their lengths, or by every byte.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use futures::StreamExt;

use super::records::runs_of;
use super::{Findings, Level, Progress, is_finding};
use crate::format::frame::FrameEntry;
use crate::format::keys::PackId;
use crate::format::manifest::Manifest;
use crate::format::record::PackRef;
use crate::format::{Malformed, frame, keys, pack, require, working_set};
use crate::id::Hash;
use crate::objects::Objects;
use crate::store::check_bound;
use crate::{Error, SnapshotId};

/// Packs that are in memory at once.
const PARALLEL_PACKS: usize = 2;

impl Findings<'_> {
    /// Whether every pack is listed, and as long as is recorded.
    pub(super) async fn check_sizes(&mut self, level: Level) -> Result<(), Error> {
        let listed = self.store.objects().list("pack/").await?;
        let lengths: HashMap<String, u64> =
            listed.into_iter().map(|object| (object.key, object.bytes)).collect();
        let mut lost = Vec::new();
        for (pack, needed) in &mut self.needed {
            let length = lengths.get(&pack.key());
            needed.is_lost = length != Some(&needed.bytes);
            match length {
                Some(length) if needed.is_lost => {
                    let text = format!("is {length} bytes long, {} are recorded", needed.bytes);
                    lost.push((*pack, Error::damaged(pack.key(), text)));
                }
                None => lost.push((*pack, Error::not_found(pack.key(), "is not there"))),
                _ if level != Level::Everything => self.report.packs += 1,
                _ => {}
            }
        }
        for (pack, error) in lost {
            self.pack_finding(pack, &error).await?;
        }
        Ok(())
    }

    /// Every pack and every working set, read whole; each pack once.
    pub(super) async fn check_packs(
        &mut self,
        snapshots: &[SnapshotId],
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<(), Error> {
        let total_bytes = self.needed.values().map(|needed| needed.bytes).sum();
        let mut at = Progress { done_bytes: 0, total_bytes };
        // What each pack that was read holds; `None` where it is damaged.
        let mut seen: BTreeMap<PackId, Option<Marks>> = BTreeMap::new();
        let lost = self.needed.iter().filter(|(_, needed)| needed.is_lost);
        seen.extend(lost.map(|(pack, _)| (*pack, None)));
        for id in snapshots {
            let (commit, manifest) = match self.store.read_snapshot(*id).await {
                Ok(read) => read,
                // Was told already.
                Err(error) if is_finding(&error) => continue,
                Err(error) => return Err(error),
            };
            let manifest = Arc::new(manifest);
            let (shared, unseen): (Vec<_>, Vec<_>) = commit
                .packs
                .into_iter()
                .enumerate()
                .partition(|(_, pack)| seen.contains_key(&pack.pack));
            for (number, pack) in shared {
                // One that is damaged was told of already.
                if let Some(Some(marks)) = seen.get(&pack.pack)
                    && !has_frames(&manifest, number, marks)
                {
                    let text = format!("{}: it lacks a frame of the manifest", pack.pack.key());
                    self.problem(*id, text);
                }
            }
            let objects = self.store.objects();
            let mut checks = futures::stream::iter(unseen)
                .map(|(number, reference)| check_pack(objects, number, reference, manifest.clone()))
                .buffer_unordered(PARALLEL_PACKS);
            while let Some(checked) = checks.next().await {
                let (reference, checked) = checked?;
                at.done_bytes += reference.bytes;
                progress(at);
                let marks = match checked {
                    Ok(marks) => {
                        self.report.packs += 1;
                        self.report.frames += marks.len() as u64;
                        self.report.bytes += reference.bytes;
                        Some(marks)
                    }
                    Err(error) => {
                        self.pack_finding(reference.pack, &error).await?;
                        None
                    }
                };
                seen.insert(reference.pack, marks);
            }
            self.check_working_sets(*id, commit.manifest_hash, &manifest).await?;
        }
        Ok(())
    }

    async fn check_working_sets(
        &mut self,
        id: SnapshotId,
        manifest_hash: Hash,
        manifest: &Arc<Manifest>,
    ) -> Result<(), Error> {
        for listed in self.store.working_sets(id).await? {
            let key = keys::working_set(id, listed.sequence);
            let got = self.store.objects().get(&key, working_set::MAX_OBJECT_BYTES).await;
            let object = match got {
                Ok(object) => object,
                // It costs speed only, and the rest is to be looked at.
                Err(error) if is_finding(&error) => {
                    self.report.warnings.push(error.to_string());
                    continue;
                }
                Err(error) => return Err(error),
            };
            let manifest = manifest.clone();
            let check = move || decode_working_set(id, manifest_hash, &manifest, &object);
            let checked = tokio::task::spawn_blocking(check).await;
            match checked.map_err(|error| Error::local(&key, error))? {
                Ok(frames) => {
                    self.report.working_sets += 1;
                    self.report.frames += frames;
                    self.report.bytes += listed.stored_bytes;
                }
                Err(why) => self.report.warnings.push(format!("{key}: {why}")),
            }
        }
        Ok(())
    }
}

/// What tells the frames of one pack apart, sorted: 64 bits of place and hash each.
pub(crate) type Marks = Vec<u64>;

fn mark(entry: &FrameEntry) -> u64 {
    let hash = entry.hash.0.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    hash ^ entry.offset.rotate_left(32)
}

/// Whether the pack with these frames has all that the manifest says of pack number `number`.
pub(crate) fn has_frames(manifest: &Manifest, number: usize, marks: &Marks) -> bool {
    let mut frames = manifest.frames.iter().filter(|frame| frame.pack as usize == number);
    frames.all(|frame| marks.binary_search(&mark(&frame.entry)).is_ok())
}

/// Its frames, or what is wrong with it.
async fn check_pack(
    objects: &Objects,
    number: usize,
    reference: PackRef,
    manifest: Arc<Manifest>,
) -> Result<(PackRef, Result<Marks, Error>), Error> {
    let key = reference.pack.key();
    let object = match objects.get(&key, pack::MAX_PACK_BYTES).await {
        Ok(object) => object,
        Err(error) if is_finding(&error) => return Ok((reference, Err(error))),
        Err(error) => return Err(error),
    };
    let check = move || {
        let marks = decode_pack(&reference, &object).and_then(|marks| {
            let has_all = has_frames(&manifest, number, &marks);
            require(has_all, "it lacks a frame of the manifest").map(|()| marks)
        });
        (reference, marks)
    };
    let checked = tokio::task::spawn_blocking(check).await;
    let (reference, marks) = checked.map_err(|error| Error::local(&key, error))?;
    Ok((reference, marks.map_err(|why| Error::damaged(key, why))))
}

/// Looks at every byte of a pack.
pub(crate) fn decode_pack(reference: &PackRef, object: &[u8]) -> Result<Marks, Malformed> {
    require(object.len() as u64 == reference.bytes, "it has the wrong length")?;
    require(Hash::of(object) == reference.hash, "it does not match its hash")?;
    let header = object.get(..pack::HEADER_BYTES).ok_or("it is truncated")?;
    pack::check_header(reference.pack, header)?;
    let trailer_at = object.len().checked_sub(pack::TRAILER_BYTES).ok_or("it is truncated")?;
    let range = pack::footer_range(&object[trailer_at..], reference.bytes)?;
    let at = usize::try_from(range.start).map_err(|_| Malformed::from("it is too long"))?;
    let footer = pack::read_footer(reference.pack, range.start, &object[at..])?;
    let mut page_ids = footer.page_ids.iter();
    for entry in &footer.frames {
        let from = usize::try_from(entry.offset).map_err(|_| Malformed::from("it is too long"))?;
        let decoded = frame::decode(entry, &object[from..from + entry.stored_bytes as usize])?;
        for page in decoded.chunks_exact(crate::PAGE_SIZE) {
            require(page_ids.next() == Some(&Hash::of(page)), "a page does not match its id")?;
        }
    }
    let mut marks: Marks = footer.frames.iter().map(mark).collect();
    marks.sort_unstable();
    Ok(marks)
}

/// Looks at every byte of a working set; how many frames it has.
pub(crate) fn decode_working_set(
    id: SnapshotId,
    manifest_hash: Hash,
    manifest: &Manifest,
    object: &[u8],
) -> Result<u64, Malformed> {
    let prelude = object.get(..working_set::PRELUDE_BYTES).ok_or("it is truncated")?;
    let end = usize::try_from(working_set::header_end(prelude)?).unwrap_or(usize::MAX);
    let header = object.get(..end).ok_or("it is truncated")?;
    let header = working_set::decode(header, object.len() as u64)?;
    check_bound(&header, id, manifest_hash, |file| runs_of(manifest, file))?;
    for frame in &header.frames {
        let from = usize::try_from(frame.entry.offset).unwrap_or(usize::MAX);
        let stored = object.get(from..from + frame.entry.stored_bytes as usize);
        frame::decode(&frame.entry, stored.ok_or("it is truncated")?)?;
    }
    Ok(header.frames.len() as u64)
}
