//! A working-set object: everything about it up front, then its frames in first-touch order.

use super::frame::{FRAME_ENTRY_BYTES, FrameEntry};
use super::{Malformed, Reader, Writer, require};
use crate::id::Hash;
use crate::working_set::WorkingSetRun;
use crate::{PAGE_SIZE, SnapshotId};

const MAGIC: &[u8; 8] = b"REAPWST\x01";
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
    writer.u64(header.created_unix_ms);
    writer.count(header.frames.len()).count(header.runs.len()).count(header.zero_runs.len());
    for frame in &header.frames {
        let entry = FrameEntry { offset: base + frame.entry.offset, ..frame.entry };
        entry.write(&mut writer);
        writer.u32(frame.run_count);
    }
    for run in header.runs.iter().chain(&header.zero_runs) {
        let first_page = u32::try_from(run.first_page).expect("page numbers are 32 bits wide");
        writer.u32(run.file).u32(first_page).u32(run.pages).u32(run.first_touch_us);
    }
    let body = writer.0;
    let mut object = Writer::default();
    object.bytes(MAGIC).u64(body.len() as u64).bytes(&Hash::of(&body).0).bytes(&body);
    object.0
}

fn header_bytes(header: &Header) -> usize {
    let runs = header.runs.len() + header.zero_runs.len();
    16 + 32 + 8 + 12 + header.frames.len() * (FRAME_ENTRY_BYTES + 4) + runs * 16
}

/// Length of prelude and header, from the prelude.
pub fn header_end(prelude: &[u8]) -> Result<u64, Malformed> {
    let mut reader = Reader::new(prelude);
    require(reader.bytes(8)? == MAGIC, "it is not a working set of format version 1")?;
    let bytes = reader.u64()?;
    require(bytes <= MAX_HEADER_BYTES, "a working set's header is too long")?;
    Ok(PRELUDE_BYTES as u64 + bytes)
}

/// Reads prelude and header (exactly up to [`header_end`]) of an object of `object_bytes`.
pub fn decode(bytes: &[u8], object_bytes: u64) -> Result<Header, Malformed> {
    require(header_end(bytes)? == bytes.len() as u64, "a working set's header is truncated")?;
    let body = &bytes[PRELUDE_BYTES..];
    require(bytes[16..48] == Hash::of(body).0, "a working set's header does not match its hash")?;
    let mut reader = Reader::new(body);
    let snapshot = SnapshotId::from_bytes(reader.array()?);
    let manifest_hash = Hash(reader.array()?);
    let created_unix_ms = reader.u64()?;
    let (frame_count, run_count, zero_count) = (reader.u32()?, reader.u32()?, reader.u32()?);
    require(frame_count <= MAX_FRAMES, "a working set has too many frames")?;
    require(run_count <= MAX_RUNS && zero_count <= MAX_RUNS, "a working set has too many runs")?;
    let frames: Vec<_> = (0..frame_count)
        .map(|_| {
            let entry = FrameEntry::read(&mut reader, object_bytes)?;
            Ok(WorkingSetFrame { entry, run_count: reader.u32()? })
        })
        .collect::<Result<_, Malformed>>()?;
    let runs: Vec<_> = (0..run_count).map(|_| read_run(&mut reader)).collect::<Result<_, _>>()?;
    let zero_runs = (0..zero_count).map(|_| read_run(&mut reader)).collect::<Result<_, _>>()?;
    reader.end()?;
    check_frames(&frames, bytes.len() as u64, object_bytes)?;
    check_runs(&frames, &runs)?;
    Ok(Header { snapshot, manifest_hash, created_unix_ms, frames, runs, zero_runs })
}

fn read_run(reader: &mut Reader<'_>) -> Result<WorkingSetRun, Malformed> {
    let run = WorkingSetRun {
        file: reader.u32()?,
        first_page: u64::from(reader.u32()?),
        pages: reader.u32()?,
        first_touch_us: reader.u32()?,
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
        let run = |page| WorkingSetRun { file: 0, first_page: page, pages: 1, first_touch_us: 0 };
        let header = |second: u64| Header {
            snapshot: SnapshotId::from_bytes([1; 16]),
            manifest_hash: Hash([2; 32]),
            created_unix_ms: 0,
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
}
