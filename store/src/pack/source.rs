//! A file that is being packed: its holes, its pages, and whether it stays as it is.

use std::fs::File as OpenFile;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

use super::Input;
use crate::format::manifest::MAX_FILE_BYTES;
use crate::id::Hash;
use crate::{Error, File, PAGE_SIZE};

/// Pages that are read and hashed as one piece of work: 1 MiB.
const SPAN_PAGES: usize = 256;

/// Some neighbouring pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Span {
    /// In a hole: zero, not read.
    Hole {
        /// How many.
        pages: u64,
    },
    /// To be read.
    Data {
        /// First page.
        first: u64,
        /// How many, at most [`SPAN_PAGES`].
        pages: u64,
    },
}

/// What was found in a span, in the order of the file.
pub(super) struct Block {
    pub(super) pages: u64,
    /// Whole pages; empty for a hole. The last page of a file is filled up with zeros.
    pub(super) bytes: Vec<u8>,
    /// For each page its id, or `None` for zeros; empty for a hole.
    pub(super) page_ids: Vec<Option<Hash>>,
}

impl Block {
    pub(super) fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE as u64
    }
}

/// Reads spans; shared with the workers.
pub(super) struct SpanReader {
    file: OpenFile,
    path: PathBuf,
    bytes: u64,
}

/// An opened file and what it was when packing began.
pub(super) struct SourceFile {
    reader: Arc<SpanReader>,
    file: File,
    before: Identity,
}

/// Whatever changes when a file is written to.
#[derive(PartialEq, Eq, Debug, Clone, Copy)]
struct Identity {
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl SourceFile {
    pub(super) fn open(input: &Input) -> Result<Self, Error> {
        let path = &input.path;
        let local = |error: std::io::Error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                Error::not_found(path.display(), "there is no such file")
            }
            _ => Error::local(path.display(), error),
        };
        // A FIFO would block here for ever.
        let metadata = std::fs::metadata(path).map_err(local)?;
        if !metadata.is_file() {
            return Err(Error::invalid(path.display(), "is not a regular file"));
        }
        let file = OpenFile::open(path).map_err(local)?;
        // Pages that somebody has mapped and written become clean, so that the next write through
        // the mapping has to touch the modification time. A read-only file system has none.
        rustix::fs::fdatasync(&file).unwrap_or_default();
        let before = identity(&file).map_err(local)?;
        if before.bytes == 0 {
            return Err(Error::invalid(path.display(), "is empty: there is nothing to pack"));
        }
        if before.bytes > MAX_FILE_BYTES {
            return Err(Error::invalid(path.display(), "is longer than 16 TiB"));
        }
        let reader = SpanReader { file, path: path.clone(), bytes: before.bytes };
        let file = File { name: input.name.clone(), kind: input.kind, size: before.bytes };
        Ok(Self { reader: Arc::new(reader), file, before })
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn bytes(&self) -> u64 {
        self.before.bytes
    }

    pub(super) fn reader(&self) -> &Arc<SpanReader> {
        &self.reader
    }

    /// The whole file as spans, in order.
    pub(super) fn spans(&self) -> Result<Vec<Span>, Error> {
        let mut spans = Vec::new();
        let page_count = self.file.page_count();
        let mut page = 0;
        while page < page_count {
            let data = self.reader.next_data(page)?.min(page_count);
            if data > page {
                spans.push(Span::Hole { pages: data - page });
            }
            let hole =
                if data < page_count { self.reader.next_hole(data)?.min(page_count) } else { data };
            for first in (data..hole).step_by(SPAN_PAGES) {
                spans.push(Span::Data { first, pages: (SPAN_PAGES as u64).min(hole - first) });
            }
            page = hole;
        }
        Ok(spans)
    }

    /// An error if the file was written to since it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), Error> {
        let path = self.reader.path.display();
        let now = identity(&self.reader.file).map_err(|error| Error::local(&path, error))?;
        if now == self.before {
            return Ok(());
        }
        let text = "changed while it was packed: pause the VM, let the snapshot be written to its \
                    end, and pack again";
        Err(Error::refused(path, text))
    }
}

impl SpanReader {
    pub(super) fn read(&self, span: Span) -> Result<Block, Error> {
        let (first, pages) = match span {
            Span::Hole { pages } => {
                return Ok(Block { pages, bytes: Vec::new(), page_ids: Vec::new() });
            }
            Span::Data { first, pages } => (first, pages),
        };
        let offset = first * PAGE_SIZE as u64;
        let length = usize::try_from(pages).unwrap_or(usize::MAX).saturating_mul(PAGE_SIZE);
        let wanted = usize::try_from(self.bytes - offset).unwrap_or(usize::MAX).min(length);
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes[..wanted], offset).map_err(|error| {
            let shrunk = error.kind() == std::io::ErrorKind::UnexpectedEof;
            let path = self.path.display();
            if shrunk {
                Error::refused(path, "became shorter while it was packed")
            } else {
                Error::local(path, error)
            }
        })?;
        let page_ids = bytes
            .chunks_exact(PAGE_SIZE)
            .map(|page| (!is_zero(page)).then(|| Hash::of(page)))
            .collect();
        Ok(Block { pages, bytes, page_ids })
    }

    /// The first page at or after `page` that is not wholly in a hole.
    fn next_data(&self, page: u64) -> Result<u64, Error> {
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(page * PAGE_SIZE as u64)) {
            Ok(offset) => Ok(offset / PAGE_SIZE as u64),
            Err(rustix::io::Errno::NXIO) => Ok(u64::MAX),
            // The file system does not know of holes.
            Err(rustix::io::Errno::INVAL) => Ok(page),
            Err(error) => Err(Error::local(self.path.display(), error)),
        }
    }

    /// The first page after `page` that is wholly in a hole.
    fn next_hole(&self, page: u64) -> Result<u64, Error> {
        match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Hole(page * PAGE_SIZE as u64)) {
            Ok(offset) => Ok(offset.div_ceil(PAGE_SIZE as u64).max(page + 1)),
            Err(rustix::io::Errno::INVAL) => Ok(u64::MAX),
            Err(error) => Err(Error::local(self.path.display(), error)),
        }
    }
}

fn identity(file: &OpenFile) -> std::io::Result<Identity> {
    let metadata = file.metadata()?;
    Ok(Identity {
        bytes: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

/// Whether all bytes are zero; 16 bytes at a time, which the compiler turns into vectors.
fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(128).all(|chunk| chunk.iter().fold(0, |any, byte| any | byte) == 0)
}
