//! A manifest: the flat page map of one snapshot, and what a restore must match.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::frame::{FRAME_ENTRY_BYTES, FrameEntry};
use super::keys::PackId;
use super::{Malformed, Reader, Writer, require};
use crate::id::check_name;
use crate::{File, FileKind, PAGE_SIZE, SnapshotId};

const MAGIC: &[u8; 8] = b"REAPMAN\x01";
/// Bytes before the compressed body.
const PRELUDE_BYTES: usize = 16;
/// What a byte of a zstd frame can become: four make a block of 128 KiB (RFC 8878).
const MOST_EXPANSION: u64 = 32 << 10;
/// Longest manifest, as stored and decoded.
pub const MAX_MANIFEST_BYTES: u64 = 1 << 30;
/// Most packs that one snapshot refers to.
pub const MAX_PACKS: u32 = 1 << 20;
/// Most frames that one snapshot refers to.
pub const MAX_FRAMES: u32 = 1 << 26;
/// Most runs of all files together.
pub const MAX_RUNS: u32 = 1 << 27;
/// Most files of a snapshot.
pub const MAX_FILES: u32 = 64;
/// Largest file: page numbers are 32 bits wide.
pub const MAX_FILE_BYTES: u64 = (u32::MAX as u64) * PAGE_SIZE as u64;
/// Longest JSON of [`Facts`].
pub const MAX_FACTS_BYTES: u32 = 1 << 20;
/// In a run: no frame, the pages are zero.
pub const ZERO_FRAME: u32 = u32::MAX;

/// What a restore must match, and what the packer was told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The machine that the snapshot was packed on.
    pub host: HostFacts,
    /// The VMM that wrote it, if told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<String>,
    /// Its version, if told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm_version: Option<String>,
    /// Bytes of a guest page at snapshot time, if told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_page_bytes: Option<u64>,
    /// `--label` arguments.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
}

/// A machine, as far as a snapshot depends on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// As `uname -m` prints it.
    pub architecture: String,
    /// `vendor_id` of `/proc/cpuinfo`.
    pub cpu_vendor: String,
    /// `cpu family`.
    pub cpu_family: String,
    /// `model`.
    pub cpu_model: String,
    /// `model name`.
    pub cpu_model_name: String,
    /// `flags` (`Features` on ARM), sorted.
    pub cpu_flags: Vec<String>,
    /// As `uname -r` prints it.
    pub kernel: String,
    /// Bytes of a host page.
    pub page_bytes: u64,
}

/// Some pages of a file with one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First page of the file.
    pub first_page: u32,
    /// How many, at least 1.
    pub pages: u32,
    /// Number in [`Manifest::frames`], or [`ZERO_FRAME`].
    pub frame: u32,
    /// First page in the frame; 0 for zeros.
    pub position: u32,
}

/// A frame of the snapshot: which pack, and where there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedFrame {
    /// Number in [`Manifest::packs`].
    pub pack: u32,
    /// Where it lies.
    pub entry: FrameEntry,
}

/// A manifest in memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// Whose.
    pub snapshot: SnapshotId,
    /// See [`Facts`].
    pub facts: Facts,
    /// Every pack that it refers to, and its length.
    pub packs: Vec<(PackId, u64)>,
    /// Every frame that it refers to.
    pub frames: Vec<PackedFrame>,
    /// Its files and the runs of each, which cover the file without gap or overlap.
    pub files: Vec<(File, Vec<Run>)>,
}

/// The bytes of the manifest object.
pub fn encode(manifest: &Manifest) -> std::io::Result<Vec<u8>> {
    let body = encode_body(manifest)?;
    let too_long = || std::io::Error::other("the snapshot is too fragmented for one manifest");
    if body.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(too_long());
    }
    let mut object = Writer::default();
    object.bytes(MAGIC).u64(body.len() as u64);
    let mut object = object.0;
    object.extend_from_slice(&zstd::bulk::compress(&body, 3)?);
    Ok(object)
}

/// What is compressed.
pub(crate) fn encode_body(manifest: &Manifest) -> std::io::Result<Vec<u8>> {
    let mut body = Writer::default();
    body.bytes(manifest.snapshot.as_bytes());
    let facts = serde_json::to_vec(&manifest.facts).map_err(std::io::Error::other)?;
    body.count(facts.len()).bytes(&facts);
    body.count(manifest.packs.len());
    for (pack, bytes) in &manifest.packs {
        body.bytes(pack.txn.as_bytes()).u32(pack.number).u64(*bytes);
    }
    body.count(manifest.frames.len());
    for frame in &manifest.frames {
        body.u32(frame.pack);
        frame.entry.write(&mut body);
    }
    body.count(manifest.files.len());
    for (file, runs) in &manifest.files {
        write_file(&mut body, file, runs);
    }
    Ok(body.0)
}

fn write_file(body: &mut Writer, file: &File, runs: &[Run]) {
    let kind = match file.kind {
        FileKind::Memory => 0,
        FileKind::State => 1,
        FileKind::Disk => 2,
    };
    let name = file.name.as_bytes();
    body.u8(kind).u8(u8::try_from(name.len()).expect("file names are at most 128 bytes"));
    body.bytes(name).u64(file.size).count(runs.len());
    for run in runs {
        body.u32(run.pages).u32(run.frame);
        body.u16(u16::try_from(run.position).expect("a frame has at most 1024 pages"));
    }
}

/// Reads a manifest object. The caller has compared its hash; this checks its sense all the same.
pub fn decode(object: &[u8]) -> Result<Manifest, Malformed> {
    require(object.len() as u64 <= MAX_MANIFEST_BYTES, "a manifest is too long")?;
    let (prelude, compressed) =
        object.split_at_checked(PRELUDE_BYTES).ok_or("a manifest is truncated")?;
    let mut reader = Reader::new(prelude);
    require(reader.bytes(8)? == MAGIC, "it is not a manifest of format version 1")?;
    let body_bytes = reader.u64()?;
    require(body_bytes <= MAX_MANIFEST_BYTES, "a manifest is too long")?;
    let most = compressed.len() as u64 * MOST_EXPANSION;
    require(body_bytes <= most, "a manifest claims more than its bytes can hold")?;
    let capacity =
        usize::try_from(body_bytes).map_err(|_| Malformed::from("a manifest is too long"))?;
    let body = zstd::bulk::decompress(compressed, capacity)
        .map_err(|error| Malformed(format!("a manifest does not decompress ({error})")))?;
    require(body.len() == capacity, "a manifest has the wrong length")?;
    decode_body(&body)
}

/// Reads what was compressed.
pub(crate) fn decode_body(body: &[u8]) -> Result<Manifest, Malformed> {
    let mut reader = Reader::new(body);
    let snapshot = SnapshotId::from_bytes(reader.array()?);
    let facts_bytes = reader.count(MAX_FACTS_BYTES, 1)?;
    let facts = serde_json::from_slice(reader.bytes(facts_bytes)?)
        .map_err(|error| Malformed(format!("a manifest's facts are not valid ({error})")))?;
    let packs: Vec<(PackId, u64)> = (0..reader.count(MAX_PACKS, 28)?)
        .map(|_| {
            let txn = SnapshotId::from_bytes(reader.array()?);
            Ok((PackId { txn, number: reader.u32()? }, reader.u64()?))
        })
        .collect::<Result<_, Malformed>>()?;
    let frames: Vec<_> = (0..reader.count(MAX_FRAMES, 4 + FRAME_ENTRY_BYTES)?)
        .map(|_| read_frame(&mut reader, &packs))
        .collect::<Result<_, _>>()?;
    let files: Vec<_> = (0..reader.count(MAX_FILES, 14)?)
        .map(|_| read_file(&mut reader, &frames))
        .collect::<Result<_, _>>()?;
    reader.end()?;
    for (number, (file, _)) in files.iter().enumerate() {
        let repeated = files[..number].iter().any(|(earlier, _)| earlier.name == file.name);
        require(!repeated, "two files of a snapshot have one name")?;
    }
    Ok(Manifest { snapshot, facts, packs, frames, files })
}

fn read_frame(reader: &mut Reader<'_>, packs: &[(PackId, u64)]) -> Result<PackedFrame, Malformed> {
    let pack = reader.u32()?;
    let (_, pack_bytes) = packs.get(pack as usize).ok_or("a frame is in an unknown pack")?;
    Ok(PackedFrame { pack, entry: FrameEntry::read(reader, *pack_bytes)? })
}

fn read_file(
    reader: &mut Reader<'_>,
    frames: &[PackedFrame],
) -> Result<(File, Vec<Run>), Malformed> {
    let kind = match reader.u8()? {
        0 => FileKind::Memory,
        1 => FileKind::State,
        2 => FileKind::Disk,
        other => return Err(Malformed(format!("unknown kind of file {other}"))),
    };
    let name_bytes = usize::from(reader.u8()?);
    let name = String::from_utf8_lossy(reader.bytes(name_bytes)?).into_owned();
    check_name(&name).map_err(|error| Malformed(error.to_string()))?;
    let size = reader.u64()?;
    require(size <= MAX_FILE_BYTES, "a file is too long")?;
    let file_pages = size.div_ceil(PAGE_SIZE as u64);
    let run_count = reader.count(MAX_RUNS, 10)?;
    let mut runs = Vec::with_capacity(run_count);
    let mut next_page = 0u64;
    for _ in 0..run_count {
        let (pages, frame, position) = (reader.u32()?, reader.u32()?, u32::from(reader.u16()?));
        require(pages > 0, "a run is empty")?;
        if frame == ZERO_FRAME {
            require(position == 0, "a zero run has a position")?;
        } else {
            let frame = frames.get(frame as usize).ok_or("a run is in an unknown frame")?;
            let end = u64::from(position) + u64::from(pages);
            require(end <= u64::from(frame.entry.pages), "a run lies outside its frame")?;
        }
        let first_page =
            u32::try_from(next_page).map_err(|_| Malformed::from("a run is too far"))?;
        runs.push(Run { first_page, pages, frame, position });
        next_page += u64::from(pages);
        require(next_page <= file_pages, "runs are longer than their file")?;
    }
    require(next_page == file_pages, "runs are shorter than their file")?;
    Ok((File { name, kind, size }, runs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_object_that_claims_a_long_body_is_refused_before_it_is_made() {
        let mut object = MAGIC.to_vec();
        object.extend_from_slice(&MAX_MANIFEST_BYTES.to_le_bytes());
        object.extend_from_slice(&[0; 100]);
        let why = decode(&object).expect_err("claims a GiB").0;
        assert!(why.contains("more than its bytes can hold"), "{why}");
    }
}
