//! One VM in service: its regions, its page state, and the only code that installs pages.
//!
//! The lock on the page state orders removals against installs. Events are read and removals
//! marked under the write lock; every install checks the state and calls the kernel under the read
//! lock. While a REMOVE is unread the kernel itself answers `Again` to installs; so from the moment
//! that the guest gives a page back, no old bytes can reach it.

use std::sync::Arc;
use std::sync::LazyLock;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use reap_store::{Frame, FrameIndex, PAGE_SIZE, Snapshot, Source, WorkingSet};
use userfaultfd::EventBuffer;

use crate::layout::Layout;
use crate::page_state::{Bitmap, PageState};
use crate::pending::Pending;
use crate::recording::Recording;
use crate::report::{End, Restore};
use crate::uffd::{MemoryEvent, Outcome, Uffd};
use crate::vmm::Vmm;

/// Units installed under one hold of the lock when nobody waits for them: some 100 us, so that
/// a fault that comes meanwhile is read soon.
const BATCH_PAGES: u64 = 64;
/// The same for zeros, which are a tenth of the work.
const BATCH_ZERO_PAGES: u64 = 512;
/// A prefetch that meets `Again` waits this long, this often, before it leaves the rest to demand.
const AGAIN_WAIT: Duration = Duration::from_micros(100);
const AGAIN_TRIES: u32 = 200;
/// Events read before any is acted on; a guest that makes more has its turn again soon.
const EVENTS_AT_ONCE: usize = 1024;

static ZERO_UNIT: LazyLock<Vec<u8>> = LazyLock::new(|| vec![0; 2 << 20]);

/// What a unit is to be filled with.
#[derive(Clone, Copy)]
pub(crate) enum Content<'a> {
    Zero,
    /// Exactly one unit.
    Bytes(&'a [u8]),
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// The page is there and whoever waited is awake.
    Done,
    /// Again later.
    Again,
    /// The VM is gone, or this address is.
    Gone,
    /// It cannot be served.
    Failed(&'static str, i32),
}

/// A VM in service.
pub(crate) struct Vm {
    pub(crate) restore: Arc<Restore>,
    pub(crate) snapshot: Arc<Snapshot>,
    /// Number of the memory file in the snapshot.
    pub(crate) file: usize,
    pub(crate) layout: Layout,
    pub(crate) vmm: Vmm,
    pub(crate) uffd: Uffd,
    /// Kept open: a VMM may take its end for a dead handler.
    pub(crate) _socket: std::os::unix::net::UnixStream,
    pub(crate) state: RwLock<PageState>,
    pub(crate) pending: Mutex<Pending>,
    pub(crate) recording: Mutex<Option<Recording>>,
    /// Units of the working set, when one is prefetched.
    pub(crate) planned: Option<Bitmap>,
    /// That working set.
    pub(crate) set: Option<Arc<WorkingSet>>,
}

impl Vm {
    /// Reads what the kernel has to say and marks removals, as one step.
    pub(crate) fn read_events(
        &self,
        buffer: &mut EventBuffer,
    ) -> std::io::Result<Vec<MemoryEvent>> {
        let mut events = Vec::new();
        let mut state = self.state.write();
        while events.len() < EVENTS_AT_ONCE && self.uffd.read(buffer, &mut events)? {}
        for event in &events {
            if let MemoryEvent::Removed(start, end) = event {
                for (first, count) in self.layout.units_in(*start, *end) {
                    state.mark_removed(first, count);
                    let pages = count * self.layout.pages_per_unit();
                    self.restore.removed_pages.fetch_add(pages, Ordering::Relaxed);
                }
            }
        }
        Ok(events)
    }

    /// Fills the unit of a fault, with zeros if it was removed, and wakes whoever waits.
    pub(crate) fn serve(&self, unit: u64, content: Content<'_>) -> Served {
        let state = self.state.read();
        let content = if state.is_removed(unit) { Content::Zero } else { content };
        let Some((address, _)) = self.layout.address_of(unit) else { return Served::Gone };
        let page_bytes = self.layout.page_bytes();
        let outcome = match content {
            Content::Bytes(bytes) => self.uffd.copy(address, bytes),
            Content::Zero => self.zero(address, page_bytes),
        };
        match outcome {
            Outcome::Installed(_) => {
                state.mark_installed(unit, 1);
                Served::Done
            }
            Outcome::AlreadyThere => {
                // Somebody was first. The thread may have gone to sleep after it woke the others.
                match self.uffd.wake(address, page_bytes) {
                    Ok(()) => Served::Done,
                    Err(_) => Served::Gone,
                }
            }
            Outcome::Again => {
                self.restore.again.fetch_add(1, Ordering::Relaxed);
                Served::Again
            }
            Outcome::Gone | Outcome::NotMapped => Served::Gone,
            Outcome::NoMemory => Served::Failed("no memory for a guest page", libc::ENOMEM),
            Outcome::Failed(errno) => Served::Failed("the kernel refused a page", errno),
        }
    }

    fn zero(&self, address: u64, bytes: u64) -> Outcome {
        if self.layout.page_bytes() == PAGE_SIZE as u64 {
            return self.uffd.zero(address, bytes);
        }
        self.uffd.copy(address, &ZERO_UNIT)
    }

    /// Installs neighbouring units ahead of any fault, leaving out what is there or was removed;
    /// answers with how many it installed. `bytes` is `None` for zeros. Stops early when the VM is gone or the
    /// kernel keeps saying `Again`: then demand serves the rest.
    pub(crate) fn install_ahead(&self, first: u64, count: u64, bytes: Option<&[u8]>) -> u64 {
        let unit_bytes = self.layout.page_bytes();
        let huge = unit_bytes != PAGE_SIZE as u64;
        let longest = match bytes {
            _ if huge => 1,
            Some(_) => BATCH_PAGES,
            None => BATCH_ZERO_PAGES,
        };
        let (mut at, end) = (first, first + count);
        let mut installed = 0;
        let mut tries = 0;
        while at < end && !self.restore.has_ended() {
            let state = self.state.read();
            let Some((start, run)) = state.wanted_run(at, end - at, longest) else { break };
            let Some((address, contiguous)) = self.layout.address_of(start) else {
                // A hole between regions: the memory file has pages that the VM has not.
                at = start + 1;
                continue;
            };
            let run = run.min(contiguous);
            let outcome = match bytes {
                None => self.zero(address, run * unit_bytes),
                Some(bytes) => {
                    let from = usize::try_from((start - first) * unit_bytes).unwrap_or(usize::MAX);
                    let length = usize::try_from(run * unit_bytes).unwrap_or(usize::MAX);
                    self.uffd.copy(address, &bytes[from..from + length])
                }
            };
            match outcome {
                Outcome::Installed(bytes) => {
                    let units = bytes / unit_bytes;
                    state.mark_installed(start, units);
                    installed += units;
                    at = start + units;
                    tries = 0;
                }
                // Where the VMM has unmapped its memory there is nothing to install any more.
                Outcome::AlreadyThere | Outcome::NotMapped => {
                    state.mark_installed(start, 1);
                    at = start + 1;
                }
                Outcome::Again if tries < AGAIN_TRIES => {
                    drop(state);
                    tries += 1;
                    self.restore.again.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(AGAIN_WAIT);
                }
                _ => break,
            }
        }
        installed
    }

    /// The working set's frame that brings a page ahead, and the page's position in it. None once a frame of
    /// the set could not be had.
    pub(crate) fn planned_place(&self, unit: u64) -> Option<(&Arc<WorkingSet>, usize, u32)> {
        let set = self.set.as_ref().filter(|_| self.layout.pages_per_unit() == 1)?;
        if self.restore.failed_prefetch_frames.load(Ordering::Relaxed) > 0 {
            return None;
        }
        let (frame, position) = set.place(self.file, unit)?;
        Some((set, frame, position))
    }

    /// The frames that a unit's bytes come from; empty when it is all zeros.
    pub(crate) fn frames_of(&self, unit: u64) -> Vec<FrameIndex> {
        self.snapshot.frames_of(self.file, self.layout.pages_of(unit))
    }

    /// The bytes of a unit from its frames, which `frame` finds.
    pub(crate) fn assemble(
        &self,
        unit: u64,
        frame: impl Fn(FrameIndex) -> Option<Frame>,
    ) -> Option<Vec<u8>> {
        // Pages after the end of the file stay zeros.
        let mut bytes = vec![0; usize::try_from(self.layout.page_bytes()).ok()?];
        let pages = self.layout.pages_of(unit);
        for (page, extent) in self.snapshot.extents(self.file, pages.clone()) {
            let Source::Frame { frame: index, position } = extent.source else { continue };
            let found = frame(index)?;
            let count = u32::try_from(extent.pages).unwrap_or(u32::MAX);
            let from = usize::try_from(page - pages.start).ok()? * PAGE_SIZE;
            let source = found.pages(position, count);
            bytes[from..from + source.len()].copy_from_slice(source);
        }
        Some(bytes)
    }

    /// Ends the VMM because it cannot be served. The reason is logged and shown once.
    pub(crate) fn kill(&self, reason: &str) {
        if !self.restore.finish(End::Killed(reason.to_owned())) {
            return;
        }
        let (id, pid) = (self.restore.id, self.vmm.pid());
        tracing::error!("restore {id}: VMM {pid} is killed: {reason}");
        if let Err(error) = self.vmm.kill() {
            tracing::error!("restore {id}: VMM {pid} cannot be killed: {error}");
        }
    }
}
