//! A node: one process that reads a store. Owns the I/O runtime, the decode threads and the cache.

mod learn;
mod pin;
mod reader;

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Runtime;

use crate::fetch::disk::{DiskCache, Limits, lock_for_one};
use crate::fetch::{Ahead, CacheStatus, FetchCounters, Fetcher, PrefetchStatus};
use crate::format::keys;
use crate::format::manifest::Manifest;
use crate::format::record::Commit;
use crate::objects::Connection;
use crate::plain::PlainCopies;
use crate::store::{ListedWorkingSet, Store};
use crate::workers::Workers;
use crate::{
    Error, ErrorKind, Name, PlainCopiesStatus, PlainCopy, Profile, Snapshot, SnapshotId,
    WorkingSet, WorkingSetContent, working_set,
};
pub use learn::Learned;
pub(crate) use pin::Pin;

/// Pins are renewed this often; the collector never goes by their age, people may.
const PIN_RENEWAL: Duration = Duration::from_secs(600);
/// Bytes of the file that holds a node's id: 32 digits and a newline, and nothing longer is read.
const MOST_IDENTITY_BYTES: u64 = 64;
/// Threads of the I/O runtime: it moves bytes and waits, decoding is done elsewhere.
const RUNTIME_THREADS: usize = 2;

/// How a node is set up. Every bound is in bytes.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// Where the store is: `file:///path`, `s3://bucket/prefix`, `gs://`, `az://`.
    pub store_url: String,
    /// Directory of the disk cache and of the node's identity. A local store is not copied into
    /// it: its packs are on a disk of this machine already.
    pub cache_dir: Option<PathBuf>,
    /// Most bytes of the disk cache.
    pub disk_cache_bytes: u64,
    /// Where short-lived readers of this machine keep their identities, if there is no
    /// `cache_dir`: the pins of one that was killed are cleared away by the next.
    pub readers_dir: Option<PathBuf>,
    /// Bytes that the disk cache and plain copies leave free on their file system.
    pub disk_free_floor_bytes: u64,
    /// Most bytes of plain copies, which are made in `cache_dir`.
    pub plain_copies_bytes: u64,
    /// Most bytes of decoded frames kept in memory.
    pub memory_cache_bytes: u64,
    /// Most bytes in flight of all that is prefetched: stored bytes asked for, and decoded ones until whoever
    /// asked has had them. Less than two of the longest frames are not enough, and count as these (8 MiB).
    pub prefetch_bytes: u64,
}

impl NodeConfig {
    /// A short-lived reader without a disk cache, such as a command.
    pub fn reader(store_url: &str) -> Self {
        Self {
            store_url: store_url.to_owned(),
            cache_dir: None,
            readers_dir: None,
            disk_cache_bytes: 0,
            disk_free_floor_bytes: 0,
            plain_copies_bytes: 0,
            memory_cache_bytes: 64 << 20,
            prefetch_bytes: 256 << 20,
        }
    }
}

/// A node. Clones share everything.
#[derive(Clone)]
pub struct Node(Arc<Inner>);

struct Inner {
    /// Taken on drop, which may happen on a thread of its own.
    runtime: Option<Runtime>,
    id: SnapshotId,
    store: Store,
    fetcher: Fetcher,
    /// Where there is a directory for them.
    plain_copies: Option<PlainCopies>,
    snapshots: Mutex<HashMap<SnapshotId, Arc<Slot>>>,
    /// Of snapshots that nobody reads, not deleted yet.
    left_pins: Mutex<Vec<Pin>>,
    /// Held while the node runs: another process with its identity would clear its pins away.
    identity: Option<Identity>,
}

/// What says whose this process's pins are, locked.
enum Identity {
    /// A node's, which comes back.
    Node(#[expect(dead_code, reason = "held for its lock")] File),
    /// A command's.
    Reader(reader::Identity),
}

/// An open snapshot, or one that is being opened or let go: one at a time.
#[derive(Default)]
struct Slot {
    turn: tokio::sync::Mutex<Option<Pin>>,
    snapshot: Mutex<Weak<Snapshot>>,
}

impl Node {
    /// Opens the store and starts the threads. Waits for the store; call it outside the runtime.
    pub fn start(config: &NodeConfig) -> Result<Self, Error> {
        let local = |error| Error::local("starting threads", error);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(RUNTIME_THREADS)
            .thread_name("store-io")
            .enable_all()
            .build()
            .map_err(local)?;
        let store = runtime.block_on(Store::open(&config.store_url))?;
        let (id, identity, disk) = match &config.cache_dir {
            None => {
                let identity = match &config.readers_dir {
                    Some(directory) => runtime.block_on(reader::identity(directory, &store)),
                    None => None,
                };
                let id = identity.as_ref().map_or_else(SnapshotId::random, |(id, _)| *id);
                (id, identity.map(|(_, reader)| Identity::Reader(reader)), None)
            }
            Some(directory) => {
                std::fs::create_dir_all(directory)
                    .map_err(|error| Error::local(directory.display(), error))?;
                let (id, identity) = identity(directory)?;
                let disk = match store.objects().local_root() {
                    Some(_) => None,
                    None => Some(open_cache(directory, config)?),
                };
                if let Err(error) = runtime.block_on(pin::clear(&store, id)) {
                    tracing::warn!("pins of an earlier process of this node stay: {error}");
                }
                (id, Some(Identity::Node(identity)), disk)
            }
        };
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        // A command that reads has nobody to give way to.
        let workers = match config.cache_dir {
            Some(_) => Workers::for_vms(threads),
            None => Workers::new(threads),
        };
        let workers = workers.map_err(local)?;
        let fetcher = Fetcher::new(
            store.objects().clone(),
            runtime.handle().clone(),
            workers,
            disk,
            config.memory_cache_bytes,
            config.prefetch_bytes,
        );
        let limits =
            Limits { bytes: config.plain_copies_bytes, free_floor: config.disk_free_floor_bytes };
        let plain_copies =
            config.cache_dir.as_ref().map(|directory| PlainCopies::new(directory, limits));
        let node = Self(Arc::new(Inner {
            runtime: Some(runtime),
            id,
            store,
            fetcher,
            plain_copies,
            snapshots: Mutex::default(),
            left_pins: Mutex::default(),
            identity,
        }));
        let renewed = Arc::downgrade(&node.0);
        node.spawn(async move {
            loop {
                tokio::time::sleep(PIN_RENEWAL).await;
                let Some(inner) = renewed.upgrade() else {
                    return;
                };
                Self(inner).renew_pins().await;
            }
        });
        Ok(node)
    }

    /// Runs `task` on the node's I/O runtime.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime().spawn(task);
    }

    /// Runs `task` to its end on this thread, which must not belong to the runtime.
    pub fn block_on<T>(&self, task: impl Future<Output = T>) -> T {
        self.runtime().block_on(task)
    }

    fn runtime(&self) -> &Runtime {
        self.0.runtime.as_ref().expect("the runtime is there until the last node is dropped")
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.0.store
    }

    /// This node's id, as in its pins.
    pub fn id(&self) -> SnapshotId {
        self.0.id
    }

    /// What the fetch path has done.
    pub fn counters(&self) -> &FetchCounters {
        self.0.fetcher.counters()
    }

    /// How the store is reached, and how it bears it.
    pub fn connection(&self) -> Connection {
        self.0.store.objects().connection()
    }

    /// Bytes of decoded frames in memory.
    pub fn memory_cache_bytes(&self) -> u64 {
        self.0.fetcher.memory_bytes()
    }

    /// What is prefetched, against its bound.
    pub fn prefetch_status(&self) -> PrefetchStatus {
        self.0.fetcher.prefetch_status()
    }

    /// What the disk cache holds; `None` where there is none.
    pub fn cache_status(&self) -> Option<CacheStatus> {
        self.0.fetcher.disk().map(DiskCache::status)
    }

    /// The plain copies that are held; `None` where there is no directory for any.
    pub fn plain_copies_status(&self) -> Option<PlainCopiesStatus> {
        self.0.plain_copies.as_ref().map(PlainCopies::status)
    }

    /// Writes a plain copy of file number `file`, each byte verified, or answers with the one that there is. While it is held,
    /// [`Snapshot::plain_copy`] gives it.
    ///
    /// [`Refused`](ErrorKind::Refused) where it would go beyond [`NodeConfig::plain_copies_bytes`] or the free-space floor, and
    /// where the kernel could not use it.
    pub async fn plain_copy(
        &self,
        snapshot: &Arc<Snapshot>,
        file: usize,
    ) -> Result<Arc<PlainCopy>, Error> {
        match &self.0.plain_copies {
            Some(copies) => copies.make(snapshot, file).await,
            None => Err(Error::refused("plain copy", "this node has no directory for it")),
        }
    }

    /// The snapshot `id` if it is open on this node already. Never waits.
    pub fn opened(&self, id: SnapshotId) -> Option<Arc<Snapshot>> {
        self.0.snapshots.lock().get(&id).and_then(|slot| slot.snapshot.lock().upgrade())
    }

    /// Opens a snapshot by id: pins it, checks that it is not removed, reads its manifest. A
    /// snapshot that is open is returned at once.
    pub async fn open_id(&self, id: SnapshotId) -> Result<Arc<Snapshot>, Error> {
        self.open_as(id, self.0.store.read_snapshot(id)).await
    }

    /// The same, with its commit record and manifest from wherever `read` gets them: they must be as they
    /// were committed.
    pub(crate) async fn open_as(
        &self,
        id: SnapshotId,
        read: impl Future<Output = Result<(Commit, Manifest), Error>>,
    ) -> Result<Arc<Snapshot>, Error> {
        Ok(self.open_and(id, read, |_| ()).await?.0)
    }

    /// The same, and what `begin` begins with the snapshot as soon as it is read, which must not wait: perhaps before it is
    /// known that it was not removed, and then nothing comes of either.
    async fn open_and<T>(
        &self,
        id: SnapshotId,
        read: impl Future<Output = Result<(Commit, Manifest), Error>>,
        begin: impl FnOnce(&Arc<Snapshot>) -> T,
    ) -> Result<(Arc<Snapshot>, T), Error> {
        let begun = |snapshot: Arc<Snapshot>| {
            let begun = begin(&snapshot);
            (snapshot, begun)
        };
        if let Some(snapshot) = self.opened(id) {
            return Ok(begun(snapshot));
        }
        let slot = self.0.snapshots.lock().entry(id).or_default().clone();
        let mut turn = slot.turn.lock().await;
        if let Some(snapshot) = self.opened(id) {
            return Ok(begun(snapshot));
        }
        // Whoever had it open is gone, and the pin was not let go yet.
        let before = turn.take();
        self.0.left_pins.lock().extend(before);
        let mut pin = Pin::new(&self.0.store, self.0.id, id);
        let read = async {
            let (commit, manifest) = read.await?;
            Ok(begun(Arc::new(Snapshot::new(self.0.fetcher.clone(), commit, manifest))))
        };
        let opened = pin.open(read).await;
        match &opened {
            Ok((snapshot, _)) => {
                *turn = Some(pin);
                *slot.snapshot.lock() = Arc::downgrade(snapshot);
            }
            Err(_) => {
                if pin.is_left() {
                    self.0.left_pins.lock().push(pin);
                }
                self.forget(id, &slot);
            }
        }
        drop(turn);
        opened
    }

    /// What `name` stands for now (asks the store).
    pub async fn resolve(&self, name: &Name) -> Result<SnapshotId, Error> {
        self.0.store.resolve(name).await
    }

    /// Opens what `name` stands for now.
    pub async fn open_name(&self, name: &Name) -> Result<Arc<Snapshot>, Error> {
        self.open_named(name, |id| self.open_id(id)).await
    }

    /// Opens what `name` stands for with `open`, which is begun by the hint while the record is read.
    async fn open_named<Opened, Opening>(
        &self,
        name: &Name,
        open: impl Fn(SnapshotId) -> Opening,
    ) -> Result<Opened, Error>
    where
        Opening: Future<Output = Result<Opened, Error>>,
    {
        let looked_up = self.0.store.look_up(name).await?;
        let hint = looked_up.hint;
        let hinted = async {
            match hint {
                Some(id) => Some((id, open(id).await)),
                None => None,
            }
        };
        let (id, hinted) = futures::join!(self.0.store.read_name(name, looked_up), hinted);
        let id = id?;
        let opened = match hinted {
            Some((hinted, opened)) if hinted == id => opened,
            _ => open(id).await,
        };
        opened.map_err(|error| of_name(name, error))
    }

    /// All names in the store and what they stand for.
    pub async fn names(&self) -> Result<Vec<(Name, SnapshotId)>, Error> {
        let names = self.0.store.names().await?;
        Ok(names.into_iter().map(|named| (named.name, named.snapshot)).collect())
    }

    /// Ids of all snapshots in the store that exist (committed, not removed).
    pub async fn ids(&self) -> Result<Vec<SnapshotId>, Error> {
        self.0.store.ids().await
    }

    /// The newest usable working set of `snapshot` for the usual profile.
    pub async fn working_set(
        &self,
        snapshot: &Arc<Snapshot>,
    ) -> Result<Option<Arc<WorkingSet>>, Error> {
        self.working_set_of(snapshot, &Profile::default()).await
    }

    /// One working set of `snapshot`.
    pub async fn open_working_set(
        &self,
        snapshot: &Arc<Snapshot>,
        listed: ListedWorkingSet,
    ) -> Result<Arc<WorkingSet>, Error> {
        self.open_set(snapshot, listed, None).await
    }

    /// The same, from what is read ahead of it, if anything is.
    async fn open_set(
        &self,
        snapshot: &Arc<Snapshot>,
        listed: ListedWorkingSet,
        ahead: Option<&Ahead>,
    ) -> Result<Arc<WorkingSet>, Error> {
        let header = self.0.store.working_set_header(snapshot, listed, ahead).await?;
        let (sequence, bytes) = (listed.sequence, listed.stored_bytes);
        Ok(Arc::new(WorkingSet::new(snapshot.clone(), sequence, bytes, header)))
    }

    /// Packs a working set and publishes it; answers with the sequence number.
    pub async fn publish_working_set(
        &self,
        snapshot: &Arc<Snapshot>,
        content: &WorkingSetContent,
    ) -> Result<u64, Error> {
        let id = snapshot.id();
        let chunks = working_set::build(snapshot, content).await?;
        let object = |sequence| (keys::working_set(id, sequence), chunks.clone());
        self.0.store.create_next(&keys::working_sets(id), object).await
    }

    /// Takes a slot off the table, unless somebody waits for its turn and will use it. The caller has
    /// the turn.
    fn forget(&self, id: SnapshotId, slot: &Arc<Slot>) {
        let mut snapshots = self.0.snapshots.lock();
        // The table's and the caller's; others are made under this lock alone.
        if Arc::strong_count(slot) == 2 {
            snapshots.remove(&id);
        }
    }

    /// Gives up the pins of snapshots that nobody has open, and renews the others.
    async fn renew_pins(&self) {
        let slots: Vec<_> =
            self.0.snapshots.lock().iter().map(|(id, slot)| (*id, slot.clone())).collect();
        for (id, slot) in slots {
            let mut turn = slot.turn.lock().await;
            let open = slot.snapshot.lock().strong_count() > 0;
            let done = match turn.as_mut() {
                Some(pin) if open => pin.renew().await,
                Some(pin) => pin.let_go().await,
                None => Ok(()),
            };
            // Only now: until the pin is gone, whoever opens the snapshot must wait for this turn.
            if !open && done.is_ok() {
                self.forget(id, &slot);
            }
            drop(turn);
            if let Err(error) = done {
                tracing::warn!("a pin of {id}: {error}");
            }
        }
        self.delete_left_pins().await;
    }

    async fn delete_left_pins(&self) {
        let left = std::mem::take(&mut *self.0.left_pins.lock());
        for mut pin in left {
            if let Err(error) = pin.let_go().await {
                tracing::warn!("a pin is left: {error}");
                self.0.left_pins.lock().push(pin);
            }
        }
    }

    /// Gives up all pins; snapshots that are still open must not be used after it.
    pub async fn release_pins(&self) {
        let slots: Vec<_> = self.0.snapshots.lock().drain().map(|(_, slot)| slot).collect();
        for slot in slots {
            let pin = slot.turn.lock().await.take();
            self.0.left_pins.lock().extend(pin);
        }
        self.delete_left_pins().await;
        if let Some(Identity::Reader(reader)) = &self.0.identity
            && self.0.left_pins.lock().is_empty()
        {
            reader.is_spent();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Never waits: the last clone may be dropped on a thread of the runtime itself.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// An error about the snapshot that a name stands for.
fn of_name(name: &Name, error: Error) -> Error {
    match error.kind() {
        ErrorKind::NotFound => Error::not_found(name, error),
        _ => error,
    }
}

fn open_cache(directory: &Path, config: &NodeConfig) -> Result<DiskCache, Error> {
    let limits =
        Limits { bytes: config.disk_cache_bytes, free_floor: config.disk_free_floor_bytes };
    DiskCache::open(directory, limits)
}

/// The random id of the node that uses this directory, made at first use, and the file that holds it,
/// locked: a directory is one process's.
fn identity(directory: &Path) -> Result<(SnapshotId, File), Error> {
    let path = directory.join("node");
    let local = |error| Error::local(path.display(), error);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(local)?;
    lock_for_one(&file, directory)?;
    let mut text = String::new();
    if (&file).take(MOST_IDENTITY_BYTES).read_to_string(&mut text).is_ok()
        && let Ok(node) = text.trim().parse()
    {
        return Ok((node, file));
    }
    let node = SnapshotId::random();
    file.set_len(0).and_then(|()| file.rewind()).map_err(local)?;
    file.write_all(format!("{node}\n").as_bytes()).map_err(local)?;
    Ok((node, file))
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::FileKind;
    use crate::pack::{Input, Request, pack};

    /// The URL of a store of one snapshot, and the snapshot.
    fn store_of_one(directory: &tempfile::TempDir) -> (String, SnapshotId) {
        let memory = directory.path().join("memory");
        std::fs::write(&memory, [7; 5000]).expect("written");
        let url = format!("file://{}/store", directory.path().display());
        let runtime = Runtime::new().expect("runtime");
        let store = runtime.block_on(Store::init(&url)).expect("made");
        let memory = Input { name: "memory".into(), kind: FileKind::Memory, path: memory };
        let request = Request::new("f".parse().expect("a name"), vec![memory]);
        let go_on = &mut |_| ControlFlow::Continue(());
        let id = pack(&store, &runtime, &request, go_on).expect("packs").id;
        (url, id)
    }

    /// A renewal that lets a pin go, while somebody waits to open the same snapshot: what is opened
    /// then must be known to the node, or the next renewal takes its pin away under it.
    #[test]
    fn what_is_opened_while_its_pin_is_let_go_stays_pinned() {
        let directory = tempfile::tempdir().expect("directory");
        let (url, id) = store_of_one(&directory);
        let store = Runtime::new().expect("runtime").block_on(Store::open(&url)).expect("opens");

        let node = Node::start(&NodeConfig::reader(&url)).expect("starts");
        drop(node.block_on(node.open_id(id)).expect("opens"));
        let slot = node.0.snapshots.lock().get(&id).cloned().expect("was opened");
        // Polled in this order: both others queue for the turn that the first has.
        let hold = async move {
            let turn = slot.turn.lock().await;
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            drop(turn);
        };
        let waits = async { futures::join!(hold, node.renew_pins(), node.open_id(id)) };
        let ((), (), opened) = node.block_on(waits);
        let snapshot = opened.expect("opens");
        assert!(node.opened(id).is_some(), "the node does not know what it has open");
        drop(node.block_on(node.open_id(id)).expect("opens once more"));
        node.block_on(node.renew_pins());
        let pins = node.block_on(store.objects().list(&keys::pins(node.id())));
        assert_eq!(pins.expect("listed").len(), 1, "an open snapshot is not pinned, or twice");
        drop(snapshot);
        node.block_on(node.renew_pins());
        assert!(node.0.snapshots.lock().is_empty(), "a slot is left");
    }

    /// A network may repeat a DELETE long after it was answered.
    #[test]
    fn a_late_duplicate_of_letting_go_leaves_a_later_opening_pinned() {
        let directory = tempfile::tempdir().expect("directory");
        let (url, id) = store_of_one(&directory);
        let node = Node::start(&NodeConfig::reader(&url)).expect("starts");
        let objects = node.store().objects();
        let pins = || node.block_on(objects.list(&keys::pins(node.id()))).expect("listed");

        drop(node.block_on(node.open_id(id)).expect("opens"));
        let first = pins().pop().expect("a pin").key;
        node.block_on(node.renew_pins());
        assert!(pins().is_empty(), "nobody has it open");
        let snapshot = node.block_on(node.open_id(id)).expect("opens");
        node.block_on(objects.delete(&first)).expect("deleted once more");
        assert_eq!(pins().len(), 1, "the second opening lost its pin");
        drop(snapshot);
    }

    /// A killed process gives up nothing.
    #[test]
    fn a_node_that_starts_again_clears_its_old_pins_and_a_directory_is_one_nodes() {
        let directory = tempfile::tempdir().expect("directory");
        let (url, id) = store_of_one(&directory);
        let cache_dir = Some(directory.path().join("cache"));
        let config = NodeConfig { cache_dir, ..NodeConfig::reader(&url) };
        let node = Node::start(&config).expect("starts");
        let pins = |node: &Node, of: SnapshotId| {
            node.block_on(node.store().objects().list(&keys::pins(of))).expect("listed").len()
        };
        let stranger = keys::pin(SnapshotId::random(), SnapshotId::random(), id);
        node.block_on(node.store().objects().overwrite(&stranger, Vec::new())).expect("written");
        let first = node.id();
        let snapshot = node.block_on(node.open_id(id)).expect("opens");
        assert_eq!(pins(&node, first), 1);
        let refused = Node::start(&config).err().expect("the directory is in use");
        assert_eq!(refused.kind(), ErrorKind::Refused);
        drop(snapshot);
        drop(node);

        let again = Node::start(&config).expect("starts");
        assert_eq!((again.id(), pins(&again, first)), (first, 0));
        assert!(again.block_on(again.store().objects().exists(&stranger)).expect("asked"));
    }
}
