//! Memory files that follow from a few numbers, and share pages with their relatives.

use std::path::Path;

use anyhow::{Result, ensure};
use reap_store::Hash;

use crate::proxy::Draws;

const PAGES: usize = 768;
const PAGE: usize = 4096;
/// Pages of a family that a member changes, one in so many.
const CHANGED: usize = 6;

/// A memory file of 3 MiB: a third zeros, most of the rest as in the other files of its family.
#[derive(Clone, Debug)]
pub(super) struct Content {
    family: u64,
    own: u64,
    hash: Hash,
}

impl Content {
    /// A new member. A family turns over every ten rounds, so that packs die.
    pub(super) fn draw(draws: &mut Draws, family: usize, round: u32) -> Self {
        let family = family as u64 + 16 * u64::from(round / 10);
        let mut content = Self { family, own: draws.bits(), hash: Hash([0; 32]) };
        content.hash = Hash::of(&content.bytes());
        content
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        Ok(std::fs::write(path, self.bytes())?)
    }

    /// An error if the file at `path` is another.
    pub(super) fn require_equal(&self, path: &Path) -> Result<()> {
        let bytes = std::fs::read(path)?;
        ensure!(Hash::of(&bytes) == self.hash, "{} has other bytes", path.display());
        Ok(())
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; PAGES * PAGE];
        for (number, page) in bytes.chunks_exact_mut(PAGE).enumerate() {
            if number % 3 == 0 {
                continue;
            }
            let mut own = Draws::new(self.own, number as u64);
            let is_changed = own.below(CHANGED) == 0;
            let mut family = Draws::new(self.family, number as u64);
            let draws = if is_changed { &mut own } else { &mut family };
            // Half of a page compresses.
            for word in page.chunks_exact_mut(16) {
                word[..8].copy_from_slice(&draws.bits().to_le_bytes());
            }
        }
        bytes
    }
}
