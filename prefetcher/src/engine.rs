//! The fault thread: waits for all VMs at once, and gives each its turn.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::epoll::EventFlags;
use userfaultfd::EventBuffer;

use crate::fault;
use crate::persist::persist;
use crate::poller::Poller;
use crate::recording::Recording;
use crate::report::{Cause, End};
use crate::vm::Vm;

/// How often deadlines and settling are looked at.
const TICK: Duration = Duration::from_millis(50);
/// After the kernel said `Again`, a fault is tried again this much later, unless an event comes.
const RETRY: Duration = Duration::from_millis(1);

/// What an epoll event of a VM is about. VM ids are never reused, descriptors are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Watched {
    Faults,
    Process,
}

impl Watched {
    fn key(self, id: u64) -> u64 {
        id << 1 | u64::from(self == Self::Process)
    }

    fn of_key(key: u64) -> (u64, Self) {
        (key >> 1, if key & 1 == 1 { Self::Process } else { Self::Faults })
    }
}

/// Shared by the fault thread and whoever adds VMs.
pub(crate) struct Engine {
    poller: Poller,
    vms: Mutex<HashMap<u64, Arc<Vm>>>,
    retries: Mutex<Vec<u64>>,
    stopping: AtomicBool,
    fault_deadline: Duration,
    settle: Duration,
}

impl Engine {
    pub(crate) fn new(fault_deadline: Duration, settle: Duration) -> std::io::Result<Self> {
        Ok(Self {
            poller: Poller::new()?,
            vms: Mutex::default(),
            retries: Mutex::default(),
            stopping: AtomicBool::new(false),
            fault_deadline,
            settle,
        })
    }

    /// Takes a VM into service.
    pub(crate) fn add(&self, vm: &Arc<Vm>) -> std::io::Result<()> {
        let id = vm.restore.id;
        self.vms.lock().insert(id, vm.clone());
        let watched =
            [(vm.memory.kernel.as_fd(), Watched::Faults), (vm.vmm.as_fd(), Watched::Process)];
        for (fd, what) in watched {
            self.poller.watch(fd, what.key(id))?;
        }
        self.poller.wake_up();
        Ok(())
    }

    pub(crate) fn vms(&self) -> Vec<Arc<Vm>> {
        self.vms.lock().values().cloned().collect()
    }

    /// How long the fault that waits longest has waited.
    pub(crate) fn oldest_fault(&self) -> Option<Duration> {
        self.vms().iter().filter_map(|vm| Some(vm.memory.oldest_fault()?.elapsed())).max()
    }

    pub(crate) fn vm_count(&self) -> usize {
        self.vms.lock().len()
    }

    /// The kernel said `Again` to a fault of this VM.
    pub(crate) fn retry_soon(&self, id: u64) {
        self.retries.lock().push(id);
        self.poller.wake_up();
    }

    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.poller.wake_up();
    }

    /// The fault thread.
    pub(crate) fn run(self: &Arc<Self>) {
        if let Err(error) = reap_store::take_short_turns() {
            tracing::warn!("the fault thread may wait for its turn: {error}");
        }
        persist(
            "faults",
            || self.serve(),
            || {
                // Events may have been read and lost; nobody may wait for them for ever.
                for vm in self.vms() {
                    vm.kill(Cause::Bug, "the fault thread panicked; this is a bug");
                }
            },
        );
    }

    fn serve(self: &Arc<Self>) {
        let mut buffer = EventBuffer::new(64);
        let mut last_tick = Instant::now();
        let mut last_retry = Instant::now();
        while !self.stopping.load(Ordering::Acquire) {
            for (key, flags) in self.wait() {
                let (id, what) = Watched::of_key(key);
                let found = self.vms.lock().get(&id).cloned();
                if let Some(vm) = found {
                    vm.guarded(|| self.turn(&vm, what, flags, &mut buffer));
                }
            }
            // A fault that the kernel refuses again asks for another retry at once: only the time
            // between them keeps this thread from spinning.
            if last_retry.elapsed() >= RETRY {
                last_retry = Instant::now();
                self.retry_all();
            }
            if last_tick.elapsed() >= TICK {
                last_tick = Instant::now();
                for vm in self.vms() {
                    vm.guarded(|| self.tick(&vm));
                }
            }
        }
    }

    fn retry_all(self: &Arc<Self>) {
        let retries = std::mem::take(&mut *self.retries.lock());
        for id in retries {
            let found = self.vms.lock().get(&id).cloned();
            if let Some(vm) = found {
                vm.guarded(|| fault::retry(self, &vm));
            }
        }
    }

    fn wait(&self) -> Vec<(u64, EventFlags)> {
        // Bound first, so that no lock is held while this thread waits.
        let retrying = !self.retries.lock().is_empty();
        let idle = self.vms.lock().is_empty();
        self.poller.wait(match (retrying, idle) {
            (true, _) => Some(RETRY),
            (false, false) => Some(TICK),
            (false, true) => None,
        })
    }

    fn turn(
        self: &Arc<Self>,
        vm: &Arc<Vm>,
        what: Watched,
        flags: EventFlags,
        buffer: &mut EventBuffer,
    ) {
        if what == Watched::Process {
            self.process_ended(vm);
            return;
        }
        match vm.read_events(buffer) {
            Ok(events) if !vm.restore.has_ended() => fault::handle_events(self, vm, &events),
            Ok(_) => {}
            Err(error) => {
                vm.kill(Cause::Kernel, &format!("its userfaultfd cannot be read: {error}"));
                self.forget_faults(vm);
            }
        }
        if flags.intersects(EventFlags::ERR | EventFlags::HUP) {
            vm.kill(Cause::Kernel, "its userfaultfd failed");
            self.forget_faults(vm);
        }
    }

    /// Stops watching a descriptor that would be ready for ever.
    fn forget_faults(&self, vm: &Vm) {
        self.poller.forget(&vm.memory.kernel);
    }

    fn process_ended(&self, vm: &Arc<Vm>) {
        self.poller.forget(&vm.vmm);
        if vm.has_memory() {
            // Somebody connected for the VMM, or an install of ours holds the memory of a process that
            // is gone: serve on, and look at every tick whether the memory is there still.
            tracing::info!("restore {}: the peer ended, its memory lives on", vm.restore.id);
            vm.outlived.store(true, Ordering::Relaxed);
            return;
        }
        self.remove(vm);
    }

    fn remove(&self, vm: &Arc<Vm>) {
        let id = vm.restore.id;
        vm.restore.finish(End::VmmEnded);
        self.forget_faults(vm);
        self.vms.lock().remove(&id);
        // One that we ended shows what it touched, not what it would have.
        match vm.restore.was_killed() {
            true => drop(vm.recording.lock().take()),
            false => finish_recording(vm),
        }
        vm.restore.log_end();
    }

    fn tick(&self, vm: &Arc<Vm>) {
        let ending = vm.restore.has_ended() || vm.outlived.load(Ordering::Relaxed);
        if ending && !vm.has_memory() {
            self.remove(vm);
        }
        if vm.restore.has_ended() {
            return;
        }
        let oldest = vm.memory.oldest_fault();
        if oldest.is_some_and(|since| since.elapsed() > self.fault_deadline) {
            let seconds = self.fault_deadline.as_secs_f32();
            vm.kill(Cause::Deadline, &format!("a fault could not be served for {seconds} s"));
        }
        let settled = vm
            .recording
            .lock()
            .as_ref()
            .is_some_and(|recording| recording.has_settled(self.settle));
        if settled {
            finish_recording(vm);
        }
    }

    /// Lets a VM go that needs us no more: what is still missing in its memory was removed, and is
    /// zeros by the kernel's own doing from now on.
    pub(crate) fn release(&self, vm: &Arc<Vm>) {
        self.forget_faults(vm);
        for region in vm.layout().regions() {
            // Refused where the VMM has unmapped its memory: then nobody waits there.
            if let Err(error) = vm.memory.kernel.unregister(region.start, region.bytes) {
                tracing::debug!("restore {}: unregister: {error}", vm.restore.id);
            }
        }
        vm.restore.finish(End::HandedOver);
        self.vms.lock().remove(&vm.restore.id);
        drop(vm.recording.lock().take());
        vm.restore.log_end();
    }
}

/// Ends a recording, if there is one, and hands it over.
pub(crate) fn finish_recording(vm: &Vm) {
    let recording: Option<Recording> = vm.recording.lock().take();
    if let Some(recording) = recording {
        vm.restore.settle();
        recording.finish(&vm.snapshot);
    }
}
