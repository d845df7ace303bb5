//! The process at the other end: who it is, whether it lives, and how to end it.
//!
//! A pidfd names the process for ever, whatever becomes of its number.

#![expect(unsafe_code, reason = "rustix has no SO_PEERPIDFD")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::process::{PidfdFlags, Signal};

/// `SO_PEERPIDFD`, since Linux 6.5.
const SO_PEERPIDFD: libc::c_int = 77;

/// The VMM.
pub(crate) struct Vmm {
    pidfd: OwnedFd,
    pid: i32,
    uid: u32,
}

impl Vmm {
    /// Whoever connected `socket`.
    pub(crate) fn of_peer(socket: &UnixStream) -> io::Result<Self> {
        let credentials = rustix::net::sockopt::socket_peercred(socket)?;
        let pidfd = match peer_pidfd(socket) {
            Ok(pidfd) => pidfd,
            // An older kernel: the number may have been reused only if the peer died just now.
            Err(_) => rustix::process::pidfd_open(credentials.pid, PidfdFlags::empty())?,
        };
        let pid = credentials.pid.as_raw_nonzero().get();
        Ok(Self { pidfd, pid, uid: credentials.uid.as_raw() })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    /// Ends the process; one that is gone is no error.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Err(error) if error != rustix::io::Errno::SRCH => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// Readable when the process has ended.
impl AsFd for Vmm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

fn peer_pidfd(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut fd = MaybeUninit::<libc::c_int>::uninit();
    let mut length =
        libc::socklen_t::try_from(size_of::<libc::c_int>()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes at most `length` bytes, which is the size of `fd`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            fd.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so the kernel wrote the descriptor.
    let fd = unsafe { fd.assume_init() };
    // SAFETY: the kernel made this descriptor for us a moment ago; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
