//! A file of the index, mapped for reading.
#![expect(unsafe_code, reason = "mapping a file is a promise that it stays as it is")]

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

/// A mapped file.
pub(super) struct Mapped(memmap2::Mmap);

impl Mapped {
    pub(super) fn open(path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        // SAFETY: the index writes a file under a temporary name, renames it into place and never
        // changes or shortens it again; it only unlinks it, which leaves a mapping as it is.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Self(map))
    }

    /// Bytes that are in no file.
    #[cfg(feature = "fuzzing")]
    pub(super) fn of(bytes: &[u8]) -> std::io::Result<Self> {
        let mut map = memmap2::MmapMut::map_anon(bytes.len())?;
        map.copy_from_slice(bytes);
        Ok(Self(map.make_read_only()?))
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
