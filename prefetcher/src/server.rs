//! What `reapd` uses: sockets to bind, restores to look at, and a stop that leaves no VM behind.

use std::collections::HashMap;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reap_store::{FileKind, Snapshot, WorkingSet};

use crate::accept::{Acceptor, Arrival, Bound};
use crate::engine::{Engine, finish_recording};
use crate::handshake::HandshakeError;
use crate::history::{History, Totals};
use crate::memory::GuestMemory;
use crate::recording::{OnRecorded, Recording};
use crate::report::{Cause, Restore, RestoreReport, SAMPLE};
use crate::timeline::Timeline;
use crate::uffd::Uffd;
use crate::vm::Vm;
use crate::vmm::Vmm;
use crate::{fault, hand_over, plan, prefetch};

/// VMs that are given all their memory at the same time when the server stops.
const HAND_OVERS_AT_ONCE: usize = 4;
/// Longest path of a Unix socket.
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Why a server or a socket cannot be.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another process listens there.
    #[error("{0}: another process listens here")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0}: there is something that is not a socket: move it away")]
    NotASocket(PathBuf),
    /// The path cannot be a socket's.
    #[error(
        "{0}: a socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes: choose a shorter run directory"
    )]
    TooLong(PathBuf),
    /// The snapshot has no memory file.
    #[error("snapshot {0} has no memory file")]
    NoMemory(reap_store::SnapshotId),
    /// The kernel refused.
    #[error("{0}: {1}")]
    System(PathBuf, std::io::Error),
}

/// How a restore is served.
pub enum Mode {
    /// Faults only.
    Demand,
    /// Faults only, and the first touches go to the callback once they stop coming. It runs on the
    /// fault thread and must not wait.
    Record(OnRecorded),
    /// The same with a working set whose frames are brought into memory, so that faults are cheap;
    /// nothing is installed, so that all touches are seen.
    Sample(Arc<WorkingSet>, OnRecorded),
    /// The working set is installed ahead, the rest on demand.
    Prefetch(Arc<WorkingSet>),
    /// The same, and what had to be faulted in all the same goes to the callback.
    Learn(Arc<WorkingSet>, OnRecorded),
}

impl Mode {
    fn name(&self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Record(_) => "record",
            Self::Sample(..) => SAMPLE,
            Self::Prefetch(_) | Self::Learn(..) => "prefetch",
        }
    }
}

/// How a server is set up.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Permissions of the sockets.
    pub socket_mode: u32,
    /// Owner of the sockets; besides root, only this user's VMMs are served. `None`: our own user.
    pub socket_uid: Option<u32>,
    /// A fault that cannot be served for this long ends its VM.
    pub fault_deadline: Duration,
    /// A recording ends when nothing new was touched for this long.
    pub settle: Duration,
    /// Most VMs in service at once.
    pub max_vms: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            socket_mode: 0o600,
            socket_uid: None,
            fault_deadline: Duration::from_secs(60),
            settle: Duration::from_secs(2),
            max_vms: 4096,
        }
    }
}

/// Serves guest memory by userfaultfd on two threads, whatever the number of VMs.
pub struct Server {
    shared: Arc<Shared>,
    threads: Mutex<Option<Threads>>,
}

struct Threads {
    faults: JoinHandle<()>,
    accept: JoinHandle<()>,
}

struct Shared {
    config: ServerConfig,
    engine: Arc<Engine>,
    acceptor: Acceptor,
    sockets: Mutex<HashMap<PathBuf, u64>>,
    next_restore: AtomicU64,
    history: Mutex<History>,
}

impl Server {
    /// Starts the threads.
    pub fn start(config: ServerConfig) -> Result<Self, ServerError> {
        let system = |error| ServerError::System(PathBuf::from("starting threads"), error);
        let engine = Engine::new(config.fault_deadline, config.settle).map_err(system)?;
        let shared = Arc::new(Shared {
            config,
            engine: Arc::new(engine),
            acceptor: Acceptor::new().map_err(system)?,
            sockets: Mutex::default(),
            next_restore: AtomicU64::new(0),
            history: Mutex::default(),
        });
        let (engine, accepting) = (shared.engine.clone(), shared.clone());
        let faults = std::thread::Builder::new().name("faults".into());
        let accept = std::thread::Builder::new().name("accept".into());
        let threads = Threads {
            faults: faults.spawn(move || engine.run()).map_err(system)?,
            accept: accept.spawn(move || accepting.acceptor.run()).map_err(system)?,
        };
        Ok(Self { shared, threads: Mutex::new(Some(threads)) })
    }

    /// Listens on a Unix socket at `path`, and serves each VM that connects from `snapshot`;
    /// `choose` says how. It is called on the accept thread and must not wait. A stale socket of an earlier process is
    /// replaced.
    pub fn bind(
        &self,
        path: &Path,
        snapshot: Arc<Snapshot>,
        choose: impl Fn() -> Mode + Send + Sync + 'static,
    ) -> Result<(), ServerError> {
        let is_memory = |file: &reap_store::File| file.kind == FileKind::Memory;
        let file = snapshot.files().iter().position(is_memory);
        let file = file.ok_or(ServerError::NoMemory(snapshot.id()))?;
        let memory_bytes = snapshot.files()[file].size;
        let listener = listen(path, &self.shared.config)?;
        // The acceptor is part of `shared`: a strong reference would keep both for ever.
        let shared = Arc::downgrade(&self.shared);
        let on_arrival = move |arrival| match shared.upgrade() {
            Some(shared) => shared.take_in(arrival, &snapshot, file, choose()),
            None => Err(HandshakeError::Rule("the daemon stops".into())),
        };
        let name = path.display().to_string();
        let bound = Bound { listener, memory_bytes, on_arrival: Box::new(on_arrival), name };
        let system = |error| ServerError::System(path.to_owned(), error);
        let key = self.shared.acceptor.add(bound).map_err(system)?;
        if let Some(former) = self.shared.sockets.lock().insert(path.to_owned(), key) {
            self.shared.acceptor.remove(former);
        }
        Ok(())
    }

    /// Stops listening and takes the socket away. VMs that are served go on.
    pub fn unbind(&self, path: &Path) {
        if let Some(key) = self.shared.sockets.lock().remove(path) {
            self.shared.acceptor.remove(key);
            remove_socket(path);
        }
    }

    /// All restores in service, and the last that ended; oldest first.
    pub fn restores(&self) -> Vec<RestoreReport> {
        self.shared.history.lock().restores().map(|restore| restore.report()).collect()
    }

    /// What all restores since the start come to.
    pub fn totals(&self) -> Totals {
        let oldest_fault = self.shared.engine.oldest_fault();
        Totals { oldest_fault, ..self.shared.history.lock().totals() }
    }

    /// What a restore did when, and what it did in all.
    pub fn timeline(&self, id: u64) -> Option<(RestoreReport, Timeline)> {
        let history = self.shared.history.lock();
        let restore = history.restores().find(|restore| restore.id == id)?;
        Some((restore.report(), restore.timeline.timeline()))
    }

    /// Ends the recording of a restore now; whether there was one.
    pub fn settle(&self, id: u64) -> bool {
        let vms = self.shared.engine.vms();
        let Some(vm) = vms.iter().find(|vm| vm.restore.id == id) else { return false };
        let recording = vm.recording.lock().is_some();
        finish_recording(vm);
        recording
    }

    /// Stops. Each VM in service gets the rest of its memory, so that it can go on alone; one that
    /// cannot have it by the deadline is ended, with the reason in the log: when the last handler
    /// of a userfaultfd goes, waiting threads would read zeros. Answers with how many were handed
    /// over, and how many ended.
    pub fn stop(&self, deadline: Duration) -> (usize, usize) {
        let paths: Vec<_> = self.shared.sockets.lock().keys().cloned().collect();
        for path in paths {
            self.unbind(&path);
        }
        let Some(threads) = self.threads.lock().take() else { return (0, 0) };
        // To its end: a VM that is taken in after the others were listed would read zeros.
        self.shared.acceptor.stop();
        threads.accept.join().unwrap_or_default();
        let by = Instant::now() + deadline;
        let queue = Mutex::new(self.shared.engine.vms());
        let (handed_over, ended) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..HAND_OVERS_AT_ONCE {
                scope.spawn(|| {
                    loop {
                        // Not in the condition of a `while`: the lock would be held in its body.
                        let Some(vm) = queue.lock().pop() else { return };
                        let good = self.shared.hand_over(&vm, by);
                        if good { &handed_over } else { &ended }.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        self.shared.engine.stop();
        threads.faults.join().unwrap_or_default();
        let count =
            |counter: AtomicU64| usize::try_from(counter.into_inner()).unwrap_or(usize::MAX);
        (count(handed_over), count(ended))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
    }
}

impl Shared {
    /// A VM has shaken hands: checks who it is, and serves it.
    fn take_in(
        &self,
        arrival: Arrival,
        snapshot: &Arc<Snapshot>,
        file: usize,
        mode: Mode,
    ) -> Result<(), HandshakeError> {
        let socket_error = |error: std::io::Error| HandshakeError::Socket(error.to_string());
        let Arrival { layout, uffd, socket } = arrival;
        let vmm = Vmm::of_peer(&socket).map_err(socket_error)?;
        let own = rustix::process::getuid().as_raw();
        let allowed = self.config.socket_uid.unwrap_or(own);
        if vmm.uid() != 0 && vmm.uid() != allowed {
            let text = format!("the VMM runs as user {}, not {allowed}", vmm.uid());
            return Err(HandshakeError::Rule(text));
        }
        if self.engine.vm_count() >= self.config.max_vms {
            let text = format!("{} VMs are served already", self.config.max_vms);
            return Err(HandshakeError::Rule(text));
        }
        let uffd = Uffd::new(uffd).map_err(socket_error)?;
        let id = self.next_restore.fetch_add(1, Ordering::Relaxed) + 1;
        let restore = Arc::new(Restore::new(id, snapshot.id(), vmm.pid(), mode.name()));
        tracing::info!(
            "restore {id}: VMM {} from {} in mode {}",
            vmm.pid(),
            snapshot.id(),
            mode.name()
        );
        let units = layout.file_units();
        let install = matches!(mode, Mode::Prefetch(_) | Mode::Learn(..));
        let (done, set) = match mode {
            Mode::Demand => (None, None),
            Mode::Record(done) => (Some(done), None),
            Mode::Prefetch(set) => (None, Some(set)),
            Mode::Sample(set, done) | Mode::Learn(set, done) => (Some(done), Some(set)),
        };
        let recording = done.map(|done| Recording::new(snapshot, file, restore.began, done));
        if let Some(set) = &set {
            plan::note(&restore, set, file);
        }
        self.history.lock().remember(restore.clone());
        let per_unit = layout.pages_per_unit();
        let planned = set.as_ref().map(|set| prefetch::planned_units(set, file, per_unit, units));
        let vm = Arc::new(Vm {
            restore,
            snapshot: snapshot.clone(),
            file,
            memory: GuestMemory::new(layout, uffd),
            vmm,
            outlived: AtomicBool::new(false),
            _socket: socket,
            recording: Mutex::new(recording),
            planned,
            set: set.clone(),
            installs: install,
        });
        if let Err(error) = self.engine.add(&vm) {
            vm.kill(Cause::Kernel, &format!("it cannot be watched: {error}"));
            return Err(socket_error(error));
        }
        match set {
            Some(set) if install => prefetch::start(&vm, &set),
            Some(set) => plan::warm(snapshot, &set, file),
            None => {}
        }
        Ok(())
    }

    /// Gives a VM all its memory and lets it go; `false` if it had to be ended.
    fn hand_over(&self, vm: &Arc<Vm>, deadline: Instant) -> bool {
        let outcome = hand_over::populate(vm, deadline);
        if outcome.is_ok() && !vm.restore.has_ended() {
            fault::retry(&self.engine, vm);
            self.engine.release(vm);
        }
        if vm.restore.has_ended() && outcome.is_err() {
            return true;
        }
        if let Err(why) = &outcome {
            vm.kill(Cause::Stop, &format!("the daemon stops and {why}"));
            wait_for_end(vm);
        }
        outcome.is_ok()
    }
}

/// Our descriptor must not be closed before the killed process has ended.
fn wait_for_end(vm: &Vm) {
    let mut fds = [rustix::event::PollFd::new(&vm.vmm, rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
    if let Err(error) = rustix::event::poll(&mut fds, Some(&timeout)) {
        tracing::warn!("restore {}: {error}", vm.restore.id);
    }
}

fn listen(path: &Path, config: &ServerConfig) -> Result<UnixListener, ServerError> {
    let system = |error| ServerError::System(path.to_owned(), error);
    if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        return Err(ServerError::TooLong(path.to_owned()));
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(system(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ServerError::NotASocket(path.to_owned()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return Err(ServerError::InUse(path.to_owned())),
            Err(_) => std::fs::remove_file(path).map_err(system)?,
        },
    }
    let listener = UnixListener::bind(path).map_err(system)?;
    let mode = std::os::unix::fs::PermissionsExt::from_mode(config.socket_mode);
    std::fs::set_permissions(path, mode).map_err(system)?;
    if let Some(uid) = config.socket_uid {
        std::os::unix::fs::chown(path, Some(uid), None).map_err(system)?;
    }
    Ok(listener)
}

fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("{}: {error}", path.display());
    }
}
