//! FUSE requests in, answers out. What they mean is in [`crate::tree`] and [`crate::read`].

use std::collections::HashMap;
use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    BackingId, BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;
use reap_store::{Error, Name, Node, PlainCopy, SequentialReader, Snapshot, SnapshotId};

use crate::errno;
use crate::opens::{Opens, Way};
use crate::poison::Poison;
use crate::read::{Seek, read, seek};
use crate::tree::{
    Attributes, Entry, IDS, Inodes, NAMES, ROOT, directory_ino, file_ino, file_named,
};

/// Content never changes.
const FOREVER: Duration = Duration::from_secs(u32::MAX as u64);
/// Names move.
const NAME_TTL: Duration = Duration::from_secs(1);
/// Reads ahead that the kernel may have on their way, of all readers: 8 MiB at 128 KiB each.
const MAX_BACKGROUND: u16 = 64;
/// File systems on top of each other: this one, and the one of a plain copy.
const STACK_DEPTH: u32 = 1;

/// A name in a listing.
type Listed = (u64, FileType, String);

/// The file system.
pub(crate) struct Shim {
    pub(crate) node: Node,
    pub(crate) owner: (u32, u32),
    pub(crate) poison: Arc<Poison>,
    /// Whether the kernel hands reads on to plain copies; known once it has said hello.
    pub(crate) passes_through: Arc<AtomicBool>,
    state: Arc<State>,
}

/// A plain copy that the kernel reads, as it knows it.
struct Backing {
    id: BackingId,
    #[expect(dead_code, reason = "its space is in use while the kernel reads it")]
    copy: Arc<PlainCopy>,
}

#[derive(Default)]
struct State {
    inodes: Inodes,
    listings: Mutex<HashMap<u64, Arc<Vec<Listed>>>>,
    /// Of open files of a remote store. One whose handle is not known, as after a restart of ours, is read all the same.
    readers: Mutex<HashMap<u64, Arc<SequentialReader>>>,
    opens: Opens<Backing>,
    next_handle: AtomicU64,
}

impl State {
    fn new_handle(&self) -> u64 {
        self.next_handle.fetch_add(1, Ordering::Relaxed) + 1
    }
}

impl Shim {
    pub(crate) fn new(node: Node, owner: (u32, u32), poison: Arc<Poison>) -> Self {
        Self { node, owner, poison, passes_through: Arc::default(), state: Arc::default() }
    }

    /// Finds a snapshot on the runtime, and answers from there.
    fn find(
        &self,
        ttl: Duration,
        reply: ReplyEntry,
        find: impl Future<Output = Result<Arc<reap_store::Snapshot>, Error>> + Send + 'static,
    ) {
        let (state, owner) = (self.state.clone(), self.owner);
        self.node.spawn(async move {
            match find.await {
                Ok(snapshot) => answer(&state, &Entry::Directory(snapshot), owner, ttl, reply),
                Err(error) => reply.error(report(&error)),
            }
        });
    }

    fn look_up(&self, parent: u64, name: &OsStr, reply: ReplyEntry) {
        let Some(name) = name.to_str() else { return reply.error(Errno::ENOENT) };
        let found = match (self.state.inodes.get(parent), name) {
            (Some(Entry::Root), "snapshots") => Some(Entry::Names),
            (Some(Entry::Root), "by-id") => Some(Entry::Ids),
            (Some(Entry::Directory(snapshot)), _) => file_named(&snapshot, name),
            (Some(Entry::Names), _) => {
                // What can be no name is not there; the store is not asked.
                let Ok(name) = name.parse::<Name>() else { return reply.error(Errno::ENOENT) };
                let node = self.node.clone();
                return self.find(NAME_TTL, reply, async move { node.open_name(&name).await });
            }
            (Some(Entry::Ids), _) => {
                let Ok(id) = name.parse::<SnapshotId>() else { return reply.error(Errno::ENOENT) };
                let node = self.node.clone();
                return self.find(FOREVER, reply, async move { node.open_id(id).await });
            }
            _ => None,
        };
        match found {
            Some(entry) => answer(&self.state, &entry, self.owner, FOREVER, reply),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn list(&self, ino: u64, reply: ReplyOpen) {
        let here = match self.state.inodes.get(ino) {
            Some(Entry::Root) => vec![
                (NAMES, FileType::Directory, "snapshots".to_owned()),
                (IDS, FileType::Directory, "by-id".to_owned()),
            ],
            Some(Entry::Directory(snapshot)) => {
                let files = snapshot.files().iter().enumerate();
                let row = |(number, file): (usize, &reap_store::File)| {
                    (file_ino(snapshot.id(), number), FileType::RegularFile, file.name.clone())
                };
                files.map(row).collect()
            }
            Some(Entry::Names | Entry::Ids) => return self.list_store(ino, reply),
            Some(Entry::File(..)) => return reply.error(Errno::ENOTDIR),
            None => return reply.error(Errno::ENOENT),
        };
        open_listing(&self.state, ino, here, reply);
    }

    fn list_store(&self, ino: u64, reply: ReplyOpen) {
        let (node, state) = (self.node.clone(), self.state.clone());
        self.node.spawn(async move {
            let directory =
                |id: SnapshotId, name: String| (directory_ino(id), FileType::Directory, name);
            let listed = match ino {
                NAMES => node.names().await.map(|names| {
                    names.into_iter().map(|(name, id)| directory(id, name.to_string())).collect()
                }),
                _ => node
                    .ids()
                    .await
                    .map(|ids| ids.into_iter().map(|id| directory(id, id.to_string())).collect()),
            };
            match listed {
                Ok(listed) => open_listing(&state, ino, listed, reply),
                Err(error) => reply.error(report(&error)),
            }
        });
    }

    fn open_file(
        &self,
        snapshot: &Arc<Snapshot>,
        file: usize,
        ino: u64,
        flags: OpenFlags,
        reply: ReplyOpen,
    ) {
        let handle = self.state.new_handle();
        let to_write = flags.0 & libc::O_ACCMODE != libc::O_RDONLY;
        let backing = || {
            let copy = snapshot.plain_copy(file)?;
            match reply.open_backing(&*copy) {
                Ok(id) => Some(Backing { id, copy }),
                Err(error) => {
                    tracing::error!(
                        "inode {ino}: the kernel does not take its plain copy: {error}"
                    );
                    None
                }
            }
        };
        match self.state.opens.open(ino, to_write, backing) {
            Way::Cached => {
                if let Some(reader) = SequentialReader::new(snapshot.clone(), file) {
                    self.state.readers.lock().insert(handle, Arc::new(reader));
                }
                reply.opened(FileHandle(handle), FopenFlags::FOPEN_KEEP_CACHE);
            }
            // To keep what the page cache of the mount has of it would be refused by the kernel, and of no use.
            Way::PassedThrough(backing) => {
                reply.opened_passthrough(FileHandle(handle), FopenFlags::empty(), &backing.id);
            }
            Way::Refused => {
                tracing::warn!(
                    "inode {ino}: not opened for writing, because its plain copy is in use: open it for reading, or prepare the snapshot without one"
                );
                reply.error(Errno::EROFS);
            }
        }
    }

    fn read_file(&self, ino: u64, handle: u64, offset: u64, size: u32, reply: ReplyData) {
        match self.state.inodes.get(ino) {
            Some(Entry::File(snapshot, file)) => {
                let reader = self.state.readers.lock().get(&handle).cloned();
                if let Some(reader) = &reader {
                    reader.reads(offset, size);
                }
                read(&snapshot, file, offset, size, move |bytes| match bytes {
                    Ok(bytes) => reply.data(bytes),
                    Err(error) => {
                        tracing::error!("read of inode {ino} at {offset}: {error}");
                        reply.error(errno::of_read(&error));
                    }
                });
                if let Some(reader) = reader {
                    reader.brings();
                }
            }
            Some(_) => reply.error(Errno::EISDIR),
            None => reply.error(Errno::ESTALE),
        }
    }
}

/// Logs what is worth it, and gives the errno.
fn report(error: &Error) -> Errno {
    let errno = errno::of(error);
    if i32::from(errno) != libc::ENOENT {
        tracing::error!("{error}");
    }
    errno
}

fn answer(state: &State, entry: &Entry, owner: (u32, u32), ttl: Duration, reply: ReplyEntry) {
    if state.inodes.looked_up(entry).is_err() {
        tracing::error!("two files have inode number {}", entry.ino());
        reply.error(Errno::EIO);
        return;
    }
    reply.entry_with_ttls(&FOREVER, &ttl, &attr(&entry.attributes(), owner), Generation(0));
}

fn open_listing(state: &State, ino: u64, entries: Vec<Listed>, reply: ReplyOpen) {
    let mut listing = vec![
        (ino, FileType::Directory, ".".to_owned()),
        (ROOT, FileType::Directory, "..".to_owned()),
    ];
    listing.extend(entries);
    let handle = state.new_handle();
    state.listings.lock().insert(handle, Arc::new(listing));
    reply.opened(FileHandle(handle), FopenFlags::empty());
}

fn attr(attributes: &Attributes, (uid, gid): (u32, u32)) -> FileAttr {
    let (kind, perm, nlink) = match attributes.is_directory {
        true => (FileType::Directory, 0o555, 2),
        false => (FileType::RegularFile, 0o444, 1),
    };
    FileAttr {
        ino: INodeNo(attributes.ino),
        size: attributes.bytes,
        blocks: attributes.blocks,
        atime: attributes.modified,
        mtime: attributes.modified,
        ctime: attributes.modified,
        crtime: attributes.modified,
        kind,
        perm,
        nlink,
        uid,
        gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// A panic is our bug: the request is answered with EIO when its reply is dropped, and the thread
/// lives. If all threads died, the mount would hang.
fn guarded(act: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(act)).is_err() {
        tracing::error!("a request on the mount panicked; this is a bug");
    }
}

impl Filesystem for Shim {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        // What the kernel cannot do is not asked for.
        for flag in [InitFlags::FUSE_ASYNC_READ, InitFlags::FUSE_PARALLEL_DIROPS] {
            config.add_capabilities(flag).unwrap_or_default();
        }
        // Reading ahead is left as the kernel has it: `docs/decisions/0002-mount-readahead.md`.
        let background = config.set_max_background(MAX_BACKGROUND);
        background.unwrap_or_default();
        let passes_through = config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(STACK_DEPTH).is_ok();
        self.passes_through.store(passes_through, Ordering::Relaxed);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        guarded(|| self.look_up(parent.0, name, reply));
    }

    fn forget(&self, _: &Request, ino: INodeNo, lookups: u64) {
        guarded(|| self.state.inodes.forget(ino.0, lookups));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        guarded(|| match self.state.inodes.get(ino.0) {
            Some(entry) => reply.attr(&FOREVER, &attr(&entry.attributes(), self.owner)),
            None => reply.error(Errno::ESTALE),
        });
    }

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Errno::EROFS);
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EROFS);
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn setxattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EROFS);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EROFS);
    }

    fn open(&self, _: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        guarded(|| {
            // Opening for writing passes: QEMU before 8.2 opens its memory file so, even for a private
            // mapping. Every write is refused.
            if flags.0 & libc::O_TRUNC != 0 {
                reply.error(Errno::EROFS);
                return;
            }
            match self.state.inodes.get(ino.0) {
                Some(Entry::File(snapshot, file)) => {
                    self.open_file(&snapshot, file, ino.0, flags, reply);
                }
                Some(_) => reply.error(Errno::EISDIR),
                None => reply.error(Errno::ESTALE),
            }
        });
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        guarded(|| self.read_file(ino.0, handle.0, offset, size, reply));
    }

    fn release(
        &self,
        _: &Request,
        ino: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        guarded(|| {
            let reader = self.state.readers.lock().remove(&handle.0);
            self.state.opens.close(ino.0);
            reply.ok();
            // It may be the last to hold its snapshot: outside the lock.
            drop(reader);
        });
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        guarded(|| {
            reply.error(Errno::EROFS);
            if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
                // Somebody wrote through a shared mapping. The page cache, which all VMs share, must
                // not keep that.
                let end = offset.saturating_add(data.len() as u64);
                self.poison.add(ino.0, offset..end);
            }
        });
    }

    fn opendir(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        guarded(|| self.list(ino.0, reply));
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        guarded(|| {
            let listing = self.state.listings.lock().get(&handle.0).cloned();
            let Some(listing) = listing else { return reply.error(Errno::EBADF) };
            let skip = usize::try_from(offset).unwrap_or(usize::MAX);
            for (number, (ino, kind, name)) in listing.iter().enumerate().skip(skip) {
                if reply.add(INodeNo(*ino), number as u64 + 1, *kind, name) {
                    break;
                }
            }
            reply.ok();
        });
    }

    fn releasedir(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        reply: ReplyEmpty,
    ) {
        guarded(|| {
            self.state.listings.lock().remove(&handle.0);
            reply.ok();
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        // Read-only and as large as its store: nothing is free.
        reply.statfs(0, 0, 0, 0, 0, 4096, 255, 4096);
    }

    fn lseek(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        guarded(|| {
            let what = match whence {
                libc::SEEK_DATA => Seek::Data,
                libc::SEEK_HOLE => Seek::Hole,
                _ => return reply.error(Errno::EINVAL),
            };
            let Some(Entry::File(snapshot, file)) = self.state.inodes.get(ino.0) else {
                return reply.error(Errno::ESTALE);
            };
            let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
            match seek(&snapshot, file, offset, what).and_then(|found| i64::try_from(found).ok()) {
                Some(found) => reply.offset(found),
                None => reply.error(Errno::ENXIO),
            }
        });
    }
}
