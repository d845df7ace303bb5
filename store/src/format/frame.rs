//! A frame: some pages compressed together, and the entry by which it is found and verified.

use std::cell::RefCell;

use bytes::Bytes;

use super::{Malformed, Reader, Writer, require};
use crate::PAGE_SIZE;
use crate::id::Hash;

/// Most pages of one frame: 4 MiB decoded.
pub const MAX_FRAME_PAGES: u16 = 1024;
/// Of LZ4's high compression. Higher ones gain 3 % and take several times as long; decoding is the same.
const LZ4_LEVEL: i32 = 9;
/// Bytes of an encoded [`FrameEntry`].
pub const FRAME_ENTRY_BYTES: usize = 48;

/// How a frame's stored bytes become pages, and which bytes its hash is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// They are the pages, and hashed.
    Raw,
    /// One zstd frame; the hash is of the pages.
    Zstd,
    /// One LZ4 block; the hash is of the stored bytes, of which there are fewer. Only in working sets:
    /// they are decoded at every start, where zstd costs more than the bytes that it saves.
    Lz4,
}

impl Codec {
    /// Whether a pack may have such frames.
    fn is_for_packs(self) -> bool {
        matches!(self, Self::Raw | Self::Zstd)
    }
}

/// Where a frame lies in its object, and what must come out of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameEntry {
    /// Offset of its stored bytes in the object.
    pub offset: u64,
    /// How many stored bytes.
    pub stored_bytes: u32,
    /// How many pages come out.
    pub pages: u16,
    /// How.
    pub codec: Codec,
    /// BLAKE3 of the decoded bytes, or of the stored ones: `codec` says which.
    pub hash: Hash,
}

impl FrameEntry {
    /// Decoded length in bytes.
    pub fn decoded_bytes(&self) -> usize {
        usize::from(self.pages) * PAGE_SIZE
    }

    /// One past the last stored byte in the object.
    pub fn end(&self) -> u64 {
        self.offset + u64::from(self.stored_bytes)
    }

    pub(crate) fn write(&self, writer: &mut Writer) {
        let codec = match self.codec {
            Codec::Raw => 0,
            Codec::Zstd => 1,
            Codec::Lz4 => 2,
        };
        writer.u64(self.offset).u32(self.stored_bytes).u16(self.pages).u8(codec).u8(0);
        writer.bytes(&self.hash.0);
    }

    /// Reads an entry of a pack's frame, which must lie before `object_end`.
    pub(crate) fn read(reader: &mut Reader<'_>, object_end: u64) -> Result<Self, Malformed> {
        let entry = Self::read_any(reader, object_end)?;
        require(entry.codec.is_for_packs(), "a pack's frame has a codec of working sets")?;
        Ok(entry)
    }

    /// Reads an entry whatever its codec.
    pub(crate) fn read_any(reader: &mut Reader<'_>, object_end: u64) -> Result<Self, Malformed> {
        let offset = reader.u64()?;
        let stored_bytes = reader.u32()?;
        let pages = reader.u16()?;
        let codec = match reader.u8()? {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            2 => Codec::Lz4,
            other => return Err(Malformed(format!("unknown codec {other}"))),
        };
        require(reader.u8()? == 0, "a reserved byte is not zero")?;
        let hash = Hash(reader.array()?);
        let entry = Self { offset, stored_bytes, pages, codec, hash };
        require((1..=MAX_FRAME_PAGES).contains(&pages), "a frame has too few or too many pages")?;
        // A writer stores a frame raw when compression does not make it smaller.
        let largest = entry.decoded_bytes();
        let stored = stored_bytes as usize;
        let fits = if codec == Codec::Raw { stored == largest } else { stored < largest };
        require(stored > 0 && fits, "a frame's stored length is impossible")?;
        let inside = offset.checked_add(stored.try_into().map_err(|_| Malformed::from("length"))?);
        require(inside.is_some_and(|end| end <= object_end), "a frame lies outside its object")?;
        Ok(entry)
    }
}

/// Compresses `pages` (whole pages) at zstd `level`, for a pack; the entry's offset is left 0. What it
/// answers with has been decoded again and compared.
pub fn encode(pages: &[u8], level: i32) -> std::io::Result<(FrameEntry, Bytes)> {
    let compressed = COMPRESSOR.with_borrow_mut(|compressor| {
        let compressor = match compressor {
            Some((at, compressor)) if *at == level => compressor,
            stale => &mut stale.insert((level, zstd::bulk::Compressor::new(level)?)).1,
        };
        compressor.compress(pages)
    })?;
    checked(pages, compressed, Codec::Zstd)
}

/// The same for a working set.
pub fn encode_for_working_set(pages: &[u8]) -> std::io::Result<(FrameEntry, Bytes)> {
    let mode = lz4::block::CompressionMode::HIGHCOMPRESSION(LZ4_LEVEL);
    checked(pages, lz4::block::compress(pages, Some(mode), false)?, Codec::Lz4)
}

fn checked(
    pages: &[u8],
    compressed: Vec<u8>,
    codec: Codec,
) -> std::io::Result<(FrameEntry, Bytes)> {
    let (codec, stored) = if compressed.len() < pages.len() {
        (codec, compressed.into())
    } else {
        (Codec::Raw, Bytes::copy_from_slice(pages))
    };
    let entry = FrameEntry {
        offset: 0,
        stored_bytes: u32::try_from(stored.len()).map_err(std::io::Error::other)?,
        pages: u16::try_from(pages.len() / PAGE_SIZE).map_err(std::io::Error::other)?,
        codec,
        hash: Hash::of(if codec == Codec::Lz4 { &stored } else { pages }),
    };
    match decode(&entry, &stored) {
        Ok(again) if again == pages => Ok((entry, stored)),
        _ => Err(std::io::Error::other("a frame did not decode to what was compressed")),
    }
}

/// Decodes and verifies: the only way from stored bytes to pages.
pub fn decode(entry: &FrameEntry, stored: &[u8]) -> Result<Vec<u8>, Malformed> {
    decode_into(entry, stored, |bytes| vec![0; bytes])
}

/// The same, into a buffer of so many bytes that `buffer` gives, whatever its content, where the codec
/// can use one.
pub(crate) fn decode_into(
    entry: &FrameEntry,
    stored: &[u8],
    buffer: impl FnOnce(usize) -> Vec<u8>,
) -> Result<Vec<u8>, Malformed> {
    require(stored.len() == entry.stored_bytes as usize, "a frame is truncated")?;
    let matches = |bytes: &[u8]| {
        require(Hash::of(bytes) == entry.hash, "a frame's bytes do not match their hash")
    };
    let damaged =
        |error: std::io::Error| Malformed(format!("a frame does not decompress ({error})"));
    let length = entry.decoded_bytes();
    let right = |decoded: usize| require(decoded == length, "a frame has the wrong decoded length");
    match entry.codec {
        Codec::Raw => {
            matches(stored)?;
            right(stored.len())?;
            Ok(stored.to_vec())
        }
        Codec::Zstd => {
            let mut decoded = Vec::with_capacity(length);
            DECOMPRESSOR
                .with_borrow_mut(|zstd| zstd.decompress_to_buffer(stored, &mut decoded))
                .map_err(damaged)?;
            right(decoded.len())?;
            matches(&decoded)?;
            Ok(decoded)
        }
        Codec::Lz4 => {
            matches(stored)?;
            let mut decoded = buffer(length);
            let most = i32::try_from(length).ok();
            right(lz4::block::decompress_to_buffer(stored, most, &mut decoded).map_err(damaged)?)?;
            Ok(decoded)
        }
    }
}

thread_local! {
    // A context is 100s of KiB and costs more to make than a small frame to decode: one a thread.
    static DECOMPRESSOR: RefCell<zstd::bulk::Decompressor<'static>> =
        RefCell::new(zstd::bulk::Decompressor::new().expect("allocating a zstd context"));
    static COMPRESSOR: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> =
        const { RefCell::new(None) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_is_noticed_whichever_bytes_are_hashed() {
        let pages: Vec<u8> = (0..4 * PAGE_SIZE).map(|at| (at / 50 % 251) as u8).collect();
        for encoded in [encode(&pages, 3), encode_for_working_set(&pages)] {
            let (entry, stored) = encoded.expect("encodes");
            assert_eq!(decode(&entry, &stored), Ok(pages.clone()));
            for at in 0..stored.len() {
                let mut bad = stored.to_vec();
                bad[at] ^= 1 << (at % 8);
                // Some bits of a zstd frame mean nothing; where the pages are hashed they may pass.
                let harmless =
                    entry.codec == Codec::Zstd && decode(&entry, &bad) == Ok(pages.clone());
                assert!(harmless || decode(&entry, &bad).is_err(), "{entry:?}: byte {at}");
            }
        }
    }

    #[test]
    fn a_pack_has_no_frames_of_working_sets() {
        let (entry, _) = encode_for_working_set(&[7; PAGE_SIZE]).expect("encodes");
        let mut writer = Writer::default();
        entry.write(&mut writer);
        assert!(FrameEntry::read(&mut Reader::new(&writer.0), 1 << 20).is_err());
        assert_eq!(FrameEntry::read_any(&mut Reader::new(&writer.0), 1 << 20), Ok(entry));
    }
}
