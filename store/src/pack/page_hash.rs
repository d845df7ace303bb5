//! BLAKE3 of many pages at once.
//!
//! A page alone has 4 chunks, half of what AVX2 and a quarter of what AVX-512 hash side by side: `blake3::hash`
//! of a page leaves the other lanes empty. Here several pages fill them. The crate offers this only in its
//! undocumented `platform` module; `docs/decisions/0007-page-hash.md` says what it is worth and what guards it.

use blake3::IncrementCounter::No;
use blake3::platform::Platform;

use crate::PAGE_SIZE;
use crate::id::Hash;

/// Pages that are hashed together at most: 16 chunks side by side fill AVX-512.
const BATCH: usize = 16;
const CHUNK: usize = blake3::CHUNK_LEN;
const CHUNKS: usize = PAGE_SIZE / CHUNK;
const HASH: usize = blake3::OUT_LEN;
/// Two hashes are one block.
const BLOCK: usize = 2 * HASH;

/// Of the BLAKE3 paper, section 2: the key of unkeyed hashing, and the flags of a node of the tree.
const IV: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;

/// The page ids of some pages, in order.
pub(super) fn page_ids(pages: &[&[u8; PAGE_SIZE]]) -> Vec<Hash> {
    let platform = Platform::detect();
    let mut ids = Vec::with_capacity(pages.len());
    for batch in pages.chunks(BATCH) {
        match batch {
            [page] => ids.push(Hash::of(*page)),
            _ => hash_batch(platform, batch, &mut ids),
        }
    }
    ids
}

fn hash_batch(platform: Platform, pages: &[&[u8; PAGE_SIZE]], ids: &mut Vec<Hash>) {
    // A page's chunks, one after the other; then its two halves; then the whole.
    let mut chunks = [[[0; HASH]; CHUNKS]; BATCH];
    for number in 0..CHUNKS {
        let mut inputs = [&[0; CHUNK]; BATCH];
        for (input, page) in inputs.iter_mut().zip(pages) {
            *input = &page.as_chunks().0[number];
        }
        let mut hashes = [[0; HASH]; BATCH];
        platform.hash_many(
            &inputs[..pages.len()],
            &IV,
            number as u64,
            No,
            0,
            CHUNK_START,
            CHUNK_END,
            hashes[..pages.len()].as_flattened_mut(),
        );
        for (page, hash) in chunks.iter_mut().zip(hashes) {
            page[number] = hash;
        }
    }
    let mut halves = [[[0; HASH]; 2]; BATCH];
    let blocks: Vec<&[u8; BLOCK]> =
        chunks[..pages.len()].as_flattened().as_flattened().as_chunks().0.iter().collect();
    let out = halves[..pages.len()].as_flattened_mut().as_flattened_mut();
    platform.hash_many(&blocks, &IV, 0, No, PARENT, 0, 0, out);
    let blocks: Vec<&[u8; BLOCK]> =
        halves[..pages.len()].as_flattened().as_flattened().as_chunks().0.iter().collect();
    let mut roots = [[0; HASH]; BATCH];
    let out = roots[..pages.len()].as_flattened_mut();
    platform.hash_many(&blocks, &IV, 0, No, PARENT | ROOT, 0, 0, out);
    ids.extend(roots[..pages.len()].iter().map(|root| Hash(*root)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_pages_have_the_hashes_of_each_alone() {
        let mut random = 1u64;
        let mut byte = || {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (random >> 56) as u8
        };
        let pages: Vec<[u8; PAGE_SIZE]> =
            (0..40).map(|_| [(); PAGE_SIZE].map(|()| byte())).collect();
        let pages: Vec<_> = pages.iter().collect();
        for count in 0..=pages.len() {
            let alone: Vec<_> = pages[..count].iter().map(|page| Hash::of(*page)).collect();
            assert!(page_ids(&pages[..count]) == alone, "{count} pages");
        }
    }
}
