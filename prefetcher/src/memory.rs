//! The memory of one VM as we serve it: what each page is, which faults wait, and what becomes of
//! either when the kernel has answered.
//!
//! The only code that installs pages. It knows the kernel as [`Kernel`] alone and neither store nor process, so that
//! the model below drives this very code through every order of events and every answer.
//!
//! The lock on the page state orders removals against installs. Events are read and removals
//! marked under the write lock; every install checks the state and calls the kernel under the read
//! lock. While a REMOVE is unread the kernel itself answers `Again` to installs; so from the moment
//! that the guest gives a page back, no old bytes can reach it.

#[cfg(test)]
mod model;

use std::io;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use reap_store::PAGE_SIZE;

use crate::latency::FaultClass;
use crate::layout::Layout;
use crate::page_state::PageState;
use crate::pending::{Pending, PendingFault};
use crate::uffd::{MemoryEvent, Outcome};

/// Units installed under one hold of the lock when nobody waits for them: some 100 us, so that
/// a fault that comes meanwhile is read soon.
const BATCH_PAGES: u64 = 64;
/// The same for zeros, which are a tenth of the work.
const BATCH_ZERO_PAGES: u64 = 512;
/// How often one install ahead meets `Again` before it leaves the rest to demand. Each time its
/// thread waits, which other VMs need.
const AGAIN_TRIES: u32 = 50;
/// Events read in one turn. A fault that comes in while a REMOVE behind it is unread is tried again, so this bounds
/// what a guest that makes events without end takes from the others, and nothing else.
pub(crate) const EVENTS_AT_ONCE: usize = 128;
/// How long the fault thread waits for the installs into one VM before it turns to the others. Their threads give
/// way to all others, and one may have been stopped for milliseconds in the middle of a page.
const LOCK_PATIENCE: Duration = Duration::from_micros(50);
/// Most faults of one VM that wait at once. Each is a sleeping thread of the VMM, of which there
/// are a few hundred at most; a VM that has more is not playing by the rules.
const MAX_PENDING: usize = 1 << 16;

static ZERO_UNIT: LazyLock<Vec<u8>> = LazyLock::new(|| vec![0; 2 << 20]);

/// What the kernel does to guest memory. The userfaultfd is one, the model's kernel the other.
pub(crate) trait Kernel {
    /// Installs `bytes` (whole guest pages) at `address` and wakes who waits for them.
    fn copy(&self, address: u64, bytes: &[u8]) -> Outcome;
    /// Installs zeros. Only for 4 KiB pages: the kernel has no huge zero page to give away.
    fn zero(&self, address: u64, bytes: u64) -> Outcome;
    /// Wakes threads that wait in a range.
    fn wake(&self, address: u64, bytes: u64) -> io::Result<()>;
}

/// What a unit is to be filled with.
#[derive(Clone, Copy)]
pub(crate) enum Content<'a> {
    Zero,
    /// Exactly one unit.
    Bytes(&'a [u8]),
}

/// What a new fault comes to.
#[derive(Clone, Copy, Debug)]
pub(crate) enum NewFault {
    /// It is to be served.
    Serve(PendingFault),
    /// Another thread waits for the same page; what wakes it wakes both.
    Waits,
    /// More than a VM has threads.
    TooMany,
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// The page is there and whoever waited is awake.
    Done,
    /// It waits among the others until it is tried again.
    Again,
    /// The VM is gone, or this address is.
    Gone,
    /// It cannot be served.
    Failed(&'static str, i32),
}

/// How far an install ahead came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ahead {
    /// Units that are there now because of it.
    pub(crate) installed: u64,
    /// Why not every wanted unit is; the last reason, if there were several.
    pub(crate) left: Option<Outcome>,
}

/// The memory of a VM in service.
pub(crate) struct GuestMemory<K> {
    pub(crate) layout: Layout,
    pub(crate) kernel: K,
    pages: RwLock<PageState>,
    pending: Mutex<Pending>,
}

impl<K: Kernel> GuestMemory<K> {
    pub(crate) fn new(layout: Layout, kernel: K) -> Self {
        let pages = RwLock::new(PageState::new(layout.file_units()));
        Self { layout, kernel, pages, pending: Mutex::default() }
    }

    /// Reads events with `read`, which says whether there may be more, and marks removals, as one step. Answers
    /// with the events and the units that were removed; with none, and nothing read, while pages are being
    /// installed: the events stay with the kernel, which says so again.
    pub(crate) fn read_events(
        &self,
        mut read: impl FnMut(&mut Vec<MemoryEvent>) -> io::Result<bool>,
    ) -> io::Result<(Vec<MemoryEvent>, u64)> {
        let (mut events, mut removed) = (Vec::new(), 0);
        let Some(mut pages) = self.pages.try_write_for(LOCK_PATIENCE) else {
            return Ok((events, removed));
        };
        while events.len() < EVENTS_AT_ONCE && read(&mut events)? {}
        for event in &events {
            if let MemoryEvent::Removed(start, end) = event {
                for (first, count) in self.layout.units_in(*start, *end) {
                    pages.mark_removed(first, count);
                    removed += count;
                }
            }
        }
        Ok((events, removed))
    }

    /// Whether a unit must be zeros from now on.
    pub(crate) fn is_removed(&self, unit: u64) -> bool {
        self.pages.read().is_removed(unit)
    }

    /// Whether a unit may be installed ahead of a fault.
    pub(crate) fn is_wanted(&self, unit: u64) -> bool {
        self.pages.read().is_wanted(unit)
    }

    /// A thread waits for a unit, which is zeros in the snapshot or not.
    pub(crate) fn fault(&self, unit: u64, zero: impl FnOnce() -> bool) -> NewFault {
        let class = match self.is_removed(unit) {
            true => FaultClass::Removed,
            false if zero() => FaultClass::Zero,
            false => FaultClass::Cached,
        };
        let pending = self.pending.lock();
        if pending.contains(unit) {
            return NewFault::Waits;
        }
        if pending.len() >= MAX_PENDING {
            return NewFault::TooMany;
        }
        NewFault::Serve(PendingFault { since: Instant::now(), class, retry: false })
    }

    /// A fault waits for bytes that are being fetched.
    pub(crate) fn await_bytes(&self, unit: u64, fault: PendingFault) {
        let fault = PendingFault { class: FaultClass::Fetched, retry: false, ..fault };
        self.pending.lock().insert(unit, fault);
    }

    /// The fault that waits for these bytes, which have come or never will; it waits no more.
    pub(crate) fn bytes_came(&self, unit: u64) -> Option<PendingFault> {
        self.pending.lock().remove(unit)
    }

    /// Takes out the faults that are to be tried again.
    pub(crate) fn take_retries(&self) -> Vec<(u64, PendingFault)> {
        self.pending.lock().take_retries()
    }

    /// When the oldest fault that waits came.
    pub(crate) fn oldest_fault(&self) -> Option<Instant> {
        self.pending.lock().oldest()
    }

    /// Fills the unit of a fault, with zeros if it was removed, and wakes whoever waits.
    pub(crate) fn serve(&self, unit: u64, fault: PendingFault, content: Content<'_>) -> Served {
        let pages = self.pages.read();
        let content = if pages.is_removed(unit) { Content::Zero } else { content };
        let Some((address, _)) = self.layout.address_of(unit) else { return Served::Gone };
        let page_bytes = self.layout.page_bytes();
        let outcome = match content {
            Content::Bytes(bytes) => self.kernel.copy(address, bytes),
            Content::Zero => self.zero(address, page_bytes),
        };
        match outcome {
            Outcome::Installed(_) => {
                pages.mark_installed(unit, 1);
                Served::Done
            }
            Outcome::AlreadyThere => {
                // Somebody was first. The thread may have gone to sleep after it woke the others.
                match self.kernel.wake(address, page_bytes) {
                    Ok(()) => Served::Done,
                    Err(_) => Served::Gone,
                }
            }
            Outcome::Again => {
                self.pending.lock().insert(unit, PendingFault { retry: true, ..fault });
                Served::Again
            }
            Outcome::Gone | Outcome::NotMapped => Served::Gone,
            Outcome::NoMemory => Served::Failed("no memory for a guest page", libc::ENOMEM),
            Outcome::Failed(errno) => Served::Failed("the kernel refused a page", errno),
        }
    }

    fn zero(&self, address: u64, bytes: u64) -> Outcome {
        if self.layout.page_bytes() == PAGE_SIZE as u64 {
            return self.kernel.zero(address, bytes);
        }
        self.kernel.copy(address, &ZERO_UNIT)
    }

    /// Installs neighbouring units ahead of any fault, leaving out what is there or was removed.
    /// `bytes` is `None` for zeros. Stops early when the VM is gone, the kernel keeps saying `Again`, or `pause`, which
    /// is called each time that it does, says so: then demand serves the rest.
    pub(crate) fn install_ahead(
        &self,
        first: u64,
        count: u64,
        bytes: Option<&[u8]>,
        mut pause: impl FnMut() -> bool,
    ) -> Ahead {
        let longest = self.longest_run(bytes.is_none());
        let (mut at, end) = (first, first + count);
        let mut ahead = Ahead { installed: 0, left: None };
        let (mut limit, mut tries) = (longest, 0);
        while at < end {
            let pages = self.pages.read();
            let Some((start, run)) = pages.wanted_run(at, end - at, limit) else { break };
            let Some((address, contiguous)) = self.layout.address_of(start) else {
                // A hole between regions: the memory file has pages that the VM has not.
                at = start + 1;
                continue;
            };
            let run = run.min(contiguous);
            match self.install_run(address, run, bytes, start - first) {
                Outcome::Installed(bytes) if bytes >= self.layout.page_bytes() => {
                    let units = bytes / self.layout.page_bytes();
                    pages.mark_installed(start, units);
                    ahead.installed += units;
                    (at, limit) = (start + units, longest);
                }
                Outcome::AlreadyThere => {
                    pages.mark_installed(start, 1);
                    at = start + 1;
                }
                // The kernel fills one mapping at a time, and a VMM may have split its memory
                // into several (by mlock, mprotect or advice): what is left of the border fits.
                Outcome::NotMapped if run > 1 => limit = run / 2,
                Outcome::NotMapped => {
                    ahead.left = Some(Outcome::NotMapped);
                    (at, limit) = (start + 1, longest);
                }
                Outcome::Again if tries < AGAIN_TRIES => {
                    drop(pages);
                    tries += 1;
                    if !pause() {
                        ahead.left = Some(Outcome::Again);
                        break;
                    }
                }
                other => {
                    ahead.left = Some(other);
                    break;
                }
            }
        }
        ahead
    }

    fn longest_run(&self, zeros: bool) -> u64 {
        match zeros {
            _ if self.layout.page_bytes() != PAGE_SIZE as u64 => 1,
            false => BATCH_PAGES,
            true => BATCH_ZERO_PAGES,
        }
    }

    fn install_run(&self, address: u64, run: u64, bytes: Option<&[u8]>, skipped: u64) -> Outcome {
        let unit_bytes = self.layout.page_bytes();
        let Some(bytes) = bytes else { return self.zero(address, run * unit_bytes) };
        let from = usize::try_from(skipped * unit_bytes).unwrap_or(usize::MAX);
        let length = usize::try_from(run * unit_bytes).unwrap_or(usize::MAX);
        match bytes.get(from..).and_then(|bytes| bytes.get(..length)) {
            Some(bytes) => self.kernel.copy(address, bytes),
            // Fewer bytes than units: our bug, and not the guest's.
            None => Outcome::Failed(libc::EINVAL),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Installs take until they are told to end.
    struct Slow {
        began: mpsc::Sender<()>,
        end: Mutex<mpsc::Receiver<()>>,
    }

    impl Kernel for Slow {
        fn copy(&self, _: u64, bytes: &[u8]) -> Outcome {
            self.began.send(()).expect("receiver");
            self.end.lock().recv().expect("sender");
            Outcome::Installed(bytes.len() as u64)
        }

        fn zero(&self, _: u64, bytes: u64) -> Outcome {
            Outcome::Installed(bytes)
        }

        fn wake(&self, _: u64, _: u64) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn events_wait_for_an_install_and_the_fault_thread_does_not() {
        let (began, installing) = mpsc::channel();
        let (end, told) = mpsc::channel();
        let page = PAGE_SIZE as u64;
        let layout = Layout::new([(page, 4 * page, 0)].into_iter(), page, 4 * page);
        let memory = GuestMemory::new(layout, Slow { began, end: Mutex::new(told) });
        let fault = |events: &mut Vec<MemoryEvent>| {
            events.push(MemoryEvent::Fault(0));
            Ok(false)
        };
        std::thread::scope(|scope| {
            let bytes = vec![1; PAGE_SIZE];
            let memory = &memory;
            scope.spawn(move || memory.install_ahead(0, 1, Some(&bytes), || true));
            installing.recv().expect("it began");
            let nothing = memory.read_events(|_| panic!("read during an install"));
            assert_eq!(nothing.expect("no error"), (Vec::new(), 0));
            end.send(()).expect("receiver");
        });
        let (events, _) = memory.read_events(fault).expect("read");
        assert_eq!(events, [MemoryEvent::Fault(0)]);
    }
}
