//! Plain copies of files: their bytes as they are, on this node's disk, for those who read a whole file at every start. The mount
//! hands reads of such a file on to its copy, in the kernel (`docs/decisions/0010-passthrough.md`).
//!
//! A copy has no name: it is gone with whoever holds it last, also when that is killed, so that nothing is ever found again that
//! nobody has verified. Its bytes are verified as they are written; what the disk gives back is not.

use std::collections::BTreeMap;
use std::fs::File as OpenFile;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::fs::{Mode, OFlags, StatFs};

use crate::export::{Output, write_data};
use crate::fetch::disk::{Limits, free};
use crate::{Error, PAGE_SIZE, Snapshot};

/// What a file system calls itself on which the kernel takes no copies: it would be one more layer on a layer.
const STACKED: [(u64, &str); 2] = [(0x794c_7630, "overlayfs"), (0x6573_5546, "FUSE")];

/// Bytes that are read at once when a copy is read back: the kernel reads ahead of that.
const READ_BACK_BYTES: usize = 64 << 10;

/// A copy of one file of a snapshot.
pub struct PlainCopy {
    file: OpenFile,
    bytes: u64,
    usage: Arc<Usage>,
}

impl PlainCopy {
    /// Bytes of data: what is zero is a hole.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl AsFd for PlainCopy {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for PlainCopy {
    fn drop(&mut self) {
        self.usage.files.fetch_sub(1, Ordering::Relaxed);
        self.usage.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[derive(Default)]
struct Usage {
    files: AtomicU64,
    bytes: AtomicU64,
}

/// The copies of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct PlainCopiesStatus {
    /// Copies that are held, or still open on the mount.
    pub files: u64,
    /// Bytes of their data.
    pub used_bytes: u64,
    /// Most of these.
    pub limit_bytes: u64,
}

/// Makes copies, one at a time, within bounds.
pub(crate) struct PlainCopies {
    directory: PathBuf,
    limits: Limits,
    usage: Arc<Usage>,
    making: tokio::sync::Mutex<()>,
}

/// The copies of one snapshot's files, while somebody holds them.
#[derive(Default)]
pub(crate) struct CopiesOf(Mutex<BTreeMap<usize, Weak<PlainCopy>>>);

impl CopiesOf {
    fn get(&self, file: usize) -> Option<Arc<PlainCopy>> {
        self.0.lock().get(&file).and_then(Weak::upgrade)
    }

    fn put(&self, file: usize, copy: &Arc<PlainCopy>) {
        self.0.lock().insert(file, Arc::downgrade(copy));
    }
}

impl Snapshot {
    /// The plain copy of file number `file`, if this node holds one.
    pub fn plain_copy(&self, file: usize) -> Option<Arc<PlainCopy>> {
        self.copies().get(file)
    }
}

impl PlainCopies {
    pub(crate) fn new(directory: &Path, limits: Limits) -> Self {
        let (usage, making) = (Arc::default(), tokio::sync::Mutex::default());
        Self { directory: directory.to_owned(), limits, usage, making }
    }

    pub(crate) fn status(&self) -> PlainCopiesStatus {
        PlainCopiesStatus {
            files: self.usage.files.load(Ordering::Relaxed),
            used_bytes: self.usage.bytes.load(Ordering::Relaxed),
            limit_bytes: self.limits.bytes,
        }
    }

    /// See [`crate::Node::plain_copy`].
    pub(crate) async fn make(
        &self,
        snapshot: &Arc<Snapshot>,
        file: usize,
    ) -> Result<Arc<PlainCopy>, Error> {
        let _one = self.making.lock().await;
        if let Some(copy) = snapshot.plain_copy(file) {
            return Ok(copy);
        }
        let name = format!("plain copy of {}/{}", snapshot.id(), snapshot.files()[file].name);
        let bytes = snapshot.data_pages(file) * PAGE_SIZE as u64;
        self.check_room(&name, bytes)?;
        let open = self.unnamed()?;
        let copy = self.count(open.try_clone().map_err(|error| self.local(error))?, bytes);
        let output = Output { file, open, path: self.directory.clone() };
        // Others write to this disk, too.
        let mut left = bytes;
        write_data(snapshot, vec![output], &mut |written| {
            left = left.saturating_sub(written);
            self.check_free(&name, left)
        })
        .await?;
        let read_back = tokio::task::spawn_blocking(move || read_back(&copy.file).map(|()| copy));
        let copy = read_back.await.map_err(std::io::Error::other).flatten();
        let copy = Arc::new(copy.map_err(|error| self.local(error))?);
        snapshot.copies().put(file, &copy);
        Ok(copy)
    }

    fn count(&self, file: OpenFile, bytes: u64) -> PlainCopy {
        self.usage.files.fetch_add(1, Ordering::Relaxed);
        self.usage.bytes.fetch_add(bytes, Ordering::Relaxed);
        PlainCopy { file, bytes, usage: self.usage.clone() }
    }

    fn check_room(&self, name: &str, bytes: u64) -> Result<(), Error> {
        let (used, limit) = (self.usage.bytes.load(Ordering::Relaxed), self.limits.bytes);
        if used.saturating_add(bytes) > limit {
            let text = format!(
                "{bytes} bytes beside {used} of others are more than {limit} (--plain-copies): release another snapshot or allow more"
            );
            return Err(Error::refused(name, text));
        }
        self.check_free(name, bytes)
    }

    /// Whether so many more bytes leave the floor.
    fn check_free(&self, name: &str, bytes: u64) -> Result<(), Error> {
        let (free, floor) = (free(&self.directory), self.limits.free_floor);
        if free < floor.saturating_add(bytes) {
            let text = format!(
                "{} has {free} bytes free and must keep {floor} (--cache-free-floor): there is no room for {bytes} more",
                self.directory.display()
            );
            return Err(Error::refused(name, text));
        }
        Ok(())
    }

    /// A file without a name.
    fn unnamed(&self) -> Result<OpenFile, Error> {
        let StatFs { f_type, .. } =
            rustix::fs::statfs(&self.directory).map_err(|error| self.local(error))?;
        let stacked = STACKED.iter().find(|(magic, _)| u64::try_from(f_type) == Ok(*magic));
        if let Some((_, what)) = stacked {
            let text = format!(
                "lies on {what}, to which the kernel hands on no reads: choose a --cache directory on a disk's own file system"
            );
            return Err(Error::refused(self.directory.display(), text));
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let open = rustix::fs::open(&self.directory, flags, Mode::RUSR | Mode::WUSR);
        Ok(open.map_err(|error| self.local(error))?.into())
    }

    fn local(&self, error: impl std::fmt::Display) -> Error {
        Error::local(
            self.directory.display(),
            format!("no plain copy can be written here: {error}"),
        )
    }
}

/// Frames were written in the order of their packs, a few pages at a time, and the page cache has them in pieces as small: it is
/// filled once more, as whoever reads from front to back fills it, with large ones, which are read a quarter faster.
fn read_back(file: &OpenFile) -> std::io::Result<()> {
    file.sync_data()?;
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?;
    let (mut buffer, mut offset) = (vec![0; READ_BACK_BYTES], 0);
    loop {
        match file.read_at(&mut buffer, offset)? {
            0 => return Ok(()),
            read => offset += read as u64,
        }
    }
}
