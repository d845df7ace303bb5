//! The memory of a pretend VM.

#![expect(unsafe_code, reason = "maps and touches memory as a VMM does")]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::content::{PAGE_BYTES, true_page};
use crate::socket::send;

/// Memory of a pretend VM: several mappings, each with its place in the memory file.
pub struct PretendVm {
    /// As (address, bytes, offset in the file).
    regions: Vec<(u64, u64, u64)>,
    page_bytes: u64,
    /// `None`: memory that nobody else serves.
    uffd: Option<OwnedFd>,
    socket: Option<UnixStream>,
}

// SAFETY: the memory belongs to the value; threads reach it through methods alone.
unsafe impl Send for PretendVm {}
// SAFETY: as above; reads and advice may come from several threads, as in a VMM.
unsafe impl Sync for PretendVm {}

impl PretendVm {
    /// One region of 4 KiB pages.
    pub fn whole(pages: u64) -> std::io::Result<Self> {
        Self::map(&[(0, pages)], PAGE_BYTES as u64)
    }

    /// Maps regions of (offset in the file, pages of 4 KiB) with gaps between them, and registers them.
    pub fn map(regions: &[(u64, u64)], page_bytes: u64) -> std::io::Result<Self> {
        let features = userfaultfd::FeatureFlags::EVENT_REMOVE;
        let uffd = userfaultfd::UffdBuilder::new()
            .require_features(features)
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .create()
            .map_err(std::io::Error::other)?;
        let mut mapped = Vec::new();
        for (offset, pages) in regions {
            let bytes = pages * PAGE_BYTES as u64;
            let at = map(bytes, page_bytes)?;
            uffd.register(at, bytes as usize).map_err(std::io::Error::other)?;
            mapped.push((at as u64, bytes, *offset));
        }
        // The crate's `into_raw_fd` closes what it gives away.
        let raw = rustix::io::dup(borrow(&uffd))?.into_raw_fd();
        // SAFETY: the duplicate is ours alone.
        let uffd = unsafe { OwnedFd::from_raw_fd(raw) };
        Ok(Self { regions: mapped, page_bytes, uffd: Some(uffd), socket: None })
    }

    /// Plain memory, for what is not part of the snapshot.
    pub(crate) fn unserved(pages: u64) -> std::io::Result<Self> {
        let (bytes, page_bytes) = (pages * PAGE_BYTES as u64, PAGE_BYTES as u64);
        let regions = vec![(map(bytes, page_bytes)? as u64, bytes, 0)];
        Ok(Self { regions, page_bytes, uffd: None, socket: None })
    }

    /// The message that a VMM sends.
    pub fn message(&self) -> String {
        let describe = |(start, bytes, offset): &(u64, u64, u64)| {
            serde_json::json!({
                "base_host_virt_addr": start, "size": bytes, "offset": offset,
                "page_size": self.page_bytes, "page_size_kib": self.page_bytes,
            })
        };
        serde_json::Value::from_iter(self.regions.iter().map(describe)).to_string()
    }

    /// The userfaultfd.
    pub fn uffd(&self) -> BorrowedFd<'_> {
        self.uffd.as_ref().expect("memory that is served").as_fd()
    }

    /// Connects and shakes hands as Firecracker does; keeps the socket, gives the userfaultfd away
    /// (but keeps its own reference too).
    pub fn connect(&mut self, path: &Path) -> std::io::Result<()> {
        let socket = UnixStream::connect(path)?;
        send(&socket, self.message().as_bytes(), &[self.uffd()])?;
        self.socket = Some(socket);
        Ok(())
    }

    /// Regions as (address, bytes, offset).
    pub fn regions(&self) -> &[(u64, u64, u64)] {
        &self.regions
    }

    /// Addresses of all pages, with their numbers in the file.
    pub fn pages(&self) -> Vec<(u64, u64)> {
        let size = PAGE_BYTES as u64;
        self.regions
            .iter()
            .flat_map(|(start, bytes, offset)| {
                (0..bytes / size).map(move |page| (start + page * size, offset / size + page))
            })
            .collect()
    }

    /// What a guest would read there. Faults if need be.
    pub fn read(&self, address: u64) -> Vec<u8> {
        let mut bytes = vec![0u8; PAGE_BYTES];
        // SAFETY: `address` is a page of this VM's mappings, which live as long as it does.
        unsafe {
            std::ptr::copy_nonoverlapping(address as *const u8, bytes.as_mut_ptr(), PAGE_BYTES);
        }
        bytes
    }

    /// A write of one byte to a page.
    pub fn write(&self, address: u64, byte: u8) {
        // SAFETY: `address` is inside a page of this VM's writable mappings.
        unsafe { std::ptr::write_volatile(address as *mut u8, byte) };
    }

    /// Gives pages back, as a balloon does. Returns once the handler has read the event.
    pub fn remove(&self, address: u64, pages: u64) {
        self.advise(address, pages, libc::MADV_DONTNEED);
    }

    /// Splits a mapping, as a VMM that advises a part of its memory does.
    pub fn split(&self, address: u64, pages: u64) {
        self.advise(address, pages, libc::MADV_DONTDUMP);
    }

    fn advise(&self, address: u64, pages: u64, advice: libc::c_int) {
        let bytes = pages as usize * PAGE_BYTES;
        // SAFETY: the range is inside this VM's mappings; nobody holds references into it.
        let result = unsafe { libc::madvise(address as *mut _, bytes, advice) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    /// Reads pages and compares them; the first that is wrong.
    pub fn check(&self, pages: &[(u64, u64)]) -> Result<(), String> {
        for (address, page) in pages {
            if self.read(*address) != true_page(*page) {
                return Err(format!("page {page} is wrong"));
            }
        }
        Ok(())
    }
}

fn map(bytes: u64, page_bytes: u64) -> std::io::Result<*mut libc::c_void> {
    let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    if page_bytes > PAGE_BYTES as u64 {
        flags |= libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    }
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new anonymous mapping disturbs nothing.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes as usize, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    if page_bytes == PAGE_BYTES as u64 {
        // SAFETY: the range was mapped a moment ago.
        unsafe { libc::madvise(at, bytes as usize, libc::MADV_NOHUGEPAGE) };
    }
    Ok(at)
}

impl Drop for PretendVm {
    fn drop(&mut self) {
        for (start, bytes, _) in &self.regions {
            // SAFETY: the mapping is this VM's own, and nobody uses it any more.
            unsafe { libc::munmap(*start as *mut _, *bytes as usize) };
        }
    }
}

fn borrow(uffd: &userfaultfd::Uffd) -> BorrowedFd<'_> {
    // SAFETY: open as long as `uffd` is.
    unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) }
}
