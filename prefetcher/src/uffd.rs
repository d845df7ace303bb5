//! The one wrapper of the userfaultfd: ioctls in, named outcomes out.
//!
//! The `userfaultfd` crate reports EAGAIN, partial progress and a negative errno all as
//! `PartiallyCopied(n)`; that is taken apart here and nowhere else.

#![expect(unsafe_code, reason = "wraps the userfaultfd ioctls")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use userfaultfd::{Error, Event, EventBuffer};

use crate::memory::Kernel;

const EAGAIN: i32 = libc::EAGAIN;

/// What an install came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// So many bytes are there now, and whoever waited for them is awake. It may be fewer than
    /// asked for: the first byte that is missing tells why when it is tried.
    Installed(u64),
    /// The first page was there before. Nobody was woken.
    AlreadyThere,
    /// A REMOVE has not been read yet, or the mappings are changing: try again later.
    Again,
    /// The process has no memory any more.
    Gone,
    /// Nothing is mapped or registered there.
    NotMapped,
    /// No memory for the page; for 2 MiB pages the pool is empty.
    NoMemory,
    /// What should not happen.
    Failed(i32),
}

impl Outcome {
    fn of_errno(errno: i32) -> Self {
        match errno {
            libc::EEXIST => Self::AlreadyThere,
            EAGAIN => Self::Again,
            libc::ESRCH => Self::Gone,
            libc::ENOENT => Self::NotMapped,
            libc::ENOSPC | libc::ENOMEM => Self::NoMemory,
            other => Self::Failed(other),
        }
    }

    fn of_error(error: &Error) -> Self {
        match error {
            Error::PartiallyCopied(n) => match i64::try_from(*n) {
                Ok(0) => Self::Again,
                Ok(bytes) => Self::Installed(bytes.unsigned_abs()),
                // The kernel wrote a negative errno into the count.
                Err(_) => Self::of_errno(i32::try_from(n.wrapping_neg()).unwrap_or(libc::EIO)),
            },
            Error::CopyFailed(errno) | Error::ZeropageFailed(errno) => {
                Self::of_errno(*errno as i32)
            }
            Error::SystemError(errno) => Self::of_errno(*errno as i32),
            _ => Self::Failed(libc::EIO),
        }
    }
}

/// What the kernel tells of a VM's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemoryEvent {
    /// A thread waits at this address.
    Fault(u64),
    /// The guest's pages from the first to before the second address are gone: zeros from now on.
    Removed(u64, u64),
    /// The mapping moved or was copied, which this protocol has no words for.
    Unsupported(&'static str),
}

/// A userfaultfd that a VMM gave us.
pub(crate) struct Uffd(userfaultfd::Uffd);

impl Uffd {
    /// Takes over `fd`, which must be a userfaultfd, and makes it non-blocking.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK)?;
        let raw = fd.into_raw_fd();
        // SAFETY: `raw` was owned by `fd`, which gave it up; it is owned by the wrapper from here.
        Ok(Self(unsafe { userfaultfd::Uffd::from_raw_fd(raw) }))
    }

    /// Gives a range back to the kernel: what is missing there is zeros from now on.
    pub(crate) fn unregister(&self, address: u64, bytes: u64) -> io::Result<()> {
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.0.unregister(address as *mut libc::c_void, length).map_err(io::Error::other)
    }

    /// Whether the other process's memory is there, without changing it: an install from an
    /// address where nothing can be read fails in another way when it is not.
    pub(crate) fn is_alive(&self, address: u64, page_bytes: u64) -> bool {
        let length = usize::try_from(page_bytes).unwrap_or(usize::MAX);
        let nowhere = std::ptr::null::<libc::c_void>();
        // SAFETY: the kernel checks the source address, which is never mapped, and answers EFAULT;
        // it installs nothing.
        let tried = unsafe { self.0.copy(nowhere, address as *mut libc::c_void, length, false) };
        !matches!(tried.map_err(|error| Outcome::of_error(&error)), Err(Outcome::Gone))
    }

    /// Appends what can be read now to `events`; whether there may be more.
    pub(crate) fn read(
        &self,
        buffer: &mut EventBuffer,
        events: &mut Vec<MemoryEvent>,
    ) -> io::Result<bool> {
        let before = events.len();
        for event in self.0.read_events(buffer).map_err(read_error)? {
            events.push(match event.map_err(read_error)? {
                Event::Pagefault { addr, .. } => MemoryEvent::Fault(addr as u64),
                Event::Remove { start, end } | Event::Unmap { start, end } => {
                    MemoryEvent::Removed(start as u64, end as u64)
                }
                Event::Remap { .. } => MemoryEvent::Unsupported("guest memory was remapped"),
                Event::Fork { .. } => MemoryEvent::Unsupported("the VMM forked"),
            });
        }
        Ok(events.len() > before)
    }
}

impl Kernel for Uffd {
    fn copy(&self, address: u64, bytes: &[u8]) -> Outcome {
        let destination = address as *mut libc::c_void;
        // SAFETY: the kernel reads `bytes`, which is borrowed for the call, and writes only into
        // ranges that the other process registered with this descriptor.
        let copied = unsafe { self.0.copy(bytes.as_ptr().cast(), destination, bytes.len(), true) };
        copied.map_or_else(
            |error| Outcome::of_error(&error),
            |bytes| Outcome::Installed(bytes as u64),
        )
    }

    fn zero(&self, address: u64, bytes: u64) -> Outcome {
        let Ok(length) = usize::try_from(bytes) else { return Outcome::Failed(libc::EINVAL) };
        let start = address as *mut libc::c_void;
        // SAFETY: the kernel writes only into ranges that the other process registered with this
        // descriptor; nothing of this process is touched.
        let zeroed = unsafe { self.0.zeropage(start, length, true) };
        zeroed.map_or_else(
            |error| Outcome::of_error(&error),
            |bytes| Outcome::Installed(bytes as u64),
        )
    }

    fn wake(&self, address: u64, bytes: u64) -> io::Result<()> {
        let length = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.0.wake(address as *mut libc::c_void, length).map_err(io::Error::other)
    }
}

fn read_error(error: Error) -> io::Error {
    match error {
        Error::SystemError(errno) => io::Error::from_raw_os_error(errno as i32),
        other => io::Error::other(other),
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor is open as long as `self` is, which the borrow does not outlive.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crates_counts_are_taken_apart() {
        let negative = |errno: i32| Error::PartiallyCopied((-i64::from(errno)) as usize);
        assert_eq!(Outcome::of_error(&Error::PartiallyCopied(8192)), Outcome::Installed(8192));
        assert_eq!(Outcome::of_error(&Error::PartiallyCopied(0)), Outcome::Again);
        assert_eq!(Outcome::of_error(&negative(libc::EAGAIN)), Outcome::Again);
        assert_eq!(Outcome::of_error(&negative(libc::EEXIST)), Outcome::AlreadyThere);
        assert_eq!(Outcome::of_error(&negative(libc::ESRCH)), Outcome::Gone);
        assert_eq!(Outcome::of_error(&negative(libc::ENOSPC)), Outcome::NoMemory);
    }
}
