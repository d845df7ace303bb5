//! The process at the other end of a socket, pinned by pidfd so that its pid cannot be mistaken.
#![expect(unsafe_code, reason = "SO_PEERPIDFD has no safe wrapper yet")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

/// A VMM process.
pub(crate) struct Peer {
    pid: Pid,
    uid: u32,
    pidfd: OwnedFd,
}

impl Peer {
    /// The process that connected `socket`.
    pub(crate) fn of(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let credentials = socket_peercred(socket)?;
        let pidfd = match peer_pidfd(socket) {
            // Kernels before 6.5. A pid that is reused in between would be pinned wrongly, but the
            // peer still holds its socket, or we would see it hang up.
            Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => {
                pidfd_open(credentials.pid, PidfdFlags::empty())?
            }
            other => other?,
        };
        Ok(Self { pid: credentials.pid, uid: credentials.uid.as_raw(), pidfd })
    }

    /// Its process id, for people.
    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// Its user when it connected.
    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    /// Readable once the process has exited.
    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether the "VMM" lives in this very process, as in tests and benchmarks.
    pub(crate) fn is_this_process(&self) -> bool {
        self.pid == getpid()
    }

    /// Whether the process has exited.
    pub(crate) fn has_exited(&self) -> bool {
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut polled, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }

    /// Ends the process. A process that has exited already is fine; our own is refused.
    pub(crate) fn kill(&self) -> io::Result<()> {
        if self.is_this_process() {
            return Err(io::Error::other("the VMM is this process"));
        }
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// `SO_PEERPIDFD` of asm-generic/socket.h, since Linux 6.5.
const SO_PEERPIDFD: libc::c_int = 77;

fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut pidfd: libc::c_int = -1;
    let mut length: libc::socklen_t = 4;
    // SAFETY: `pidfd` and `length` are valid for the four bytes that the kernel writes to each.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PEERPIDFD,
            (&raw mut pidfd).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so `pidfd` is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}
