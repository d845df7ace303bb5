//! The kernel's calls that this library makes, each wrapped once.

use libc::{c_int, c_ulong, c_void, off_t, size_t};
use std::io::{Error, ErrorKind, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::ptr;

// From linux/userfaultfd.h, for machines whose ioctl numbers are built the generic way.
const USERFAULTFD_IOC_NEW: c_ulong = 0xAA00;
const UFFDIO_API: c_ulong = 0xC018_AA3F;
const UFFDIO_REGISTER: c_ulong = 0xC020_AA00;
const API_VERSION: u64 = 0xAA;
/// The kernel reports ranges that QEMU gives back; Firecracker asks for the same.
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const REGISTER_MODE_MISSING: u64 = 1 << 0;
const FLAGS: c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// The arguments of a call of `mmap`.
pub(crate) struct Mapping {
    pub(crate) address: *mut c_void,
    pub(crate) length: size_t,
    pub(crate) protection: c_int,
    pub(crate) flags: c_int,
    pub(crate) file: c_int,
    pub(crate) offset: off_t,
}

impl Mapping {
    /// Does what was asked; like `mmap`, leaves the reason in `errno`.
    ///
    /// # Safety
    ///
    /// As for `mmap`: with `MAP_FIXED`, nothing else may live in the range.
    pub(crate) unsafe fn map(&self) -> *mut c_void {
        // SAFETY: the arguments are those of `mmap`, for which the caller vouches. The system call is
        // made directly, because `mmap` is this library.
        let address = unsafe {
            libc::syscall(
                libc::SYS_mmap,
                self.address,
                self.length,
                self.protection,
                self.flags,
                self.file,
                self.offset,
            )
        };
        address as *mut c_void
    }

    /// Maps private anonymous memory where the file was to be mapped.
    pub(crate) fn map_anonymous(&self) -> Result<*mut c_void> {
        // Of the flags, only those that place the mapping mean the same without a file.
        let place = self.flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE);
        let anonymous = Mapping {
            flags: place | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            file: -1,
            offset: 0,
            ..*self
        };
        // SAFETY: replaces just what our caller wanted replaced: the range and its placement are the
        // ones that it passed to `mmap`.
        let address = unsafe { anonymous.map() };
        if address == libc::MAP_FAILED { Err(Error::last_os_error()) } else { Ok(address) }
    }
}

/// `madvise`, without this library's exception.
///
/// # Safety
///
/// As for `madvise`: advice that drops contents must be for memory that the caller owns.
pub(crate) unsafe fn advise(address: *mut c_void, length: size_t, advice: c_int) -> c_int {
    // SAFETY: the arguments are those of `madvise`, for which the caller vouches.
    let outcome = unsafe { libc::syscall(libc::SYS_madvise, address, length, advice) };
    if outcome == 0 { 0 } else { -1 }
}

pub(crate) fn refuse_huge_pages(address: *mut c_void, length: size_t) -> Result<()> {
    // SAFETY: this advice changes how memory is allocated, never what it holds.
    let outcome = unsafe { advise(address, length, libc::MADV_NOHUGEPAGE) };
    match (outcome, Error::last_os_error()) {
        (0, _) => Ok(()),
        // A kernel that was built without huge pages.
        (_, error) if error.kind() == ErrorKind::InvalidInput => Ok(()),
        (_, error) => Err(error),
    }
}

/// Device and inode of an open file.
pub(crate) fn identity(file: c_int) -> Option<(u64, u64)> {
    let mut status = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `status` is valid for writes of one `stat`.
    let outcome = unsafe { libc::fstat(file, status.as_mut_ptr()) };
    if outcome != 0 {
        return None;
    }
    // SAFETY: fstat succeeded, so it has filled the structure.
    let status = unsafe { status.assume_init() };
    Some((status.st_dev, status.st_ino))
}

pub(crate) fn page_size() -> Result<usize> {
    // SAFETY: sysconf takes a number and touches no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).map_err(|_| Error::last_os_error())
}

/// Ends the process at once.
pub(crate) fn exit_now(code: c_int) -> ! {
    // SAFETY: _exit runs no handlers and does not come back.
    unsafe { libc::_exit(code) }
}

/// A userfaultfd that also reports faults that happen inside the kernel, when it reads a disk into
/// guest memory, for example.
pub(crate) struct Userfault {
    descriptor: OwnedFd,
}

impl Userfault {
    /// From `/dev/userfaultfd`, whose file permissions decide; else from the system call, which wants
    /// CAP_SYS_PTRACE or the sysctl `vm.unprivileged_userfaultfd`.
    pub(crate) fn open() -> Result<Userfault> {
        let raw = match std::fs::File::open("/dev/userfaultfd") {
            Ok(device) => {
                let device = device.as_raw_fd();
                // SAFETY: this ioctl takes its argument by value.
                unsafe { libc::ioctl(device, USERFAULTFD_IOC_NEW, FLAGS) }
            }
            Err(_) => {
                // SAFETY: this system call takes its argument by value.
                let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
                RawFd::try_from(raw).unwrap_or(-1)
            }
        };
        if raw < 0 {
            return Err(Error::last_os_error());
        }
        // SAFETY: the kernel has just made this descriptor and nobody else knows it.
        let descriptor = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Userfault { descriptor })
    }

    pub(crate) fn handshake(&self) -> Result<()> {
        let mut api = Api { api: API_VERSION, features: FEATURE_EVENT_REMOVE, ioctls: 0 };
        // SAFETY: `api` has the layout of `struct uffdio_api` and outlives the call.
        checked(unsafe { libc::ioctl(self.descriptor.as_raw_fd(), UFFDIO_API, &raw mut api) })
    }

    pub(crate) fn register(&self, start: usize, length: usize) -> Result<()> {
        let mut register = Register {
            start: start as u64,
            length: length as u64,
            mode: REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        let raw = self.descriptor.as_raw_fd();
        // SAFETY: `register` has the layout of `struct uffdio_register` and outlives the call.
        checked(unsafe { libc::ioctl(raw, UFFDIO_REGISTER, &raw mut register) })
    }

    /// Sends a message with this userfaultfd attached, in one piece: the receiver takes one message
    /// with one descriptor.
    pub(crate) fn send(&self, socket: &UnixStream, message: &[u8]) -> Result<()> {
        const DESCRIPTOR_BYTES: u32 = 4;
        const { assert!(size_of::<RawFd>() == DESCRIPTOR_BYTES as usize) };
        // Room for one header and one descriptor, aligned as a header must be.
        let mut control = [0_u64; 4];
        let mut part =
            libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() };
        // SAFETY: a `msghdr` is numbers and pointers, for which zeros are valid.
        let mut header: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        // SAFETY: computes a size from a size.
        header.msg_controllen = unsafe { libc::CMSG_SPACE(DESCRIPTOR_BYTES) } as usize;
        assert!(header.msg_controllen <= size_of_val(&control));
        // SAFETY: computes a size from a size.
        let length = unsafe { libc::CMSG_LEN(DESCRIPTOR_BYTES) } as usize;
        let attached = libc::cmsghdr {
            cmsg_len: length,
            cmsg_level: libc::SOL_SOCKET,
            cmsg_type: libc::SCM_RIGHTS,
        };
        // SAFETY: `header` names `control`, which has room for a header, so this is inside it.
        let first = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
        // SAFETY: `first` lies in `control`, aligned, with room for a header.
        unsafe { ptr::write(first, attached) };
        // SAFETY: `first` lies in `control`; its data follows.
        let data = unsafe { libc::CMSG_DATA(first) };
        // SAFETY: CMSG_SPACE made room for one descriptor; the data need not be aligned for it.
        unsafe { ptr::write_unaligned(data.cast(), self.descriptor.as_raw_fd()) };
        // SAFETY: everything that `header` points to lives until the call is over.
        let sent =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const header, libc::MSG_NOSIGNAL) };
        match usize::try_from(sent) {
            Ok(sent) if sent == message.len() => Ok(()),
            Ok(_) => Err(Error::new(ErrorKind::WriteZero, "the socket took only a part")),
            Err(_) => Err(Error::last_os_error()),
        }
    }

    /// Leaves the descriptor open for the life of the process.
    pub(crate) fn keep(self) {
        let _ = self.descriptor.into_raw_fd();
    }
}

fn checked(outcome: c_int) -> Result<()> {
    if outcome == -1 { Err(Error::last_os_error()) } else { Ok(()) }
}
