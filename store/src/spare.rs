//! Memory that the kernel has given already, for the frames of working sets.
//!
//! The first touch of fresh memory costs more than decoding into it or copying out of it (2.2 us a page
//! against 1.2 and 1.6 where it was measured). A start has no time for that; an idle decode thread has.

use parking_lot::Mutex;

/// Bytes of a buffer: the longest frame that a packer makes for a working set.
const BUFFER_BYTES: usize = 256 << 10;
/// Buffers that are kept: 8 MiB.
const BUFFERS: usize = 32;

/// Some buffers, all touched. By default none are kept.
#[derive(Default)]
pub(crate) struct Spares {
    most: usize,
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Spares {
    /// With buffers, once they are added.
    pub(crate) fn kept() -> Self {
        Self { most: BUFFERS, buffers: Mutex::default() }
    }

    /// Whether buffers are kept at all.
    pub(crate) fn are_kept(&self) -> bool {
        self.most > 0
    }

    /// A buffer of so many bytes, with any content; fresh memory if there is no spare one, or it would be
    /// wasted on so few bytes.
    pub(crate) fn take(&self, bytes: usize) -> Vec<u8> {
        let fits = (BUFFER_BYTES / 4..=BUFFER_BYTES).contains(&bytes);
        match self.buffers.lock().pop_if(|_| fits) {
            Some(mut buffer) => {
                buffer.resize(bytes, 0);
                buffer
            }
            None => vec![0; bytes],
        }
    }

    /// Gives back what was taken.
    pub(crate) fn give_back(&self, buffer: Vec<u8>) {
        let mut buffers = self.buffers.lock();
        if buffer.capacity() == BUFFER_BYTES && buffers.len() < self.most {
            buffers.push(buffer);
        }
    }

    /// Adds one buffer; `false` when there are enough.
    pub(crate) fn add_one(&self) -> bool {
        if self.buffers.lock().len() >= self.most {
            return false;
        }
        // Not zeros: those the allocator would leave to the kernel, untouched.
        self.give_back(vec![1; BUFFER_BYTES]);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_bounded_and_have_the_length_that_was_asked_for() {
        assert!(!Spares::default().add_one());
        let spares = Spares::kept();
        let mut added = 0;
        while spares.add_one() {
            added += 1;
        }
        assert_eq!(added, BUFFERS);
        for bytes in [0, 1, 4096, BUFFER_BYTES / 2, BUFFER_BYTES, BUFFER_BYTES + 1] {
            assert_eq!(spares.take(bytes).len(), bytes);
        }
        spares.give_back(vec![1; 10]);
        assert_eq!(spares.buffers.lock().len(), BUFFERS - 2, "what is too short is not kept");
        let mut taken = spares.take(BUFFER_BYTES - 4096);
        taken.truncate(5);
        spares.give_back(taken);
        assert_eq!(spares.take(BUFFER_BYTES).len(), BUFFER_BYTES);
    }
}
