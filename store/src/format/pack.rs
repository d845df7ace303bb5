//! A pack: header, frames, footer, trailer. Readers never need the footer; packers do.

use super::frame::{FRAME_ENTRY_BYTES, FrameEntry};
use super::keys::PackId;
use super::{Malformed, Reader, Writer, require};
use crate::id::Hash;

const MAGIC: &[u8; 8] = b"REAPPAK\x01";
const END_MAGIC: &[u8; 8] = b"REAPEND\x01";
/// Bytes before the first frame.
pub const HEADER_BYTES: usize = 32;
/// Bytes after the footer: where it begins, how long it is, its hash.
pub const TRAILER_BYTES: usize = 56;
/// Bytes of a pack without frames: header, two counts, trailer.
pub const EMPTY_BYTES: u64 = (HEADER_BYTES + 8 + TRAILER_BYTES) as u64;
/// Most frames of a pack.
pub const MAX_PACK_FRAMES: u32 = 1 << 20;
/// Most pages of a pack.
pub const MAX_PACK_PAGES: u32 = 1 << 24;
/// Longest footer: as many frames and pages as a pack may have.
const MAX_FOOTER_BYTES: u64 =
    8 + MAX_PACK_FRAMES as u64 * FRAME_ENTRY_BYTES as u64 + MAX_PACK_PAGES as u64 * 32;
/// Longest pack that is read.
pub const MAX_PACK_BYTES: u64 = 4 << 30;

/// What a pack's footer lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footer {
    /// The frames, by offset.
    pub frames: Vec<FrameEntry>,
    /// The ids of their pages, frame after frame.
    pub page_ids: Vec<Hash>,
}

/// The first bytes of pack `id`.
pub fn header(id: PackId) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.bytes(MAGIC).bytes(id.txn.as_bytes()).u32(id.number).u32(0);
    writer.0
}

/// Checks the first bytes of pack `id`.
pub fn check_header(id: PackId, bytes: &[u8]) -> Result<(), Malformed> {
    require(bytes == header(id), "a pack does not begin with its own header")
}

/// Footer and trailer of a pack whose frames end at `footer_offset`.
pub fn footer_and_trailer(id: PackId, footer: &Footer, footer_offset: u64) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.count(footer.frames.len()).count(footer.page_ids.len());
    footer.frames.iter().for_each(|frame| frame.write(&mut writer));
    footer.page_ids.iter().for_each(|page_id| {
        writer.bytes(&page_id.0);
    });
    let hash = footer_hash(id, footer_offset, &writer.0);
    let footer_bytes = writer.0.len() as u64;
    writer.u64(footer_offset).u64(footer_bytes).bytes(&hash.0).bytes(END_MAGIC);
    writer.0
}

/// Where the footer lies, from the last [`TRAILER_BYTES`] of a pack of `pack_bytes`.
pub fn footer_range(trailer: &[u8], pack_bytes: u64) -> Result<std::ops::Range<u64>, Malformed> {
    let mut reader = Reader::new(trailer);
    let (offset, length) = (reader.u64()?, reader.u64()?);
    reader.bytes(32)?;
    require(reader.bytes(8)? == END_MAGIC, "a pack does not end with its trailer")?;
    reader.end()?;
    let end = offset.checked_add(length);
    let whole = end.and_then(|end| end.checked_add(TRAILER_BYTES as u64));
    let fits = offset >= HEADER_BYTES as u64 && whole == Some(pack_bytes);
    let short = length <= MAX_FOOTER_BYTES && pack_bytes <= MAX_PACK_BYTES;
    require(fits && short, "a pack's footer has an impossible length")?;
    Ok(offset..pack_bytes - TRAILER_BYTES as u64)
}

/// Reads footer and trailer (the bytes from `footer_offset` to the end of the object).
pub fn read_footer(id: PackId, footer_offset: u64, bytes: &[u8]) -> Result<Footer, Malformed> {
    let split = bytes.len().checked_sub(TRAILER_BYTES).ok_or("a pack's footer is truncated")?;
    let (footer, trailer) = bytes.split_at(split);
    let hash = footer_hash(id, footer_offset, footer);
    require(trailer[16..48] == hash.0, "a pack's footer does not match its hash")?;
    decode_footer(footer_offset, footer)
}

/// Reads the footer itself, whose hash was compared.
pub(crate) fn decode_footer(footer_offset: u64, footer: &[u8]) -> Result<Footer, Malformed> {
    let mut reader = Reader::new(footer);
    let frame_count = reader.u32()?;
    let page_count = reader.u32()?;
    require(frame_count <= MAX_PACK_FRAMES, "a pack has too many frames")?;
    require(page_count <= MAX_PACK_PAGES, "a pack has too many pages")?;
    let expected = frame_count as usize * FRAME_ENTRY_BYTES + page_count as usize * 32;
    require(footer.len() == 8 + expected, "a pack's footer has the wrong length")?;
    let frames: Vec<_> = (0..frame_count)
        .map(|_| FrameEntry::read(&mut reader, footer_offset))
        .collect::<Result<_, _>>()?;
    let pages: u64 = frames.iter().map(|frame| u64::from(frame.pages)).sum();
    require(pages == u64::from(page_count), "a pack's page ids do not match its frames")?;
    let page_ids = (0..page_count).map(|_| reader.array().map(Hash)).collect::<Result<_, _>>()?;
    reader.end()?;
    Ok(Footer { frames, page_ids })
}

/// The footer's hash covers the pack's id and the footer's place, so that neither a renamed nor a
/// shifted footer passes.
fn footer_hash(id: PackId, footer_offset: u64, footer: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&header(id)).update(&footer_offset.to_le_bytes()).update(footer);
    Hash(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trailer_that_points_elsewhere_is_refused() {
        let trailer = |offset: u64, length: u64| {
            let mut writer = Writer::default();
            writer.u64(offset).u64(length).bytes(&[0; 32]).bytes(END_MAGIC);
            writer.0
        };
        assert_eq!(footer_range(&trailer(100, 50), 206), Ok(100..150));
        let footer = MAX_FOOTER_BYTES + 1;
        for (offset, length, pack_bytes) in [
            (u64::MAX - 55, 0, 0),
            (u64::MAX, 1, 56),
            (100, u64::MAX, 206),
            (100, 50, 207),
            (31, 119, 206),
            (100, footer, 100 + footer + 56),
        ] {
            assert!(
                footer_range(&trailer(offset, length), pack_bytes).is_err(),
                "{offset}, {length}"
            );
        }
    }
}
