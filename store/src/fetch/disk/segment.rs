//! One segment of the disk cache: `<number>.data` holds stored bytes of frames, back to back, and
//! `<number>.list` says which. A frame is listed after it was written. A list that ends early, or lies, costs
//! fetches: whatever is read is verified where it is used.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::index::Place;
use crate::SnapshotId;
use crate::fetch::{FrameKey, ObjectId};
use crate::format::frame::MAX_FRAME_PAGES;
use crate::format::keys::PackId;
use crate::format::{Reader, Writer};

/// Bytes of a list for each frame.
pub(super) const RECORD_BYTES: usize = 40;
/// A record begins with it: what a crash made of the end of a list is no record.
const MAGIC: u32 = 0x3246_4352;
/// Says that the object is a working set, whose sequence has twelve decimal digits.
const WORKING_SET: u64 = 1 << 63;
/// Most stored bytes of a frame, pages of 4096 bytes that are raw: readers allocate what a record says.
const MAX_STORED_BYTES: u32 = MAX_FRAME_PAGES as u32 * 4096;
/// Longest list that is read: three million frames.
const MAX_LIST_BYTES: u64 = 128 << 20;

/// A frame that is listed.
pub(super) type Listed = (FrameKey, Place);

fn write_record(writer: &mut Writer, (object, offset): &FrameKey, place: Place) {
    let (txn, number) = match object {
        ObjectId::Pack(pack) => (pack.txn, u64::from(pack.number)),
        ObjectId::WorkingSet(txn, sequence) => (*txn, *sequence | WORKING_SET),
    };
    // A place's frame lies in the first 4 GiB of its object: see `Index::insert`.
    let offset = u32::try_from(*offset).unwrap_or(u32::MAX);
    writer.u32(MAGIC).bytes(txn.as_bytes()).u64(number);
    writer.u32(offset).u32(place.offset).u32(place.length);
}

/// A record of segment `segment`, whose data has `data_bytes`.
fn read_record(bytes: &[u8], segment: u32, data_bytes: u64) -> Option<Listed> {
    let mut reader = Reader::new(bytes);
    let magic = reader.u32().ok()?;
    let txn = SnapshotId::from_bytes(reader.array().ok()?);
    let number = reader.u64().ok()?;
    let object = match number & WORKING_SET {
        0 => ObjectId::Pack(PackId { txn, number: u32::try_from(number).ok()? }),
        _ => ObjectId::WorkingSet(txn, number & !WORKING_SET),
    };
    let key = (object, u64::from(reader.u32().ok()?));
    let place = Place { segment, offset: reader.u32().ok()?, length: reader.u32().ok()? };
    let inside = u64::from(place.offset) + u64::from(place.length) <= data_bytes;
    let possible = (1..=MAX_STORED_BYTES).contains(&place.length);
    (magic == MAGIC && inside && possible).then_some((key, place))
}

/// Appends to a segment.
pub(super) struct SegmentWriter {
    number: u32,
    data: Arc<File>,
    list: File,
    bytes: u64,
    frames: u64,
    records: Writer,
}

impl SegmentWriter {
    /// A new segment.
    pub(super) fn create(directory: &Path, number: u32) -> std::io::Result<Self> {
        let new = |kind| {
            let path = path(directory, number, kind);
            File::options().read(true).write(true).create_new(true).open(path)
        };
        let data = Arc::new(new("data")?);
        // One of the two alone would be in the way of the next try.
        let list = new("list").inspect_err(|_| remove(directory, number))?;
        Ok(Self { number, data, list, bytes: 0, frames: 0, records: Writer::default() })
    }

    /// Goes on with a segment that [`load`] found.
    pub(super) fn go_on(directory: &Path, number: u32, data: Arc<File>) -> std::io::Result<Self> {
        let bytes = data.metadata()?.len();
        let mut list = File::options().write(true).open(path(directory, number, "list"))?;
        // A record that was not written to its end would shift all that follow.
        let frames = list.metadata()?.len() / RECORD_BYTES as u64;
        list.set_len(frames * RECORD_BYTES as u64)?;
        list.seek(SeekFrom::End(0))?;
        Ok(Self { number, data, list, bytes, frames, records: Writer::default() })
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    pub(super) fn data(&self) -> &Arc<File> {
        &self.data
    }

    /// Bytes of data.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Frames that were appended to it, ever.
    pub(super) fn frames(&self) -> u64 {
        self.frames
    }

    /// Writes a frame; it is not listed before [`Self::list`].
    pub(super) fn append(&mut self, key: &FrameKey, stored: &[u8]) -> std::io::Result<Place> {
        let too_long = std::io::Error::other;
        let place = Place {
            segment: self.number,
            offset: u32::try_from(self.bytes).map_err(too_long)?,
            length: u32::try_from(stored.len()).map_err(too_long)?,
        };
        self.data.write_all_at(stored, self.bytes)?;
        self.bytes += stored.len() as u64;
        self.frames += 1;
        write_record(&mut self.records, key, place);
        Ok(place)
    }

    /// Lists what was appended.
    pub(super) fn list(&mut self) -> std::io::Result<()> {
        let records = std::mem::take(&mut self.records.0);
        self.list.write_all(&records)
    }
}

/// The segments in `directory`, oldest first. A name that is not ours is no segment.
pub(super) fn numbers(directory: &Path) -> std::io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        numbers.extend(entry?.file_name().to_str().and_then(number_of));
    }
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// The number of a segment by either file's name. There is always one more number than those taken up.
fn number_of(name: &str) -> Option<u32> {
    let digits = name.strip_suffix(".data").or_else(|| name.strip_suffix(".list"))?;
    let ten = digits.len() == 10 && digits.bytes().all(|digit| digit.is_ascii_digit());
    let number = ten.then(|| digits.parse().ok()).flatten();
    number.filter(|number| *number < u32::MAX)
}

/// What an earlier process left of a segment: its data, what is listed of it, and the bytes of both files.
pub(super) fn load(
    directory: &Path,
    number: u32,
) -> std::io::Result<(Arc<File>, Vec<Listed>, u64)> {
    let data = File::options().read(true).write(true).open(path(directory, number, "data"))?;
    let data_bytes = data.metadata()?.len();
    let list = path(directory, number, "list");
    let list_bytes = std::fs::metadata(&list)?.len();
    if list_bytes > MAX_LIST_BYTES {
        return Err(std::io::Error::other("its list is too long"));
    }
    let records = std::fs::read(&list)?;
    let records = records.chunks_exact(RECORD_BYTES);
    let listed = records.filter_map(|record| read_record(record, number, data_bytes));
    Ok((Arc::new(data), listed.collect(), data_bytes + list_bytes))
}

/// Deletes a segment; readers that have it open go on.
pub(super) fn remove(directory: &Path, number: u32) {
    for kind in ["list", "data"] {
        let path = path(directory, number, kind);
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("{}: {error}", path.display());
        }
    }
}

fn path(directory: &Path, number: u32, kind: &str) -> PathBuf {
    directory.join(format!("{number:010}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_name_is_no_segment() {
        assert_eq!(number_of("0000000007.data"), Some(7));
        assert_eq!(number_of("0000000007.list"), Some(7));
        for bad in ["4294967295.data", "7.data", "+000000007.data", "9999999999.data", "a.list"] {
            assert_eq!(number_of(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_impossible_record_is_no_frame() {
        let txn = SnapshotId::from_bytes([7; 16]);
        for object in [ObjectId::WorkingSet(txn, 3), ObjectId::Pack(PackId { txn, number: 12 })] {
            let record = |offset, length| {
                let mut writer = Writer::default();
                write_record(&mut writer, &(object, 48), Place { segment: 5, offset, length });
                assert_eq!(writer.0.len(), RECORD_BYTES);
                writer.0
            };
            let place = Place { segment: 5, offset: 100, length: 50 };
            assert_eq!(read_record(&record(100, 50), 5, 150), Some(((object, 48), place)));
            assert_eq!(read_record(&record(100, 50), 5, 149), None, "it ends after the data");
            assert_eq!(read_record(&record(100, 0), 5, 150), None);
            let longest = read_record(&record(0, MAX_STORED_BYTES), 5, 1 << 30);
            assert!(longest.is_some());
            assert_eq!(read_record(&record(0, MAX_STORED_BYTES + 1), 5, 1 << 30), None);
            assert_eq!(read_record(&[0; RECORD_BYTES], 5, 1 << 30), None);
        }
    }
}
