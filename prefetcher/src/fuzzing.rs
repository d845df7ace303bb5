//! The handshake's parser for its fuzz target in `fuzz/`. No part of the interface.

use crate::HandshakeError;
use crate::handshake::Message;

/// Takes a message in pieces of `piece` bytes (0: in one); the guest's page size once it is complete.
pub fn handshake(
    message: &[u8],
    memory_bytes: u64,
    piece: usize,
) -> Result<Option<u64>, HandshakeError> {
    let mut taken = Message::new(memory_bytes);
    match piece {
        0 => taken.push(message)?,
        _ => message.chunks(piece).try_for_each(|chunk| taken.push(chunk))?,
    }
    Ok(taken.layout().map(|layout| layout.page_bytes()))
}
