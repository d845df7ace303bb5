//! Reading everything that a snapshot consists of, and saying what is wrong.

use std::collections::HashMap;
use std::sync::Arc;

use futures::StreamExt;

use crate::format::frame::FrameEntry;
use crate::format::keys::PackId;
use crate::format::manifest::Manifest;
use crate::format::record::PackRef;
use crate::format::{Malformed, frame, keys, pack, require, working_set};
use crate::id::Hash;
use crate::store::Store;
use crate::{Error, ErrorKind, SnapshotId};

/// Packs that are in memory at once.
const PARALLEL_PACKS: usize = 2;

/// What a verification read and found.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Report {
    /// Snapshots that were looked at.
    pub snapshots: u64,
    /// Packs read, hashed and decoded.
    pub packs: u64,
    /// Frames decoded and compared with their hashes.
    pub frames: u64,
    /// Working sets decoded.
    pub working_sets: u64,
    /// Bytes read.
    pub bytes: u64,
    /// A line for each snapshot or pack that cannot be restored as it was packed.
    pub problems: Vec<String>,
    /// A line for each damaged working set: it costs speed only.
    pub warnings: Vec<String>,
}

/// Reads every object of `snapshots`, each pack once. Errors only when the store cannot be asked.
pub async fn verify(store: &Store, snapshots: &[SnapshotId]) -> Result<Report, Error> {
    let mut report = Report::default();
    // What each pack that was read holds; `None` where it is damaged.
    let mut seen: HashMap<PackId, Option<Marks>> = HashMap::new();
    for id in snapshots {
        report.snapshots += 1;
        let (commit, manifest) = match store.read_snapshot(*id).await {
            Ok(read) => read,
            Err(error) if is_finding(&error) => {
                report.problems.push(format!("snapshot {id}: {error}"));
                continue;
            }
            Err(error) => return Err(error),
        };
        let manifest = Arc::new(manifest);
        let (shared, unseen): (Vec<_>, Vec<_>) = commit
            .packs
            .into_iter()
            .enumerate()
            .partition(|(_, pack)| seen.contains_key(&pack.pack));
        for (number, pack) in shared {
            let marks = seen.get(&pack.pack).and_then(Option::as_ref);
            if !marks.is_some_and(|marks| has_frames(&manifest, number, marks)) {
                let key = pack.pack.key();
                report.problems.push(format!("snapshot {id}: {key}: it cannot be read from it"));
            }
        }
        let mut checks = futures::stream::iter(unseen)
            .map(|(number, reference)| {
                let (pack, manifest) = (reference.pack, manifest.clone());
                async move {
                    Ok::<_, Error>((pack, check_pack(store, number, reference, manifest).await?))
                }
            })
            .buffer_unordered(PARALLEL_PACKS);
        while let Some(checked) = checks.next().await {
            let (pack, checked) = checked?;
            let marks = match checked {
                Ok((marks, bytes)) => {
                    report.packs += 1;
                    report.frames += marks.len() as u64;
                    report.bytes += bytes;
                    Some(marks)
                }
                Err(problem) => {
                    report.problems.push(format!("snapshot {id}: {problem}"));
                    None
                }
            };
            seen.insert(pack, marks);
        }
        check_working_sets(store, *id, commit.manifest_hash, &mut report).await?;
    }
    Ok(report)
}

/// Whether an error says something of the snapshot, rather than of the way to the store.
fn is_finding(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Damaged)
}

/// What tells the frames of one pack apart, sorted: 64 bits of place and hash each.
type Marks = Vec<u64>;

fn mark(entry: &FrameEntry) -> u64 {
    let hash = entry.hash.0.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    hash ^ entry.offset.rotate_left(32)
}

/// Whether the pack with these frames has all that the manifest says of pack number `number`.
fn has_frames(manifest: &Manifest, number: usize, marks: &Marks) -> bool {
    let mut frames = manifest.frames.iter().filter(|frame| frame.pack as usize == number);
    frames.all(|frame| marks.binary_search(&mark(&frame.entry)).is_ok())
}

/// Frames and bytes read, or what is wrong.
type Checked = Result<(Marks, u64), Error>;

async fn check_pack(
    store: &Store,
    number: usize,
    reference: PackRef,
    manifest: Arc<Manifest>,
) -> Result<Checked, Error> {
    let key = reference.pack.key();
    let object = match store.objects().get(&key, pack::MAX_PACK_BYTES).await {
        Ok(object) => object,
        Err(error) if is_finding(&error) => return Ok(Err(error)),
        Err(error) => return Err(error),
    };
    let bytes = object.len() as u64;
    let check = move || decode_pack(number, &reference, &manifest, &object);
    let checked = tokio::task::spawn_blocking(check).await;
    let checked = checked.map_err(|error| Error::local(&key, error))?;
    Ok(checked.map(|marks| (marks, bytes)).map_err(|why| Error::damaged(key, why)))
}

fn decode_pack(
    number: usize,
    reference: &PackRef,
    manifest: &Manifest,
    object: &[u8],
) -> Result<Marks, Malformed> {
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
    require(has_frames(manifest, number, &marks), "it lacks a frame of the manifest")?;
    Ok(marks)
}

async fn check_working_sets(
    store: &Store,
    id: SnapshotId,
    manifest_hash: Hash,
    report: &mut Report,
) -> Result<(), Error> {
    for listed in store.working_sets(id).await? {
        let key = keys::working_set(id, listed.sequence);
        let object = match store.objects().get(&key, working_set::MAX_OBJECT_BYTES).await {
            Ok(object) => object,
            // It costs speed only, and the rest is to be looked at.
            Err(error) if is_finding(&error) => {
                report.warnings.push(error.to_string());
                continue;
            }
            Err(error) => return Err(error),
        };
        let check = move || decode_working_set(id, manifest_hash, &object);
        let checked = tokio::task::spawn_blocking(check).await;
        match checked.map_err(|error| Error::local(&key, error))? {
            Ok(frames) => {
                report.working_sets += 1;
                report.frames += frames;
                report.bytes += listed.stored_bytes;
            }
            Err(why) => report.warnings.push(format!("{key}: {why}")),
        }
    }
    Ok(())
}

fn decode_working_set(
    id: SnapshotId,
    manifest_hash: Hash,
    object: &[u8],
) -> Result<u64, Malformed> {
    let prelude = object.get(..working_set::PRELUDE_BYTES).ok_or("it is truncated")?;
    let end = usize::try_from(working_set::header_end(prelude)?).unwrap_or(usize::MAX);
    let header = object.get(..end).ok_or("it is truncated")?;
    let header = working_set::decode(header, object.len() as u64)?;
    let ours = header.snapshot == id && header.manifest_hash == manifest_hash;
    require(ours, "it was recorded from another snapshot")?;
    for frame in &header.frames {
        let from = usize::try_from(frame.entry.offset).unwrap_or(usize::MAX);
        let stored = object.get(from..from + frame.entry.stored_bytes as usize);
        frame::decode(&frame.entry, stored.ok_or("it is truncated")?)?;
    }
    Ok(header.frames.len() as u64)
}
