//! Parsers that nobody outside this crate calls, for the fuzz targets in `fuzz/`. No part of the
//! interface: it changes with them.

use crate::SnapshotId;
use crate::collect;
use crate::format::frame::FrameEntry;
use crate::format::keys::PackId;
use crate::format::manifest::{self, Manifest};
use crate::format::pack::{self, Footer};
use crate::format::{Malformed, Reader, Writer};
use crate::id::Hash;
use crate::pack::index_fuzzing as index;

/// A manifest, from what is compressed in its object.
pub fn decode_manifest_body(body: &[u8]) -> Result<Manifest, Malformed> {
    manifest::decode_body(body)
}

/// What is compressed in a manifest's object.
pub fn encode_manifest_body(manifest: &Manifest) -> std::io::Result<Vec<u8>> {
    manifest::encode_body(manifest)
}

/// A pack's footer, without its hash.
pub fn decode_footer(footer_offset: u64, footer: &[u8]) -> Result<Footer, Malformed> {
    pack::decode_footer(footer_offset, footer)
}

/// The frame entry in front of `bytes`, and its bytes as they would be written.
pub fn frame_entry(bytes: &[u8], object_end: u64) -> Result<(FrameEntry, Vec<u8>), Malformed> {
    let entry = FrameEntry::read(&mut Reader::new(bytes), object_end)?;
    let mut writer = Writer::default();
    entry.write(&mut writer);
    Ok((entry, writer.0))
}

/// A whole run of the collector over listings with these keys and lengths; how many it would delete.
pub fn listings(keys: &[(String, u64)]) -> Result<usize, String> {
    collect::fuzz_listings(keys)
}

/// Looks `page_id` up in a node's page table, and counts what it finds.
pub fn page_table(snapshot: SnapshotId, bytes: &[u8], page_id: &Hash) -> Result<usize, Malformed> {
    index::page_table(snapshot, bytes, page_id)
}

/// Looks at every page of a footer on a node: pages, and those that have a place.
pub fn pack_pages(pack: PackId, pack_bytes: u64, bytes: &[u8]) -> Result<(u32, usize), Malformed> {
    index::pack_pages(pack, pack_bytes, bytes)
}

/// What a node remembers of snapshots; how many.
pub fn kinships(bytes: &[u8]) -> Result<usize, Malformed> {
    index::kinships(bytes)
}
