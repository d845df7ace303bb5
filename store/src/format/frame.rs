//! A frame: some pages compressed together, and the entry by which it is found and verified.

use std::cell::RefCell;

use bytes::Bytes;

use super::{Malformed, Reader, Writer, require};
use crate::PAGE_SIZE;
use crate::id::Hash;

/// Most pages of one frame: 4 MiB decoded.
pub const MAX_FRAME_PAGES: u16 = 1024;
/// Bytes of an encoded [`FrameEntry`].
pub const FRAME_ENTRY_BYTES: usize = 48;

/// How a frame's stored bytes become pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// They are the pages.
    Raw,
    /// One zstd frame.
    Zstd,
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
    /// BLAKE3 of the decoded bytes.
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
        };
        writer.u64(self.offset).u32(self.stored_bytes).u16(self.pages).u8(codec).u8(0);
        writer.bytes(&self.hash.0);
    }

    /// Reads an entry whose frame must lie before `object_end`.
    pub(crate) fn read(reader: &mut Reader<'_>, object_end: u64) -> Result<Self, Malformed> {
        let offset = reader.u64()?;
        let stored_bytes = reader.u32()?;
        let pages = reader.u16()?;
        let codec = match reader.u8()? {
            0 => Codec::Raw,
            1 => Codec::Zstd,
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

/// Compresses `pages` (whole pages) at zstd `level`; the entry's offset is left 0. What it
/// answers with has been decoded again and compared.
pub fn encode(pages: &[u8], level: i32) -> std::io::Result<(FrameEntry, Bytes)> {
    let hash = Hash::of(pages);
    let compressed = COMPRESSOR.with_borrow_mut(|compressor| {
        let compressor = match compressor {
            Some((at, compressor)) if *at == level => compressor,
            stale => &mut stale.insert((level, zstd::bulk::Compressor::new(level)?)).1,
        };
        compressor.compress(pages)
    })?;
    let smaller = compressed.len() < pages.len();
    let (codec, stored) = if smaller {
        (Codec::Zstd, compressed.into())
    } else {
        (Codec::Raw, Bytes::copy_from_slice(pages))
    };
    let entry = FrameEntry {
        offset: 0,
        stored_bytes: u32::try_from(stored.len()).map_err(std::io::Error::other)?,
        pages: u16::try_from(pages.len() / PAGE_SIZE).map_err(std::io::Error::other)?,
        codec,
        hash,
    };
    match decode(&entry, &stored) {
        Ok(again) if again == pages => Ok((entry, stored)),
        _ => Err(std::io::Error::other("a frame did not decode to what was compressed")),
    }
}

/// Decodes and verifies: the only way from stored bytes to pages.
pub fn decode(entry: &FrameEntry, stored: &[u8]) -> Result<Vec<u8>, Malformed> {
    require(stored.len() == entry.stored_bytes as usize, "a frame is truncated")?;
    let decoded = match entry.codec {
        Codec::Raw => stored.to_vec(),
        Codec::Zstd => {
            let mut decoded = Vec::with_capacity(entry.decoded_bytes());
            DECOMPRESSOR
                .with_borrow_mut(|decompressor| {
                    decompressor.decompress_to_buffer(stored, &mut decoded)
                })
                .map_err(|error| Malformed(format!("a frame does not decompress ({error})")))?;
            decoded
        }
    };
    require(decoded.len() == entry.decoded_bytes(), "a frame has the wrong decoded length")?;
    require(Hash::of(&decoded) == entry.hash, "a frame's bytes do not match their hash")?;
    Ok(decoded)
}

thread_local! {
    // A context is 100s of KiB and costs more to make than a small frame to decode: one a thread.
    static DECOMPRESSOR: RefCell<zstd::bulk::Decompressor<'static>> =
        RefCell::new(zstd::bulk::Decompressor::new().expect("allocating a zstd context"));
    static COMPRESSOR: RefCell<Option<(i32, zstd::bulk::Compressor<'static>)>> =
        const { RefCell::new(None) };
}
