//! What the pages of a test's memory file hold.

/// Bytes of a page of the memory file.
pub const PAGE_BYTES: usize = 4096;

/// The true content of a page: every fifth is zero, every seventh repeats another's.
pub fn true_page(page: u64) -> Vec<u8> {
    let mut bytes = vec![0u8; PAGE_BYTES];
    if page.is_multiple_of(5) {
        return bytes;
    }
    let seed = if page.is_multiple_of(7) { 1 } else { page };
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in bytes.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        // Half of each word repeats, so that pages compress a little.
        word[..4].copy_from_slice(&state.to_le_bytes()[..4]);
        word[4..].copy_from_slice(&seed.to_le_bytes()[..4]);
    }
    bytes
}

/// The first `pages` pages of it.
pub fn true_memory(pages: u64) -> Vec<u8> {
    (0..pages).flat_map(true_page).collect()
}
