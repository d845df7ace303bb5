//! Prepared snapshots: opened and pinned, with a socket, a mode and perhaps a working set.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use reap_fs::Mount;
use reap_prefetcher::{Mode, RestoreReport, Server, Timeline};
use reap_store::pack::{differences, host_facts};
use reap_store::{Error, FileKind, Name, Node, PlainCopy, Profile, Snapshot, SnapshotId};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::kept::KeptFrames;
use super::learner::{Learner, Learning, Subject};

/// How restores of a prepared snapshot are served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum PrepareMode {
    /// Record a working set if there is none, else prefetch it and go on learning.
    #[default]
    Auto,
    /// Record a new one in its place.
    Record,
    /// There must be one; it is used as it is.
    Prefetch,
    /// Neither.
    Demand,
}

/// What a prepare call asks for.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Wanted {
    pub(super) mode: PrepareMode,
    /// All of it in the node's cache.
    pub(super) warm: bool,
    /// A plain copy of its memory, which the mount hands reads on to.
    pub(super) plain_copy: bool,
}

/// A prepared snapshot, as the API shows it.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Description {
    name: Name,
    /// Empty for the usual one.
    profile: String,
    id: SnapshotId,
    mode: PrepareMode,
    /// Sequence of the working set that the next restore gets.
    working_set: Option<u64>,
    learning: Learning,
    uffd: PathBuf,
    memory: Option<PathBuf>,
    /// Bytes of the memory's plain copy, if there is one.
    plain_copy_bytes: Option<u64>,
    state: Option<PathBuf>,
    disks: BTreeMap<String, PathBuf>,
    /// What differs between this machine and the one that the snapshot was made on, and what the cache
    /// has no room to keep.
    warnings: Vec<String>,
}

/// A prepared snapshot.
struct Prepared {
    name: Name,
    snapshot: Arc<Snapshot>,
    profile: Profile,
    mode: PrepareMode,
    socket: PathBuf,
    learner: Arc<Learner>,
    plain_copy: Option<Arc<PlainCopy>>,
}

/// A snapshot in one of its uses.
pub(super) type Use = (Name, Profile);

impl Prepared {
    /// How the next VM is served.
    fn choose(&self) -> Mode {
        match self.mode {
            PrepareMode::Demand => Mode::Demand,
            PrepareMode::Auto => self.learner.next(),
            PrepareMode::Record => self.learner.record(),
            PrepareMode::Prefetch => self.learner.set().map_or(Mode::Demand, Mode::Prefetch),
        }
    }
}

/// All that a running daemon has.
pub(super) struct Daemon {
    pub(super) node: Node,
    pub(super) server: Server,
    mount: PathBuf,
    /// Whether the mount hands reads on to plain copies.
    passes_through: bool,
    sockets: PathBuf,
    /// Most bytes of a working set's pages.
    working_set_bytes: u64,
    prepared: Mutex<BTreeMap<Use, Arc<Prepared>>>,
    /// One change at a time, so that a socket and its snapshot belong together.
    change: tokio::sync::Mutex<()>,
}

impl Daemon {
    pub(super) fn new(
        node: Node,
        server: Server,
        mount: &Mount,
        sockets: PathBuf,
        working_set_bytes: u64,
    ) -> Self {
        Self {
            node,
            server,
            mount: mount.path().to_owned(),
            passes_through: mount.passes_through(),
            sockets,
            working_set_bytes,
            prepared: Mutex::default(),
            change: tokio::sync::Mutex::default(),
        }
    }

    /// Opens a snapshot, finds its working set, and listens for VMMs. Preparing a name and profile again
    /// takes up its newest snapshot and working set; VMs that run are not touched.
    pub(super) async fn prepare(
        self: &Arc<Self>,
        (name, profile): Use,
        Wanted { mode, warm, plain_copy }: Wanted,
    ) -> Result<Description, Error> {
        let _one_change = self.change.lock().await;
        let (snapshot, set) = match mode {
            PrepareMode::Demand => (self.node.open_name(&name).await?, None),
            PrepareMode::Record => {
                let snapshot = self.node.open_name(&name).await?;
                let set = self.node.working_set_of(&snapshot, &profile).await?;
                (snapshot, set)
            }
            PrepareMode::Auto | PrepareMode::Prefetch => {
                self.node.open_with_working_set(&name, &profile).await?
            }
        };
        if mode == PrepareMode::Prefetch && set.is_none() {
            let text = "there is no usable working set: prepare it with mode auto or record first";
            return Err(Error::refused(&name, text));
        }
        let kept = match warm {
            true => KeptFrames::warm(&name, &snapshot).await?,
            false => KeptFrames::default(),
        };
        let plain_copy = match plain_copy {
            true => Some(self.copy_memory(&name, &snapshot).await?),
            false => None,
        };
        // A name has no comma.
        let both = match profile.as_str() {
            "" => name.to_string(),
            profile => format!("{name},{profile}"),
        };
        let socket = self.sockets.join(format!("{both}.sock"));
        let subject = Subject {
            snapshot: snapshot.clone(),
            profile: profile.clone(),
            name: both,
            limit_bytes: self.working_set_bytes,
            kept,
        };
        let learner = Learner::new(self.node.clone(), subject, set, mode == PrepareMode::Record);
        let prepared = Arc::new(Prepared {
            name: name.clone(),
            snapshot: snapshot.clone(),
            profile: profile.clone(),
            mode,
            socket: socket.clone(),
            learner: Arc::new(learner),
            plain_copy,
        });
        let key = (name, profile);
        if let Some(former) = self.prepared.lock().remove(&key) {
            self.server.unbind(&former.socket);
        }
        let chosen = Arc::downgrade(&prepared);
        let choose = move || chosen.upgrade().map_or(Mode::Demand, |prepared| prepared.choose());
        self.server
            .bind(&socket, snapshot, choose)
            .map_err(|error| Error::refused(&key.0, error))?;
        let description = self.describe(&prepared);
        self.prepared.lock().insert(key, prepared);
        Ok(description)
    }

    async fn copy_memory(
        &self,
        name: &Name,
        snapshot: &Arc<Snapshot>,
    ) -> Result<Arc<PlainCopy>, Error> {
        if !self.passes_through {
            let text = "a plain copy would not be read: the kernel hands reads on from Linux 6.9, to root only";
            return Err(Error::refused(name, text));
        }
        let memory = snapshot.files().iter().position(|file| file.kind == FileKind::Memory);
        let memory = memory.ok_or_else(|| Error::refused(name, "it has no memory to copy"))?;
        let copy = self.node.plain_copy(snapshot, memory).await?;
        tracing::info!("{name} has a plain copy of its memory: {} bytes", copy.bytes());
        Ok(copy)
    }

    /// Stops listening for a name and profile; whether it was prepared.
    pub(super) async fn release(&self, key: &Use) -> bool {
        let _one_change = self.change.lock().await;
        let Some(prepared) = self.prepared.lock().remove(key) else { return false };
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

    /// How the store is reached, and what was asked of it since the daemon started.
    pub(super) fn store(&self) -> Value {
        json!({ "connection": self.node.connection(), "fetch": self.node.counters() })
    }

    /// What restore `id` did when.
    pub(super) fn timeline(&self, id: u64) -> Option<(RestoreReport, Timeline)> {
        self.server.timeline(id)
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
        let mut warnings = differences(&snapshot.facts().host, &host_facts());
        warnings.extend(prepared.learner.kept().warning());
        Description {
            name: prepared.name.clone(),
            profile: prepared.profile.to_string(),
            id: snapshot.id(),
            mode: prepared.mode,
            working_set: prepared.learner.set().map(|set| set.sequence()),
            learning: prepared.learner.progress(),
            uffd: prepared.socket.clone(),
            memory: path_of(FileKind::Memory),
            plain_copy_bytes: prepared.plain_copy.as_ref().map(|copy| copy.bytes()),
            state: path_of(FileKind::State),
            disks: disks.map(|disk| (disk.name.clone(), directory.join(&disk.name))).collect(),
            warnings,
        }
    }
}
