//! One VM in service: its memory ([`crate::memory`]), the snapshot that it comes from, its process.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use reap_store::{Frame, FrameIndex, PAGE_SIZE, Snapshot, Source, WorkingSet};
use userfaultfd::EventBuffer;

use crate::layout::Layout;
use crate::memory::{Ahead, GuestMemory};
use crate::page_state::Bitmap;
use crate::recording::Recording;
use crate::report::{Cause, End, Restore};
use crate::uffd::{MemoryEvent, Uffd};
use crate::vmm::Vmm;

/// A prefetch that meets `Again` waits this long before it tries again.
const AGAIN_WAIT: Duration = Duration::from_micros(100);

/// A VM in service.
pub(crate) struct Vm {
    pub(crate) restore: Arc<Restore>,
    pub(crate) snapshot: Arc<Snapshot>,
    /// Number of the memory file in the snapshot.
    pub(crate) file: usize,
    pub(crate) memory: GuestMemory<Uffd>,
    pub(crate) vmm: Vmm,
    /// The process at the other end is gone, its memory was not.
    pub(crate) outlived: AtomicBool,
    /// Kept open: a VMM may take its end for a dead handler.
    pub(crate) _socket: std::os::unix::net::UnixStream,
    pub(crate) recording: Mutex<Option<Recording>>,
    /// Units of the working set, when one is prefetched.
    pub(crate) planned: Option<Bitmap>,
    /// That working set.
    pub(crate) set: Option<Arc<WorkingSet>>,
    /// It is installed ahead; else only its frames are brought.
    pub(crate) installs: bool,
}

impl Vm {
    /// Reads what the kernel has to say and marks removals, as one step.
    pub(crate) fn read_events(
        &self,
        buffer: &mut EventBuffer,
    ) -> std::io::Result<Vec<MemoryEvent>> {
        let uffd = &self.memory.kernel;
        let (events, removed) = self.memory.read_events(|events| uffd.read(buffer, events))?;
        let pages = removed * self.layout().pages_per_unit();
        self.restore.removed_pages.fetch_add(pages, Ordering::Relaxed);
        Ok(events)
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.memory.layout
    }

    /// Whether the VMM's memory is there still.
    pub(crate) fn has_memory(&self) -> bool {
        let layout = self.layout();
        self.memory.kernel.is_alive(layout.regions()[0].start, layout.page_bytes())
    }

    /// Installs neighbouring units ahead of any fault, leaving out what is there or was removed; see
    /// [`GuestMemory::install_ahead`].
    pub(crate) fn install_ahead(&self, first: u64, count: u64, bytes: Option<&[u8]>) -> Ahead {
        self.memory.install_ahead(first, count, bytes, || {
            self.restore.again.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(AGAIN_WAIT);
            !self.restore.has_ended()
        })
    }

    /// The working set's frame that brings a page ahead, and the page's position in it. None once a frame of
    /// the set could not be had.
    pub(crate) fn planned_place(&self, unit: u64) -> Option<(&Arc<WorkingSet>, usize, u32)> {
        let set = self.set.as_ref().filter(|_| self.layout().pages_per_unit() == 1)?;
        if self.restore.failed_prefetch_frames.load(Ordering::Relaxed) > 0 {
            return None;
        }
        let (frame, position) = set.place(self.file, unit)?;
        Some((set, frame, position))
    }

    /// The frames that a unit's bytes come from; empty when it is all zeros.
    pub(crate) fn frames_of(&self, unit: u64) -> Vec<FrameIndex> {
        self.snapshot.frames_of(self.file, self.layout().pages_of(unit))
    }

    /// The bytes of a unit from its frames, which `frame` finds.
    pub(crate) fn assemble(
        &self,
        unit: u64,
        frame: impl Fn(FrameIndex) -> Option<Frame>,
    ) -> Option<Vec<u8>> {
        // Pages after the end of the file stay zeros.
        let mut bytes = vec![0; usize::try_from(self.layout().page_bytes()).ok()?];
        let pages = self.layout().pages_of(unit);
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

    /// Runs a step of serving this VM. A panic is our bug; the VM that it hits must neither hang nor
    /// read zeros, and no other may notice.
    pub(crate) fn guarded(&self, act: impl FnOnce()) {
        if catch_unwind(AssertUnwindSafe(act)).is_err() {
            self.kill(Cause::Bug, "serving it panicked; this is a bug");
        }
    }

    /// Ends the VMM because it cannot be served. The reason is logged and shown once.
    pub(crate) fn kill(&self, cause: Cause, reason: &str) {
        if !self.restore.finish(End::Killed { cause, reason: reason.to_owned() }) {
            return;
        }
        let (id, pid) = (self.restore.id, self.vmm.pid());
        tracing::error!("restore {id}: VMM {pid} is killed: {reason}");
        if let Err(error) = self.vmm.kill() {
            tracing::error!("restore {id}: VMM {pid} cannot be killed: {error}");
        }
    }
}
