//! One segment of the disk cache: `<number>.seg` holds records, `<number>.idx` lists them once the
//! segment is full. Without its list (after a crash) a segment is scanned, record by record.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::SnapshotId;
use crate::fetch::{FrameKey, ObjectId};
use crate::format::frame::MAX_FRAME_PAGES;
use crate::format::keys::{self, PackId};
use crate::format::{Reader, Writer};
use crate::id::Hash;

/// Bytes before each frame's stored bytes.
pub(super) const RECORD_BYTES: u64 = 48;
const MAGIC: u32 = 0x5346_5231;
/// Most stored bytes of a frame, pages of 4096 bytes that are raw: readers allocate what a record says.
const MAX_STORED_BYTES: u32 = MAX_FRAME_PAGES as u32 * 4096;
/// Longest list that is read: a million records.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// A frame in a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) key: FrameKey,
    /// Of the stored bytes, in the segment.
    pub(super) offset: u32,
    pub(super) length: u32,
}

impl Record {
    fn write(&self, writer: &mut Writer) {
        let (kind, txn, number) = match self.key.0 {
            ObjectId::Pack(pack) => (0, pack.txn, u64::from(pack.number)),
            ObjectId::WorkingSet(txn, sequence) => (1, txn, sequence),
        };
        writer.u32(MAGIC).u32(kind).bytes(txn.as_bytes()).u64(number).u64(self.key.1);
        writer.u32(self.offset).u32(self.length);
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let (magic, kind) = (reader.u32().ok()?, reader.u32().ok()?);
        let txn = SnapshotId::from_bytes(reader.array().ok()?);
        let number = reader.u64().ok()?;
        let object = match kind {
            0 => ObjectId::Pack(PackId { txn, number: u32::try_from(number).ok()? }),
            1 => ObjectId::WorkingSet(txn, number),
            _ => return None,
        };
        let key = (object, reader.u64().ok()?);
        let record = Self { key, offset: reader.u32().ok()?, length: reader.u32().ok()? };
        (magic == MAGIC && record.length <= MAX_STORED_BYTES).then_some(record)
    }
}

/// Appends to the newest segment.
pub(super) struct SegmentWriter {
    file: File,
    list: PathBuf,
    records: Writer,
    bytes: u64,
}

impl SegmentWriter {
    /// A new segment, and a handle to read it.
    pub(super) fn create(directory: &Path, number: u64) -> std::io::Result<(Self, File)> {
        let path = path(directory, number, "seg");
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        let reader = file.try_clone()?;
        let list = self::path(directory, number, "idx");
        Ok((Self { file, list, records: Writer::default(), bytes: 0 }, reader))
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Appends a frame; answers with the offset of its bytes.
    pub(super) fn append(&mut self, key: FrameKey, stored: &[u8]) -> std::io::Result<u32> {
        let too_long = std::io::Error::other;
        let offset = u32::try_from(self.bytes + RECORD_BYTES).map_err(too_long)?;
        let record = Record { key, offset, length: u32::try_from(stored.len()).map_err(too_long)? };
        let mut bytes = Writer::default();
        record.write(&mut bytes);
        bytes.bytes(stored);
        self.file.write_all(&bytes.0)?;
        self.bytes += bytes.0.len() as u64;
        record.write(&mut self.records);
        Ok(offset)
    }

    /// Writes the list. Failing to only means that the next start scans the segment.
    pub(super) fn seal(self) {
        let mut bytes = self.records.0;
        let hash = Hash::of(&bytes);
        bytes.extend_from_slice(&hash.0);
        if let Err(error) = std::fs::write(&self.list, bytes) {
            tracing::debug!("{}: {error}", self.list.display());
        }
    }
}

/// The segments in `directory`, oldest first.
pub(super) fn numbers(directory: &Path) -> std::io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name();
        numbers.extend(name.to_str().and_then(number_of));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// The number of a segment by its file's name; a name that is not ours is no segment. There is always
/// one more number than those taken up.
fn number_of(name: &str) -> Option<u64> {
    keys::sequence_of(name.strip_suffix(".seg")?).filter(|number| *number < keys::MAX_SEQUENCE)
}

/// Opens a segment of an earlier process.
pub(super) fn load(directory: &Path, number: u64) -> std::io::Result<(File, Vec<Record>)> {
    let file = File::open(path(directory, number, "seg"))?;
    let bytes = file.metadata()?.len();
    let records = match read_list(&path(directory, number, "idx"), bytes) {
        Some(records) => records,
        None => scan(&file, bytes)?,
    };
    Ok((file, records))
}

/// Deletes a segment; readers that have it open go on.
pub(super) fn remove(directory: &Path, number: u64) {
    for kind in ["seg", "idx"] {
        let path = path(directory, number, kind);
        if let Err(error) = std::fs::remove_file(&path)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!("{}: {error}", path.display());
        }
    }
}

fn read_list(path: &Path, segment_bytes: u64) -> Option<Vec<Record>> {
    if std::fs::metadata(path).ok()?.len() > MAX_INDEX_BYTES {
        return None;
    }
    let bytes = std::fs::read(path).ok()?;
    let (list, hash) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
    if Hash::of(list).0 != hash {
        return None;
    }
    let mut reader = Reader::new(list);
    let mut records = Vec::new();
    for _ in 0..list.len() as u64 / RECORD_BYTES {
        let record = Record::read(&mut reader)?;
        if u64::from(record.offset) + u64::from(record.length) > segment_bytes {
            return None;
        }
        records.push(record);
    }
    Some(records)
}

/// Records up to the first that is torn.
fn scan(file: &File, bytes: u64) -> std::io::Result<Vec<Record>> {
    let mut reader = BufReader::new(file);
    let mut records = Vec::new();
    let mut at = 0;
    let mut head = [0; 48];
    debug_assert_eq!(head.len() as u64, RECORD_BYTES);
    while at + RECORD_BYTES <= bytes {
        reader.seek(SeekFrom::Start(at))?;
        reader.read_exact(&mut head)?;
        let Some(record) = Record::read(&mut Reader::new(&head)) else {
            break;
        };
        let end = u64::from(record.offset) + u64::from(record.length);
        if u64::from(record.offset) != at + RECORD_BYTES || end > bytes {
            break;
        }
        records.push(record);
        at = end;
    }
    Ok(records)
}

fn path(directory: &Path, number: u64, kind: &str) -> PathBuf {
    directory.join(format!("{number:012}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_name_is_no_segment_and_an_impossible_length_no_record() {
        assert_eq!(number_of("000000000007.seg"), Some(7));
        for bad in
            ["18446744073709551615.seg", "7.seg", "+00000000007.seg", "999999999999.seg", "a.seg"]
        {
            assert_eq!(number_of(bad), None, "{bad}");
        }
        let key = (ObjectId::WorkingSet(SnapshotId::from_bytes([7; 16]), 3), 0);
        for (length, good) in [(MAX_STORED_BYTES, true), (MAX_STORED_BYTES + 1, false)] {
            let mut writer = Writer::default();
            Record { key, offset: 48, length }.write(&mut writer);
            assert_eq!(Record::read(&mut Reader::new(&writer.0)).is_some(), good);
        }
    }
}
