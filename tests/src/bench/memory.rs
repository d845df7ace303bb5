//! Guest memory as a VMM maps it, and the smallest userfaultfd handler: the kernel's side of the benchmark.

#![expect(unsafe_code, reason = "maps memory and reads it through raw addresses, as a VMM does")]

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use userfaultfd::{Event, EventBuffer, FeatureFlags, Uffd, UffdBuilder};

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;

/// A mapping of this process, unmapped on drop.
pub(super) struct Mapping {
    start: *mut std::ffi::c_void,
    bytes: usize,
}

// SAFETY: plain memory; only `page` and `fill` reach it, and the kernel orders userfaultfd's copies.
unsafe impl Send for Mapping {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private memory without content, in 4 KiB pages.
    pub(super) fn anonymous(bytes: usize) -> Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice disturbs nothing.
        let mapped =
            unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE) };
        let mapping = Self { start: mapped?, bytes };
        // SAFETY: the range is the mapping made above; the advice changes no content.
        unsafe { madvise(mapping.start, bytes, Advice::LinuxNoHugepage) }?;
        Ok(mapping)
    }

    /// A file, private, as Firecracker's `File` backend and QEMU map it.
    pub(super) fn file(file: &File, bytes: usize) -> Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: as above; nobody shortens the file while the benchmark runs.
        let mapped =
            unsafe { mmap(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE, file, 0) };
        Ok(Self { start: mapped?, bytes })
    }

    /// The address of a page.
    pub(super) fn address(&self, page: u64) -> u64 {
        self.start as u64 + page * PAGE as u64
    }

    /// Reads a byte of a page, as a guest's first touch does.
    pub(super) fn touch(&self, page: u64) {
        debug_assert!((page as usize) < self.bytes / PAGE);
        // SAFETY: the page is inside the mapping, which is readable; a missing page waits here.
        unsafe { std::ptr::read_volatile(self.address(page) as *const u8) };
    }

    /// The bytes of a page.
    pub(super) fn page(&self, page: u64) -> &[u8] {
        self.pages(page, 1)
    }

    /// The bytes of neighbouring pages.
    pub(super) fn pages(&self, first: u64, count: u64) -> &[u8] {
        let (from, length) = (first as usize * PAGE, count as usize * PAGE);
        assert!(from + length <= self.bytes);
        // SAFETY: inside the mapping, which lives as long as the borrow.
        unsafe { std::slice::from_raw_parts(self.address(first) as *const u8, length) }
    }

    /// The whole mapping, to read a file into.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is writable and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.cast(), self.bytes) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and nobody can hold a reference into it.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}

/// A userfaultfd with a mapping registered.
pub(super) struct Faults(Uffd);

impl Faults {
    /// Registers the whole of `memory`.
    pub(super) fn of(memory: &Mapping) -> Result<Self> {
        let uffd = UffdBuilder::new()
            .require_features(FeatureFlags::EVENT_REMOVE)
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .create()
            .context("userfaultfd: needs root, or vm.unprivileged_userfaultfd=1")?;
        uffd.register(memory.start, memory.bytes)?;
        Ok(Self(uffd))
    }

    /// A duplicate of the descriptor, to give away.
    pub(super) fn duplicate(&self) -> Result<OwnedFd> {
        let raw = rustix::io::dup(self.borrow())?.into_raw_fd();
        // SAFETY: the duplicate is ours alone.
        Ok(unsafe { OwnedFd::from_raw_fd(raw) })
    }

    fn borrow(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as `self` is.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }

    /// Installs pages of `from`.
    pub(super) fn install(&self, memory: &Mapping, page: u64, bytes: &[u8]) -> Result<()> {
        ensure!(page as usize * PAGE + bytes.len() <= memory.bytes, "an install outside of memory");
        let to = memory.address(page) as *mut std::ffi::c_void;
        // SAFETY: the kernel reads the borrowed bytes and writes only into registered memory that has
        // no page there yet.
        unsafe { self.0.copy(bytes.as_ptr().cast(), to, bytes.len(), true) }?;
        Ok(())
    }

    /// The minimal one-thread handler: reads faults and installs the page from `source` (the memory file,
    /// mapped), until `stop` is readable.
    pub(super) fn serve(&self, memory: &Mapping, source: &Mapping, stop: &File) -> Result<()> {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut buffer = EventBuffer::new(16);
        loop {
            let mut ready = [
                PollFd::from_borrowed_fd(self.borrow(), PollFlags::IN),
                PollFd::new(stop, PollFlags::IN),
            ];
            poll(&mut ready, None)?;
            if ready[1].revents().contains(PollFlags::IN) {
                return Ok(());
            }
            for event in self.0.read_events(&mut buffer)? {
                if let Event::Pagefault { addr, .. } = event? {
                    let page = (addr as u64 - memory.start as u64) / PAGE as u64;
                    self.install(memory, page, source.page(page))?;
                }
            }
        }
    }
}
