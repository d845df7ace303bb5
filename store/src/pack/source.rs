//! A file that is being packed: its holes, its pages, and whether it stays as it is. It is a plain
//! file, a diff over a snapshot's file, or a snapshot's file itself.

use std::cell::RefCell;
use std::fs::File as OpenFile;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

use super::Input;
use super::below::SnapshotFile;
use super::page_hash::page_ids;
use super::parents::{Beside, Known, Parents};
use crate::format::manifest::MAX_FILE_BYTES;
use crate::id::Hash;
use crate::{Error, File, PAGE_SIZE};

/// Pages that are read and hashed as one piece of work: 1 MiB.
const SPAN_PAGES: usize = 256;

/// The same for a snapshot's file: 4 MiB, because its frames may come from a remote store.
const BELOW_PAGES: usize = 1024;
/// Pages of one read: 128 KiB stay in a core's own cache until they are hashed.
const READ_PAGES: usize = 32;

/// Some neighbouring pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Span {
    /// Zero, not read.
    Zeros {
        /// How many.
        pages: u64,
    },
    /// To be read from the file.
    Data {
        /// First page.
        first: u64,
        /// How many, at most [`SPAN_PAGES`].
        pages: u64,
    },
    /// As in the snapshot below.
    Below {
        /// First page.
        first: u64,
        /// How many, at most [`BELOW_PAGES`].
        pages: u64,
    },
}

/// What a page turned out to be.
#[derive(Clone, Copy)]
pub(super) enum Page {
    Zero,
    /// A parent's pack holds it.
    Known(Known),
    /// Its bytes are the next of the block's.
    Bytes(Hash),
}

/// What was found in a span, in the order of the file.
pub(super) struct Block {
    pub(super) page_count: u64,
    /// Empty where all is zero.
    pub(super) pages: Vec<Page>,
    /// Whole pages, one for each [`Page::Bytes`]. The last page of a file is filled up with zeros.
    pub(super) bytes: Vec<u8>,
}

impl Block {
    pub(super) fn bytes(&self) -> u64 {
        self.page_count * PAGE_SIZE as u64
    }

    /// Adds pages with these bytes.
    pub(super) fn push(&mut self, bytes: &[u8], parents: &Parents, before: &mut Option<Beside>) {
        let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
        let data: Vec<&[u8; PAGE_SIZE]> = pages.iter().filter(|page| !is_zero(*page)).collect();
        let mut data = page_ids(&data).into_iter().zip(data).peekable();
        for page in pages {
            let Some((page_id, _)) = data.next_if(|(_, next)| std::ptr::eq(*next, page)) else {
                self.pages.push(Page::Zero);
                continue;
            };
            self.pages.push(match parents.find_page(&page_id, before) {
                Some(known) => Page::Known(known),
                None => {
                    self.bytes.extend_from_slice(page);
                    Page::Bytes(page_id)
                }
            });
        }
    }
}

/// Reads spans; shared with the workers.
pub(super) struct SpanReader {
    file: Option<(OpenFile, PathBuf)>,
    below: Option<SnapshotFile>,
    bytes: u64,
}

/// An opened file and what it was when packing began.
pub(crate) struct SourceFile {
    reader: Arc<SpanReader>,
    file: File,
    before: Option<Identity>,
}

/// What changes when a file is written to, and only then: the time of change would also tell of links, as a
/// jailer makes of a disk that many VMs start from.
#[derive(PartialEq, Eq, Debug, Clone, Copy)]
struct Identity {
    bytes: u64,
    modified: (i64, i64),
}

impl SourceFile {
    pub(super) fn open(input: &Input, below: Option<SnapshotFile>) -> Result<Self, Error> {
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
        if let Some(below) = &below {
            below.check_diff(path, &file, before.bytes)?;
        }
        let reader = SpanReader { file: Some((file, path.clone())), below, bytes: before.bytes };
        let file = File { name: input.name.clone(), kind: input.kind, size: before.bytes };
        Ok(Self { reader: Arc::new(reader), file, before: Some(before) })
    }

    /// A file of a snapshot, as it is.
    pub(crate) fn below(below: SnapshotFile) -> Self {
        let file = below.snapshot.files()[below.file].clone();
        let reader = SpanReader { file: None, bytes: file.size, below: Some(below) };
        Self { reader: Arc::new(reader), file, before: None }
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn bytes(&self) -> u64 {
        self.file.size
    }

    pub(super) fn reader(&self) -> &Arc<SpanReader> {
        &self.reader
    }

    /// The whole file as spans, in order.
    pub(super) fn spans(&self) -> Result<Vec<Span>, Error> {
        let mut spans = Vec::new();
        let page_count = self.file.page_count();
        if self.reader.file.is_none() {
            self.push_hole(&mut spans, 0, page_count);
            return Ok(spans);
        }
        let mut page = 0;
        while page < page_count {
            let data = self.reader.next_data(page)?.min(page_count);
            self.push_hole(&mut spans, page, data);
            let hole =
                if data < page_count { self.reader.next_hole(data)?.min(page_count) } else { data };
            for (first, pages) in pieces(data, hole, SPAN_PAGES) {
                spans.push(Span::Data { first, pages });
            }
            page = hole;
        }
        Ok(spans)
    }

    /// Pages that the file itself has nothing for.
    fn push_hole(&self, spans: &mut Vec<Span>, from: u64, to: u64) {
        if self.reader.below.is_some() {
            let pieces = pieces(from, to, BELOW_PAGES);
            spans.extend(pieces.map(|(first, pages)| Span::Below { first, pages }));
        } else if to > from {
            spans.push(Span::Zeros { pages: to - from });
        }
    }

    /// An error if the file was written to since it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), Error> {
        let Some((file, path)) = &self.reader.file else { return Ok(()) };
        let path = path.display();
        let now = identity(file).map_err(|error| Error::local(&path, error))?;
        if Some(now) == self.before {
            return Ok(());
        }
        let text = "changed while it was packed: pause the VM, let the snapshot be written to its \
                    end, and pack again";
        Err(Error::refused(path, text))
    }
}

/// Pages `from..to` in pieces of at most `longest`.
fn pieces(from: u64, to: u64, longest: usize) -> impl Iterator<Item = (u64, u64)> {
    (from..to).step_by(longest).map(move |first| (first, (longest as u64).min(to - first)))
}

impl SpanReader {
    pub(super) fn read(&self, span: Span, parents: &Parents) -> Result<Block, Error> {
        match span {
            Span::Zeros { pages } => {
                Ok(Block { page_count: pages, pages: Vec::new(), bytes: Vec::new() })
            }
            Span::Data { first, pages } => self.read_file(first, pages, parents),
            Span::Below { first, pages } => match &self.below {
                Some(below) => below.read(first, pages, parents),
                None => Err(Error::local("packing", "nothing lies below; this is a bug")),
            },
        }
    }

    fn read_file(&self, first: u64, page_count: u64, parents: &Parents) -> Result<Block, Error> {
        let Some((file, path)) = &self.file else {
            return Err(Error::local("packing", "a snapshot was read as a file; this is a bug"));
        };
        let mut block =
            Block { page_count, pages: Vec::with_capacity(SPAN_PAGES), bytes: Vec::new() };
        let mut before = None;
        READ_BUFFER.with_borrow_mut(|buffer| {
            buffer.resize(READ_PAGES * PAGE_SIZE, 0);
            let end = first + page_count;
            for first in (first..end).step_by(READ_PAGES) {
                let offset = first * PAGE_SIZE as u64;
                let inside = usize::try_from(self.bytes - offset).unwrap_or(usize::MAX);
                let pages = (end - first).min(READ_PAGES as u64);
                let length = usize::try_from(pages).unwrap_or(usize::MAX) * PAGE_SIZE;
                let buffer = &mut buffer[..length];
                let (wanted, behind) = buffer.split_at_mut(inside.min(length));
                behind.fill(0);
                file.read_exact_at(wanted, offset).map_err(|error| match error.kind() {
                    std::io::ErrorKind::UnexpectedEof => {
                        Error::refused(path.display(), "became shorter while it was packed")
                    }
                    _ => Error::local(path.display(), error),
                })?;
                block.push(buffer, parents, &mut before);
            }
            Ok(block)
        })
    }

    /// The first page at or after `page` that is not wholly in a hole.
    fn next_data(&self, page: u64) -> Result<u64, Error> {
        let Some((file, path)) = &self.file else { return Ok(u64::MAX) };
        match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(page * PAGE_SIZE as u64)) {
            Ok(offset) => Ok(offset / PAGE_SIZE as u64),
            Err(rustix::io::Errno::NXIO) => Ok(u64::MAX),
            // The file system does not know of holes.
            Err(rustix::io::Errno::INVAL) => Ok(page),
            Err(error) => Err(Error::local(path.display(), error)),
        }
    }

    /// The first page after `page` that is wholly in a hole.
    fn next_hole(&self, page: u64) -> Result<u64, Error> {
        let Some((file, path)) = &self.file else { return Ok(u64::MAX) };
        match rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(page * PAGE_SIZE as u64)) {
            Ok(offset) => Ok(offset.div_ceil(PAGE_SIZE as u64).max(page + 1)),
            Err(rustix::io::Errno::INVAL) => Ok(u64::MAX),
            Err(error) => Err(Error::local(path.display(), error)),
        }
    }
}

fn identity(file: &OpenFile) -> std::io::Result<Identity> {
    let metadata = file.metadata()?;
    Ok(Identity { bytes: metadata.len(), modified: (metadata.mtime(), metadata.mtime_nsec()) })
}

thread_local! {
    /// Reading into the same memory again spares the kernel a fault for every page.
    static READ_BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Whether all bytes are zero; 16 bytes at a time, which the compiler turns into vectors.
fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(128).all(|chunk| chunk.iter().fold(0, |any, byte| any | byte) == 0)
}
