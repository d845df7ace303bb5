//! A working-set object: everything about it up front, then its frames in first-touch order.

use super::frame::{FRAME_ENTRY_BYTES, FrameEntry};
use super::{Malformed, Reader, Writer, require};
use crate::id::Hash;
use crate::working_set::{WEIGHT_ONE, WorkingSetRun};
use crate::{PAGE_SIZE, Profile, SnapshotId};

const MAGIC: &[u8; 7] = b"REAPWST";
/// What is written. Version 1 is read: it has neither profile, restores nor weights, and its frames are
/// hashed decoded.
const VERSION: u8 = 2;
/// Bytes before the header: magic, the header's length, its hash.
pub const PRELUDE_BYTES: usize = 48;
/// Longest object that is read whole.
pub const MAX_OBJECT_BYTES: u64 = 2 << 30;
/// Longest header.
pub const MAX_HEADER_BYTES: u64 = 64 << 20;
/// Most frames.
pub const MAX_FRAMES: u32 = 1 << 20;
/// Most runs, with bytes or zero.
pub const MAX_RUNS: u32 = 1 << 22;

/// A frame and how many runs its pages make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkingSetFrame {
    /// Where it lies; offsets count from the object's first byte.
    pub entry: FrameEntry,
    /// Runs of this frame; they follow those of the frame before.
    pub run_count: u32,
}

/// What a working-set object says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The snapshot it was recorded from.
    pub snapshot: SnapshotId,
    /// The hash of that snapshot's manifest: the pages are these pages and no others.
    pub manifest_hash: Hash,
    /// When, milliseconds since 1970.
    pub created_unix_ms: u64,
    /// How many restores it was learned from.
    pub restores: u32,
    /// What use of the snapshot it is for.
    pub profile: Profile,
    /// In first-touch order.
    pub frames: Vec<WorkingSetFrame>,
    /// Runs with bytes, in the order of the frames.
    pub runs: Vec<WorkingSetRun>,
    /// Recorded zero pages.
    pub zero_runs: Vec<WorkingSetRun>,
}

/// Prelude and header; `header.frames` have offsets that count from the first byte *after* them,
/// which become absolute here.
pub fn encode(header: &Header) -> Vec<u8> {
    let base = (PRELUDE_BYTES + header_bytes(header)) as u64;
    let mut writer = Writer::default();
    writer.bytes(header.snapshot.as_bytes()).bytes(&header.manifest_hash.0);
    writer.u64(header.created_unix_ms).u32(header.restores);
    let profile = header.profile.as_str();
    writer.u8(u8::try_from(profile.len()).expect("a profile is short")).bytes(profile.as_bytes());
    writer.count(header.frames.len()).count(header.runs.len()).count(header.zero_runs.len());
    for frame in &header.frames {
        let entry = FrameEntry { offset: base + frame.entry.offset, ..frame.entry };
        entry.write(&mut writer);
        writer.u32(frame.run_count);
    }
    for run in header.runs.iter().chain(&header.zero_runs) {
        let first_page = u32::try_from(run.first_page).expect("page numbers are 32 bits wide");
        writer.u32(run.file).u32(first_page).u32(run.pages).u32(run.first_touch_us);
        writer.u16(run.weight);
    }
    let body = writer.0;
    let mut object = Writer::default();
    object.bytes(MAGIC).u8(VERSION).u64(body.len() as u64).bytes(&Hash::of(&body).0).bytes(&body);
    object.0
}

fn header_bytes(header: &Header) -> usize {
    let runs = header.runs.len() + header.zero_runs.len();
    let fixed = 16 + 32 + 8 + 4 + 1 + 12;
    fixed
        + header.profile.as_str().len()
        + header.frames.len() * (FRAME_ENTRY_BYTES + 4)
        + runs * 18
}

/// Length of prelude and header, from the prelude.
pub fn header_end(prelude: &[u8]) -> Result<u64, Malformed> {
    let mut reader = Reader::new(prelude);
    require(reader.bytes(7)? == MAGIC, "it is not a working set")?;
    let known = (1..=VERSION).contains(&reader.u8()?);
    require(known, "it is not a working set of format version 1 or 2")?;
    let bytes = reader.u64()?;
    require(bytes <= MAX_HEADER_BYTES, "a working set's header is too long")?;
    Ok(PRELUDE_BYTES as u64 + bytes)
}

/// Reads prelude and header (exactly up to [`header_end`]) of an object of `object_bytes`.
pub fn decode(bytes: &[u8], object_bytes: u64) -> Result<Header, Malformed> {
    require(header_end(bytes)? == bytes.len() as u64, "a working set's header is truncated")?;
    let body = &bytes[PRELUDE_BYTES..];
    require(bytes[16..48] == Hash::of(body).0, "a working set's header does not match its hash")?;
    let version = bytes[MAGIC.len()];
    let mut reader = Reader::new(body);
    let snapshot = SnapshotId::from_bytes(reader.array()?);
    let manifest_hash = Hash(reader.array()?);
    let created_unix_ms = reader.u64()?;
    let (restores, profile) =
        if version == 1 { (1, Profile::default()) } else { (reader.u32()?, profile(&mut reader)?) };
    let (frame_count, run_count, zero_count) = (reader.u32()?, reader.u32()?, reader.u32()?);
    require(frame_count <= MAX_FRAMES, "a working set has too many frames")?;
    require(run_count <= MAX_RUNS && zero_count <= MAX_RUNS, "a working set has too many runs")?;
    let frames: Vec<_> = (0..frame_count)
        .map(|_| {
            let entry = match version {
                1 => FrameEntry::read(&mut reader, object_bytes)?,
                _ => FrameEntry::read_any(&mut reader, object_bytes)?,
            };
            Ok(WorkingSetFrame { entry, run_count: reader.u32()? })
        })
        .collect::<Result<_, Malformed>>()?;
    let mut run = |_| read_run(&mut reader, version);
    let runs: Vec<_> = (0..run_count).map(&mut run).collect::<Result<_, _>>()?;
    let zero_runs = (0..zero_count).map(&mut run).collect::<Result<_, _>>()?;
    reader.end()?;
    check_frames(&frames, bytes.len() as u64, object_bytes)?;
    check_runs(&frames, &runs)?;
    Ok(Header {
        snapshot,
        manifest_hash,
        created_unix_ms,
        restores,
        profile,
        frames,
        runs,
        zero_runs,
    })
}

fn profile(reader: &mut Reader<'_>) -> Result<Profile, Malformed> {
    let length = usize::from(reader.u8()?);
    let text = std::str::from_utf8(reader.bytes(length)?);
    let profile = text.ok().and_then(|text| text.parse().ok());
    profile.ok_or_else(|| "a working set's profile is no name".into())
}

fn read_run(reader: &mut Reader<'_>, version: u8) -> Result<WorkingSetRun, Malformed> {
    let run = WorkingSetRun {
        file: reader.u32()?,
        first_page: u64::from(reader.u32()?),
        pages: reader.u32()?,
        first_touch_us: reader.u32()?,
        weight: if version == 1 { WEIGHT_ONE } else { reader.u16()? },
    };
    require(run.pages > 0, "a run is empty")?;
    Ok(run)
}

/// The frames fill the object from the header to its end, one after the other.
fn check_frames(
    frames: &[WorkingSetFrame],
    header_end: u64,
    object_bytes: u64,
) -> Result<(), Malformed> {
    let mut at = header_end;
    for frame in frames {
        require(frame.entry.offset == at, "a working set's frames overlap or leave a gap")?;
        at = frame.entry.end();
    }
    require(at == object_bytes, "a working set does not end with its last frame")
}

fn check_runs(frames: &[WorkingSetFrame], runs: &[WorkingSetRun]) -> Result<(), Malformed> {
    let mut rest = runs;
    for frame in frames {
        let (own, later) = rest
            .split_at_checked(frame.run_count as usize)
            .ok_or("a working set's runs do not match its frames")?;
        let pages: u64 = own.iter().map(|run| u64::from(run.pages)).sum();
        let expected = (frame.entry.decoded_bytes() / PAGE_SIZE) as u64;
        require(pages == expected, "a working set's runs do not match its frames")?;
        rest = later;
    }
    require(rest.is_empty(), "a working set's runs do not match its frames")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::frame;

    #[test]
    fn frames_that_overlap_or_leave_a_gap_are_refused() {
        let (entry, stored) = frame::encode(&[7; PAGE_SIZE], 1).expect("encodes");
        let run = |first_page| WorkingSetRun {
            file: 0,
            first_page,
            pages: 1,
            first_touch_us: 0,
            weight: WEIGHT_ONE,
        };
        let header = |second: u64| Header {
            snapshot: SnapshotId::from_bytes([1; 16]),
            manifest_hash: Hash([2; 32]),
            created_unix_ms: 0,
            restores: 1,
            profile: Profile::default(),
            frames: [0, second]
                .map(|offset| WorkingSetFrame {
                    entry: FrameEntry { offset, ..entry },
                    run_count: 1,
                })
                .to_vec(),
            runs: vec![run(0), run(1)],
            zero_runs: Vec::new(),
        };
        let length = stored.len() as u64;
        let decoded = |second: u64, more: u64| {
            let bytes = encode(&header(second));
            let end = bytes.len() as u64 + second.max(length) + length + more;
            decode(&bytes, end).map(|header| header.frames.len())
        };
        assert_eq!(decoded(length, 0), Ok(2));
        for (second, more) in [(0, 0), (length - 1, 0), (length + 1, 0), (length, 1)] {
            assert!(decoded(second, more).is_err(), "{second}, {more} more");
        }
    }

    fn header() -> (Header, u64) {
        let (entry, stored) = frame::encode_for_working_set(&[7; PAGE_SIZE]).expect("encodes");
        let run = |first_page, weight| WorkingSetRun {
            file: 2,
            first_page,
            pages: 1,
            first_touch_us: 9,
            weight,
        };
        let header = Header {
            snapshot: SnapshotId::from_bytes([1; 16]),
            manifest_hash: Hash([2; 32]),
            created_unix_ms: 3,
            restores: 4,
            profile: "large-input".parse().expect("a profile"),
            frames: vec![WorkingSetFrame { entry, run_count: 1 }],
            runs: vec![run(5, 6)],
            zero_runs: vec![run(7, WEIGHT_ONE)],
        };
        (header, stored.len() as u64)
    }

    #[test]
    fn what_was_learned_is_kept_and_version_1_knew_nothing_of_it() {
        let (header, stored) = header();
        let bytes = encode(&header);
        let end = bytes.len() as u64;
        let mut expected = header.clone();
        expected.frames[0].entry.offset = end;
        assert_eq!(decode(&bytes, end + stored), Ok(expected.clone()));

        // As version 1 wrote it.
        let (entry, _) = frame::encode(&[7; PAGE_SIZE], 1).expect("encodes");
        let mut body = Writer::default();
        body.bytes(header.snapshot.as_bytes()).bytes(&header.manifest_hash.0).u64(3);
        body.u32(1).u32(1).u32(0);
        let end = (PRELUDE_BYTES + 16 + 32 + 8 + 12 + 52 + 16) as u64;
        FrameEntry { offset: end, ..entry }.write(&mut body);
        body.u32(1).u32(2).u32(5).u32(1).u32(9);
        let sealed = |magic: &[u8; 8], body: &[u8]| {
            let mut object = Writer::default();
            object.bytes(magic).u64(body.len() as u64).bytes(&Hash::of(body).0).bytes(body);
            object.0
        };
        let old = decode(&sealed(b"REAPWST\x01", &body.0), end + u64::from(entry.stored_bytes));
        let old = old.expect("version 1 is readable");
        assert_eq!((old.restores, old.profile, old.runs[0].weight), (1, Profile::default(), 256));
        for unknown in [b"REAPWST\x00", b"REAPWST\x03"] {
            assert!(header_end(&sealed(unknown, &body.0)).is_err());
        }
        // Hashes of stored bytes came with version 2.
        let codec_at = 16 + 32 + 8 + 12 + 14;
        assert_eq!(body.0[codec_at], 1);
        body.0[codec_at] = 2;
        assert!(
            decode(&sealed(b"REAPWST\x01", &body.0), end + u64::from(entry.stored_bytes)).is_err()
        );
    }

    #[test]
    fn a_profile_that_is_no_name_is_refused() {
        let (header, stored) = header();
        let good = encode(&header);
        let at = PRELUDE_BYTES + 16 + 32 + 8 + 4;
        for (offset, byte) in [(1, b'/'), (1, 0xff), (0, 65), (0, 255)] {
            let mut bytes = good.clone();
            bytes[at + offset] = byte;
            let hash = Hash::of(&bytes[PRELUDE_BYTES..]);
            bytes[16..48].copy_from_slice(&hash.0);
            assert!(decode(&bytes, bytes.len() as u64 + stored).is_err(), "{byte}");
        }
    }
}
