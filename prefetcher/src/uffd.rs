//! The one wrapper of the kernel's userfaultfd interface, with outcomes by name.
//!
//! Quirks that stay in this file:
//!
//! - The `userfaultfd` crate reports every EAGAIN of COPY as `PartiallyCopied(n)`, where `n` is
//!   bytes of progress or, as a huge number, a negative errno.
//! - It drops the progress of a partial ZEROPAGE altogether, so that ioctl is issued here.
//! - Its `into_raw_fd` closes the descriptor; it is never called.
#![expect(unsafe_code, reason = "wraps the userfaultfd ioctls on another process's memory")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use userfaultfd::{Error, Event, EventBuffer, FaultKind, Uffd};

/// What became of an attempt to fill missing pages.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// This many bytes, at least a page, are in and their waiters woken. Less than asked for means
    /// that the next page has a different outcome: ask again from there.
    Installed(u64),
    /// The first page is present already. Its waiters are *not* woken.
    AlreadyThere,
    /// Nothing was done, because the VMM is in the middle of changing its mappings (there may be an
    /// unread remove event). Ask again later.
    Again,
    /// The VMM's memory is gone.
    Gone,
    /// There is no memory for the page: the huge page pool is empty.
    NoMemory,
    /// The range is not (or no longer) mapped and registered.
    Unmapped,
    /// Anything else.
    Refused(io::Error),
}

/// An event that somebody in the VMM waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryEvent {
    /// A thread touched the missing page at this address.
    Fault(u64),
    /// The VMM gave the addresses `start..end` back.
    Removed {
        /// First address.
        start: u64,
        /// First address after it.
        end: u64,
    },
}

/// Where events are read to.
pub(crate) struct Events {
    buffer: EventBuffer,
}

/// Messages taken by one read. A VM has about as many faults at once as vCPUs.
const EVENTS_PER_READ: usize = 64;

impl Events {
    /// An empty buffer.
    pub(crate) fn new() -> Self {
        Self { buffer: EventBuffer::new(EVENTS_PER_READ) }
    }
}

/// The memory of a VMM, through the userfaultfd that it handed over.
pub(crate) struct GuestMemory {
    uffd: Uffd,
}

impl GuestMemory {
    /// Takes over a descriptor that was checked to be a userfaultfd; makes it non-blocking.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        // SAFETY: the descriptor is open and owned; its ownership moves into the `Uffd`.
        let uffd = unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) };
        Ok(Self { uffd })
    }

    /// Reads some pending events; `Ok(false)` if there was none.
    pub(crate) fn read(
        &self,
        events: &mut Events,
        mut handle: impl FnMut(MemoryEvent),
    ) -> io::Result<bool> {
        let mut any = false;
        for event in self.uffd.read_events(&mut events.buffer).map_err(into_io)? {
            any = true;
            handle(match event.map_err(into_io)? {
                Event::Pagefault { kind: FaultKind::Missing, addr, .. } => {
                    MemoryEvent::Fault(addr as u64)
                }
                // After an unmap nothing faults there; should the VMM map the place anew, the
                // snapshot's bytes would be wrong in it.
                Event::Remove { start, end } | Event::Unmap { start, end } => {
                    MemoryEvent::Removed { start: start as u64, end: end as u64 }
                }
                other => return Err(io::Error::other(format!("unsupported event {other:?}"))),
            });
        }
        Ok(any)
    }

    /// Copies whole pages to the missing pages at `address` and wakes their waiters.
    pub(crate) fn copy(&self, address: u64, bytes: &[u8]) -> Outcome {
        let (source, target) = (bytes.as_ptr().cast(), address as *mut libc::c_void);
        // SAFETY: `source` is valid for `bytes.len()`; `target` is an address in the VMM, not in
        // this process, and the kernel checks it against what is registered there.
        let copied = unsafe { self.uffd.copy(source, target, bytes.len(), true) };
        match copied {
            Ok(bytes) => Outcome::Installed(bytes as u64),
            Err(Error::PartiallyCopied(progress)) => from_progress(progress.cast_signed() as i64),
            Err(Error::CopyFailed(errno)) => from_errno(errno as i32),
            Err(other) => Outcome::Refused(into_io(other)),
        }
    }

    /// Maps zeros at the missing 4 KiB pages from `address` on and wakes their waiters.
    pub(crate) fn zero(&self, address: u64, bytes: u64) -> Outcome {
        let mut request = ZeroPage { start: address, bytes, mode: 0, progress: 0 };
        // SAFETY: the descriptor is an open userfaultfd and `request` has the layout that this
        // ioctl reads and writes; the address range is the VMM's and checked by the kernel.
        let result =
            unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_ZEROPAGE, &raw mut request) };
        if result == 0 {
            return Outcome::Installed(bytes);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EAGAIN) => from_progress(request.progress),
            Some(errno) => from_errno(errno),
            None => Outcome::Refused(error),
        }
    }

    /// Wakes all threads that wait for pages in the range.
    pub(crate) fn wake(&self, address: u64, bytes: u64) -> io::Result<()> {
        self.uffd.wake(address as *mut libc::c_void, length(bytes)).map_err(into_io)
    }

    /// Lets go of the range: threads that wait for it continue, and missing pages become zeros.
    pub(crate) fn unregister(&self, address: u64, bytes: u64) -> io::Result<()> {
        self.uffd.unregister(address as *mut libc::c_void, length(bytes)).map_err(into_io)
    }
}

impl AsFd for GuestMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

/// `struct uffdio_zeropage` of linux/userfaultfd.h.
#[repr(C)]
struct ZeroPage {
    start: u64,
    bytes: u64,
    mode: u64,
    /// Bytes done, or a negative errno.
    progress: i64,
}

/// `_IOWR(0xAA, 0x04, struct uffdio_zeropage)`.
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04;

fn from_progress(progress: i64) -> Outcome {
    match u64::try_from(progress) {
        Ok(0) => Outcome::Again,
        Ok(bytes) => Outcome::Installed(bytes),
        Err(_) => from_errno(i32::try_from(-progress).unwrap_or(libc::EIO)),
    }
}

fn from_errno(errno: i32) -> Outcome {
    match errno {
        libc::EAGAIN => Outcome::Again,
        libc::EEXIST => Outcome::AlreadyThere,
        libc::ESRCH => Outcome::Gone,
        libc::ENOSPC | libc::ENOMEM => Outcome::NoMemory,
        libc::ENOENT => Outcome::Unmapped,
        other => Outcome::Refused(io::Error::from_raw_os_error(other)),
    }
}

fn into_io(error: Error) -> io::Error {
    match error {
        Error::SystemError(errno) => io::Error::from_raw_os_error(errno as i32),
        other => io::Error::other(other),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "userfaultfd exists on 64-bit Linux only here")]
const fn length(bytes: u64) -> usize {
    bytes as usize
}

/// Whether the descriptor is a userfaultfd that the VMM has initialised.
pub(crate) fn is_ready(fd: BorrowedFd<'_>) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let flags = fcntl_getfl(fd)?;
    fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    match poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(_) => Ok(!polled[0].revents().contains(PollFlags::ERR)),
        Err(Errno::INTR) => Ok(true),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn negative_progress_is_an_errno() {
        let again = -i64::from(libc::EAGAIN);
        assert!(matches!(from_progress(again), Outcome::Again));
        assert!(matches!(from_progress(-i64::from(libc::EEXIST)), Outcome::AlreadyThere));
        assert!(matches!(from_progress(-i64::from(libc::ESRCH)), Outcome::Gone));
        assert!(matches!(from_progress(8192), Outcome::Installed(8192)));
        assert!(matches!(from_progress(0), Outcome::Again));
    }

    #[test]
    fn empty_huge_page_pool_has_a_name() {
        assert!(matches!(from_errno(libc::ENOSPC), Outcome::NoMemory));
        assert!(matches!(from_errno(libc::ENOMEM), Outcome::NoMemory));
        assert!(matches!(from_errno(libc::EIO), Outcome::Refused(_)));
    }
}
