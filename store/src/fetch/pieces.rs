//! Reading local files as the kernel reads ahead best.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that are asked for at once. The kernel reads ahead of whoever reads in order, and begins with a few times what was asked
/// for: who asks for much waits for its last byte before the disk has more to do, who asks for little copies one piece while
/// the disk brings the next. `docs/decisions/0005-working-set-frames.md` has what it makes.
const PIECE_BYTES: usize = 32 << 10;

/// Fills `bytes` from `offset` on, as [`FileExt::read_exact_at`] does.
pub(super) fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    let mut at = offset;
    for piece in bytes.chunks_mut(PIECE_BYTES) {
        file.read_exact_at(piece, at)?;
        at += piece.len() as u64;
    }
    Ok(())
}
