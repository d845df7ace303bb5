//! The pages of one snapshot's packs, sorted by page id, in a mapped file: a hint where to look.
//!
//! Header of 32 bytes: magic, snapshot, number of entries. Then entries of 16 bytes, sorted: the
//! first 8 bytes of a page id as a big-endian number, the pack's number in the commit record, the
//! page's number in that pack.

use std::io::{BufWriter, Write};
use std::path::Path;

use super::footer::PackPages;
use super::mapped::Mapped;
use crate::SnapshotId;
use crate::format::{Malformed, Reader, require};
use crate::id::Hash;

const MAGIC: &[u8; 8] = b"REAPIDX\x01";
const HEADER_BYTES: usize = 32;
const ENTRY_BYTES: usize = 16;
/// Entries that are sorted at once: 64 MiB. A longer table is made in several passes over the
/// footers, a slice of the ids each.
const ENTRIES_AT_ONCE: u64 = 4 << 20;
/// Half of the first window of a search around where a uniform hash should lie.
const WINDOW: usize = 64;

/// Where a page might be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::pack) struct Hint {
    /// Number in the commit record's list.
    pub(in crate::pack) pack: u32,
    /// Number of the page in the pack.
    pub(in crate::pack) page: u32,
}

/// A mapped table.
pub(in crate::pack) struct Table {
    bytes: Mapped,
    count: usize,
}

impl Table {
    /// The table in `bytes`, if it is one of `snapshot` and whole.
    pub(super) fn check(snapshot: SnapshotId, bytes: Mapped) -> Result<Self, Malformed> {
        let mut reader = Reader::new(&bytes);
        require(reader.bytes(8)? == MAGIC, "it is not a page table")?;
        require(reader.bytes(16)? == snapshot.as_bytes(), "it belongs to another snapshot")?;
        let count = usize::try_from(reader.u64()?).map_err(|_| Malformed::from("too long"))?;
        let length = count.checked_mul(ENTRY_BYTES).and_then(|all| all.checked_add(HEADER_BYTES));
        require(length == Some(bytes.len()), "it has the wrong length")?;
        Ok(Self { bytes, count })
    }

    /// Everything that the table knows under the first bytes of `page_id`.
    pub(in crate::pack) fn hints(&self, page_id: &Hash) -> impl Iterator<Item = Hint> + '_ {
        let prefix = prefix(page_id);
        let mut at = self.lower_bound(prefix);
        std::iter::from_fn(move || {
            let (found, hint) = self.entry(at)?;
            at += 1;
            (found == prefix).then_some(hint)
        })
    }

    /// The first entry not below `prefix`. Hashes are uniform, so it lies close to its share of the
    /// table; the window grows until it is inside.
    fn lower_bound(&self, prefix: u64) -> usize {
        let share = (u128::from(prefix) * self.count as u128) >> 64;
        let guess = usize::try_from(share).unwrap_or(usize::MAX).min(self.count);
        let below = |at: usize| self.entry(at).is_some_and(|(found, _)| found < prefix);
        let (mut low, mut high, mut step) = (guess, guess, WINDOW);
        while low > 0 && !below(low) {
            low = low.saturating_sub(step);
            step *= 2;
        }
        step = WINDOW;
        while high < self.count && below(high) {
            high = (high + step).min(self.count);
            step *= 2;
        }
        while low < high {
            let middle = low + (high - low) / 2;
            if below(middle) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }

    fn entry(&self, at: usize) -> Option<(u64, Hint)> {
        let bytes = self.bytes.get(HEADER_BYTES + at * ENTRY_BYTES..)?;
        let (prefix, bytes) = bytes.split_first_chunk()?;
        let (pack, bytes) = bytes.split_first_chunk()?;
        let page = bytes.first_chunk()?;
        let hint = Hint { pack: u32::from_le_bytes(*pack), page: u32::from_le_bytes(*page) };
        Some((u64::from_be_bytes(*prefix), hint))
    }
}

/// Writes the table of `snapshot`, whose packs are `packs`, to `path`. Memory is bounded whatever
/// the number of pages.
pub(in crate::pack) fn write(
    path: &Path,
    snapshot: SnapshotId,
    packs: &[(u32, &PackPages)],
) -> std::io::Result<()> {
    write_in_passes(path, snapshot, packs, ENTRIES_AT_ONCE)
}

fn write_in_passes(
    path: &Path,
    snapshot: SnapshotId,
    packs: &[(u32, &PackPages)],
    entries_at_once: u64,
) -> std::io::Result<()> {
    let count: u64 = packs.iter().map(|(_, pages)| u64::from(pages.page_count())).sum();
    let passes = count.div_ceil(entries_at_once).max(1);
    let width = (u64::MAX / passes).saturating_add(1);
    let mut out = BufWriter::new(std::fs::File::create(path)?);
    out.write_all(MAGIC)?;
    out.write_all(snapshot.as_bytes())?;
    out.write_all(&count.to_le_bytes())?;
    let mut entries: Vec<(u64, u32, u32)> = Vec::new();
    for pass in 0..passes {
        entries.clear();
        for (pack, pages) in packs {
            for page in 0..pages.page_count() {
                let Some(page_id) = pages.page_id(page) else { continue };
                let prefix = prefix(&page_id);
                if passes == 1 || prefix / width == pass {
                    entries.push((prefix, *pack, page));
                }
            }
        }
        entries.sort_unstable();
        for (prefix, pack, page) in &entries {
            out.write_all(&prefix.to_be_bytes())?;
            out.write_all(&pack.to_le_bytes())?;
            out.write_all(&page.to_le_bytes())?;
        }
    }
    out.flush()
}

fn prefix(page_id: &Hash) -> u64 {
    page_id.0.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::frame;
    use crate::format::keys::PackId;
    use crate::format::pack::{self, Footer};

    fn page_id(number: u32) -> Hash {
        Hash::of(&number.to_le_bytes())
    }

    /// A pack of one-page frames with the ids of `numbers`.
    fn pack_of(directory: &Path, number: u32, numbers: std::ops::Range<u32>) -> PackPages {
        let pack = PackId { txn: SnapshotId::from_bytes([7; 16]), number };
        let (entry, stored) = frame::encode(&[1; crate::PAGE_SIZE], 3).expect("encodes");
        let footer_offset = pack::HEADER_BYTES as u64 + stored.len() as u64;
        let entry = frame::FrameEntry { offset: pack::HEADER_BYTES as u64, ..entry };
        let footer = Footer {
            frames: numbers.clone().map(|_| entry).collect(),
            page_ids: numbers.map(page_id).collect(),
        };
        let bytes = pack::footer_and_trailer(pack, &footer, footer_offset);
        let path = directory.join(format!("{number}"));
        std::fs::write(&path, &bytes).expect("written");
        let pack_bytes = footer_offset + bytes.len() as u64;
        let mapped = Mapped::open(&path).expect("maps");
        PackPages::verify(pack, pack_bytes, mapped).expect("a good footer")
    }

    #[test]
    fn every_page_is_found_and_no_other_whatever_the_number_of_passes() {
        let directory = tempfile::tempdir().expect("directory");
        let snapshot = SnapshotId::random();
        let packs: Vec<PackPages> = (0..3)
            .map(|pack| pack_of(directory.path(), pack, pack * 1000..pack * 1000 + 1500))
            .collect();
        let numbered: Vec<(u32, &PackPages)> = (0..).zip(&packs).collect();
        for entries_at_once in [1 << 20, 700, 64] {
            let path = directory.path().join("table");
            write_in_passes(&path, snapshot, &numbered, entries_at_once).expect("written");
            let table = Table::check(snapshot, Mapped::open(&path).expect("maps")).expect("good");
            for number in 0..3500 {
                let places = table.hints(&page_id(number));
                let found: Vec<_> = places
                    .filter(|hint| {
                        packs[hint.pack as usize].page_id(hint.page) == Some(page_id(number))
                    })
                    .collect();
                let twice = (1000..1500).contains(&number) || (2000..2500).contains(&number);
                assert_eq!(found.len(), if twice { 2 } else { 1 }, "{number}");
            }
            for number in 3500..9000 {
                assert_eq!(table.hints(&page_id(number)).next(), None, "{number}");
            }
        }
    }

    #[test]
    fn a_table_of_another_snapshot_or_length_is_refused() {
        let directory = tempfile::tempdir().expect("directory");
        let snapshot = SnapshotId::random();
        let pages = pack_of(directory.path(), 0, 0..100);
        let path = directory.path().join("table");
        write(&path, snapshot, &[(0, &pages)]).expect("written");
        let open = || Mapped::open(&path).expect("maps");
        assert!(Table::check(snapshot, open()).is_ok());
        assert!(Table::check(SnapshotId::random(), open()).is_err());
        let good = std::fs::read(&path).expect("read");
        for length in (0..good.len()).step_by(7) {
            std::fs::write(&path, &good[..length]).expect("written");
            assert!(Table::check(snapshot, open()).is_err(), "{length}");
        }
        // Wrong entries are no danger to the search itself.
        let mut shuffled = good.clone();
        shuffled[HEADER_BYTES..].reverse();
        std::fs::write(&path, &shuffled).expect("written");
        let table = Table::check(snapshot, open()).expect("has a header");
        (0..1000).for_each(|number| assert!(table.hints(&page_id(number)).count() <= 100));
    }
}
