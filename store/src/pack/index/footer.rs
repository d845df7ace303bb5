//! The footer of one pack, mapped and verified: which page lies where.

use super::mapped::Mapped;
use crate::format::frame::{FRAME_ENTRY_BYTES, FrameEntry};
use crate::format::keys::PackId;
use crate::format::pack::{self, TRAILER_BYTES};
use crate::format::{Malformed, Reader};
use crate::id::Hash;

/// Bytes of the two counts before the frame entries.
const COUNTS_BYTES: usize = 8;

/// The pages of a pack. In memory are 4 bytes a frame; the rest stays in the mapped file.
pub(in crate::pack) struct PackPages {
    /// From the footer's first byte to the end of the pack.
    bytes: Mapped,
    footer_offset: u64,
    /// For each frame the number of its first page, counted through the pack.
    first_page: Vec<u32>,
    page_count: u32,
}

impl PackPages {
    /// Checks the footer's hash, which covers the pack's id, and its sense.
    pub(super) fn verify(pack: PackId, pack_bytes: u64, bytes: Mapped) -> Result<Self, Malformed> {
        let trailer = bytes.len().checked_sub(TRAILER_BYTES).ok_or("a footer is truncated")?;
        let range = pack::footer_range(&bytes[trailer..], pack_bytes)?;
        let footer = pack::read_footer(pack, range.start, &bytes)?;
        let mut page_count = 0;
        let first_page = footer
            .frames
            .iter()
            .map(|frame| {
                let first = page_count;
                page_count += u32::from(frame.pages);
                first
            })
            .collect();
        Ok(Self { bytes, footer_offset: range.start, first_page, page_count })
    }

    pub(in crate::pack) fn page_count(&self) -> u32 {
        self.page_count
    }

    /// The id of a page, by its number in the pack.
    pub(in crate::pack) fn page_id(&self, number: u32) -> Option<Hash> {
        if number >= self.page_count {
            return None;
        }
        let ids = COUNTS_BYTES + self.first_page.len() * FRAME_ENTRY_BYTES;
        let bytes = self.bytes.get(ids + number as usize * 32..)?.first_chunk()?;
        Some(Hash(*bytes))
    }

    /// The frame of a page, and the page's position there.
    pub(in crate::pack) fn place(&self, number: u32) -> Option<(FrameEntry, u32)> {
        let frame = self.first_page.partition_point(|first| *first <= number).checked_sub(1)?;
        let at = COUNTS_BYTES + frame * FRAME_ENTRY_BYTES;
        let mut reader = Reader::new(self.bytes.get(at..at + FRAME_ENTRY_BYTES)?);
        let entry = FrameEntry::read(&mut reader, self.footer_offset).ok()?;
        Some((entry, number - self.first_page[frame]))
    }
}
