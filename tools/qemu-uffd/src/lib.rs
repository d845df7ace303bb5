//! Preloaded into QEMU, gives its guest memory to a userfaultfd handler in Firecracker's protocol.
//!
//! QEMU maps its memory file itself and knows no outside handler. This library stands before `mmap`: the
//! mapping of the file named by `REAP_UFFD_MEMORY` becomes anonymous memory that is registered with a new
//! userfaultfd, and that goes over the socket named by `REAP_UFFD_SOCKET` before `mmap` returns. Without
//! `REAP_UFFD_SOCKET` it does nothing. `docs/QEMU.md` tells how to use it.
//!
//! A guest must never run on memory that nobody fills: it would read zeros. So whatever goes wrong here
//! is written to the standard error, and QEMU exits.

#![expect(unsafe_code, reason = "stands before mmap and wraps userfaultfd")]

mod kernel;

use kernel::{Mapping, Userfault};
use libc::{c_int, c_void, off_t, size_t};
use std::ffi::{OsString, c_long};
use std::fmt::Display;
use std::io::Write as _;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, OnceLock};

/// The exit code when guest memory cannot be had; `sysexits.h` calls it EX_UNAVAILABLE.
const EXIT_UNAVAILABLE: c_int = 69;

/// What the environment asks for.
struct Request {
    socket: OsString,
    device: u64,
    inode: u64,
}

/// The ranges that have been given away, as addresses from and to.
static GIVEN: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// The environment's request, read once; `None` without `REAP_UFFD_SOCKET`.
fn request() -> Option<&'static Request> {
    static REQUEST: OnceLock<Option<Request>> = OnceLock::new();
    let read = || {
        let socket = std::env::var_os("REAP_UFFD_SOCKET")?;
        let Some(memory) = std::env::var_os("REAP_UFFD_MEMORY") else {
            die("REAP_UFFD_SOCKET is set, but REAP_UFFD_MEMORY names no memory file");
        };
        match std::fs::metadata(&memory) {
            Ok(file) => Some(Request { socket, device: file.dev(), inode: file.ino() }),
            Err(error) => die(format_args!("REAP_UFFD_MEMORY={}: {error}", memory.display())),
        }
    };
    REQUEST.get_or_init(read).as_ref()
}

/// `mmap` as the kernel has it, but for the memory file.
///
/// # Safety
///
/// As for `mmap` itself: with `MAP_FIXED`, nothing else may live in the range.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    file: c_int,
    offset: off_t,
) -> *mut c_void {
    let mapping = Mapping { address, length, protection, flags, file, offset };
    // Mappings without a file come first, and often: from allocators, before anything is set up. A
    // mapping that nobody can read is a reservation of addresses.
    let wanted = if file < 0 || protection == libc::PROT_NONE { None } else { request() };
    match wanted.filter(|request| is_memory_file(&mapping, request)) {
        Some(request) => give_away(&mapping, request),
        // SAFETY: the caller vouches for the arguments, which go on unchanged.
        None => unsafe { mapping.map() },
    }
}

/// The name under which programs with large-file support call `mmap`; the same on 64-bit Linux.
///
/// # Safety
///
/// As for [`mmap`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    address: *mut c_void,
    length: size_t,
    protection: c_int,
    flags: c_int,
    file: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the caller vouches for the arguments, which go on unchanged.
    unsafe { mmap(address, length, protection, flags, file, offset) }
}

/// `madvise` as the kernel has it, but QEMU's wish for huge pages does not reach the ranges that were
/// given away: a handler that fills 4 KiB pages would pay for a huge page at each first fault.
///
/// # Safety
///
/// As for `madvise` itself.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(address: *mut c_void, length: size_t, advice: c_int) -> c_int {
    if advice == libc::MADV_HUGEPAGE {
        let (start, end) = (address as usize, (address as usize).saturating_add(length));
        let given = GIVEN.lock().unwrap_or_else(|_| die("a thread has panicked"));
        if given.iter().any(|&(from, to)| start < to && from < end) {
            return 0;
        }
    }
    // SAFETY: the caller vouches for the arguments, which go on unchanged.
    unsafe { kernel::advise(address, length, advice) }
}

fn is_memory_file(mapping: &Mapping, request: &Request) -> bool {
    // A file that cannot be asked cannot be mapped either: `mmap` will say why.
    kernel::identity(mapping.file)
        .is_some_and(|(device, inode)| device == request.device && inode == request.inode)
}

/// Maps anonymous memory in place of the file, registers it, and sends it to the handler.
fn give_away(mapping: &Mapping, request: &Request) -> *mut c_void {
    if mapping.flags & libc::MAP_SHARED != 0 {
        die("guest memory is mapped shared: it needs share=off");
    }
    let address = expect(mapping.map_anonymous(), "mapping anonymous memory");
    let start = address as usize;
    let page_size = expect(kernel::page_size(), "asking for the page size");
    let length = mapping.length.next_multiple_of(page_size);
    expect(kernel::refuse_huge_pages(address, length), "madvise(MADV_NOHUGEPAGE)");
    let userfault = expect(
        Userfault::open(),
        "opening a userfaultfd (it needs /dev/userfaultfd or CAP_SYS_PTRACE)",
    );
    expect(userfault.handshake(), "the userfaultfd's handshake with the kernel");
    expect(userfault.register(start, length), "registering guest memory with the userfaultfd");

    let to = request.socket.display();
    let socket = expect(UnixStream::connect(&request.socket), format_args!("connecting to {to}"));
    // Firecracker's message; its `page_size_kib` is bytes as well, against its name.
    let message = format!(
        "[{{\"base_host_virt_addr\":{start},\"size\":{length},\"offset\":{},\
         \"page_size\":{page_size},\"page_size_kib\":{page_size}}}]",
        mapping.offset
    );
    expect(userfault.send(&socket, message.as_bytes()), format_args!("the handshake with {to}"));
    GIVEN.lock().unwrap_or_else(|_| die("a thread has panicked")).push((start, start + length));

    // Both stay open as long as QEMU lives. The socket's end tells the handler that QEMU is dead. And
    // if the handler's were the last descriptor of the userfaultfd, its death would let the threads that
    // wait for a page go on, and they would read zeros.
    let _ = socket.into_raw_fd();
    userfault.keep();
    address
}

/// The value, or the end.
fn expect<T>(result: std::io::Result<T>, doing: impl Display) -> T {
    result.unwrap_or_else(|error| die(format_args!("{doing}: {error}")))
}

/// Says why, and exits QEMU without its farewells: they might touch guest memory.
fn die(reason: impl Display) -> ! {
    let _ = writeln!(std::io::stderr(), "reap-qemu-uffd: {reason}");
    kernel::exit_now(EXIT_UNAVAILABLE)
}

// The offsets of `mmap` are 64 bits wide on every machine this is for.
const _: () = assert!(size_of::<c_long>() == 8 && size_of::<off_t>() == 8);
