//! Prepared snapshots: opened and pinned, with a socket, a mode and perhaps a working set.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use reap_prefetcher::{Mode, RestoreReport, Server};
use reap_store::pack::{differences, host_facts};
use reap_store::{
    Error, FileKind, Name, Node, Snapshot, SnapshotId, Touch, WorkingSet, WorkingSetContent,
};
use serde::{Deserialize, Serialize};

/// How restores of a prepared snapshot are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PrepareMode {
    /// Record a working set if there is none, else prefetch it.
    #[default]
    Auto,
    /// Record a new one.
    Record,
    /// There must be one.
    Prefetch,
    /// Neither.
    Demand,
}

/// A prepared snapshot, as the API shows it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Description {
    name: Name,
    id: SnapshotId,
    mode: PrepareMode,
    /// Sequence of the working set that the next restore gets.
    working_set: Option<u64>,
    uffd: PathBuf,
    memory: Option<PathBuf>,
    state: Option<PathBuf>,
    disks: BTreeMap<String, PathBuf>,
    /// What differs between this machine and the one that the snapshot was made on.
    warnings: Vec<String>,
}

/// A prepared snapshot.
struct Prepared {
    name: Name,
    snapshot: Arc<Snapshot>,
    mode: PrepareMode,
    socket: PathBuf,
    working_set: Mutex<Option<Arc<WorkingSet>>>,
    /// One recording of a snapshot at a time is enough; others are served on demand.
    recording: AtomicBool,
}

/// All that a running daemon has.
pub(super) struct Daemon {
    pub(super) node: Node,
    pub(super) server: Server,
    pub(super) mount: PathBuf,
    sockets: PathBuf,
    prepared: Mutex<BTreeMap<Name, Arc<Prepared>>>,
    /// One change at a time, so that a socket and its snapshot belong together.
    change: tokio::sync::Mutex<()>,
}

impl Daemon {
    pub(super) fn new(node: Node, server: Server, mount: PathBuf, sockets: PathBuf) -> Self {
        let (prepared, change) = (Mutex::default(), tokio::sync::Mutex::default());
        Self { node, server, mount, sockets, prepared, change }
    }

    /// Opens a snapshot, finds its working set, and listens for VMMs. Preparing a name again takes
    /// up its newest snapshot and working set; VMs that run are not touched.
    pub(super) async fn prepare(
        self: &Arc<Self>,
        name: Name,
        mode: PrepareMode,
    ) -> Result<Description, Error> {
        let _one_change = self.change.lock().await;
        let snapshot = self.node.open_name(&name).await?;
        let working_set = match mode {
            PrepareMode::Auto | PrepareMode::Prefetch => self.node.working_set(&snapshot).await?,
            PrepareMode::Record | PrepareMode::Demand => None,
        };
        if mode == PrepareMode::Prefetch && working_set.is_none() {
            let text = "there is no usable working set: prepare it with mode auto or record first";
            return Err(Error::refused(&name, text));
        }
        let socket = self.sockets.join(format!("{name}.sock"));
        let prepared = Arc::new(Prepared {
            name: name.clone(),
            snapshot: snapshot.clone(),
            mode,
            socket: socket.clone(),
            working_set: Mutex::new(working_set),
            recording: AtomicBool::new(false),
        });
        if let Some(former) = self.prepared.lock().remove(&name) {
            self.server.unbind(&former.socket);
        }
        let (daemon, chosen) = (Arc::downgrade(self), Arc::downgrade(&prepared));
        let choose = move || match (daemon.upgrade(), chosen.upgrade()) {
            (Some(daemon), Some(prepared)) => daemon.choose(&prepared),
            _ => Mode::Demand,
        };
        self.server
            .bind(&socket, snapshot, choose)
            .map_err(|error| Error::refused(&name, error))?;
        let description = self.describe(&prepared);
        self.prepared.lock().insert(name, prepared);
        Ok(description)
    }

    /// How the next VM of a prepared snapshot is served.
    fn choose(self: &Arc<Self>, prepared: &Arc<Prepared>) -> Mode {
        let set = prepared.working_set.lock().clone();
        match (prepared.mode, set) {
            (PrepareMode::Demand, _) => Mode::Demand,
            (PrepareMode::Auto | PrepareMode::Prefetch, Some(set)) => Mode::Prefetch(set),
            // Without a set only a damaged store leaves this mode; then demand is right, if slow.
            (PrepareMode::Prefetch, None) => Mode::Demand,
            (PrepareMode::Auto | PrepareMode::Record, _) => {
                if prepared.recording.swap(true, Ordering::AcqRel) {
                    return Mode::Demand;
                }
                let (daemon, recorded) = (self.clone(), prepared.clone());
                Mode::Record(Box::new(move |touches| {
                    let node = daemon.node.clone();
                    node.spawn(async move { daemon.publish(&recorded, &touches).await });
                }))
            }
        }
    }

    /// Publishes a recording; restores from now on use it.
    async fn publish(&self, prepared: &Prepared, touches: &[Touch]) {
        let snapshot = &prepared.snapshot;
        let content = WorkingSetContent::of_recording(touches);
        let published = match self.node.publish_working_set(snapshot, &content).await {
            Ok(_) => self.node.working_set(snapshot).await,
            Err(error) => Err(error),
        };
        match published {
            Ok(Some(set)) => {
                let (sequence, pages) = (set.sequence(), set.data_pages());
                tracing::info!("{}: working set {sequence}: {pages} pages", prepared.name);
                *prepared.working_set.lock() = Some(set);
            }
            Ok(None) => tracing::warn!("{}: the working set cannot be read back", prepared.name),
            Err(error) => tracing::warn!("{}: no working set: {error}", prepared.name),
        }
        prepared.recording.store(false, Ordering::Release);
    }

    /// Stops listening for a name; whether it was prepared.
    pub(super) async fn release(&self, name: &Name) -> bool {
        let _one_change = self.change.lock().await;
        let Some(prepared) = self.prepared.lock().remove(name) else { return false };
        self.server.unbind(&prepared.socket);
        true
    }

    pub(super) fn snapshots(&self) -> Vec<Description> {
        let prepared: Vec<_> = self.prepared.lock().values().cloned().collect();
        prepared.iter().map(|prepared| self.describe(prepared)).collect()
    }

    pub(super) fn restores(&self) -> Vec<RestoreReport> {
        self.server.restores()
    }

    fn describe(&self, prepared: &Prepared) -> Description {
        let snapshot = &prepared.snapshot;
        // By id: the paths stay those of this snapshot when the name moves.
        let directory = self.mount.join("by-id").join(snapshot.id().to_string());
        let path_of = |kind: FileKind| {
            let file = snapshot.files().iter().find(|file| file.kind == kind)?;
            Some(directory.join(&file.name))
        };
        let disks = snapshot.files().iter().filter(|file| file.kind == FileKind::Disk);
        Description {
            name: prepared.name.clone(),
            id: snapshot.id(),
            mode: prepared.mode,
            working_set: prepared.working_set.lock().as_ref().map(|set| set.sequence()),
            uffd: prepared.socket.clone(),
            memory: path_of(FileKind::Memory),
            state: path_of(FileKind::State),
            disks: disks.map(|disk| (disk.name.clone(), directory.join(&disk.name))).collect(),
            warnings: differences(&snapshot.facts().host, &host_facts()),
        }
    }
}
