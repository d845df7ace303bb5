//! Packing: a paused VM's files become packs, a manifest, a commit record and a name, in the
//! order of the collection protocol, so that a crash at any point leaves a readable store.
//!
//! One thread drives; the workers scan (read, find zeros, hash) and compress. [`Builder`] in
//! between is sequential, because the order of pages decides what lies next to what.

mod below;
mod builder;
mod host;
mod index;
mod lease;
mod lineage;
pub(crate) mod machine;
mod page_hash;
mod page_table;
mod parents;
#[cfg(test)]
pub(crate) mod simulated;
mod source;
mod transaction;
mod upload;

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use crate::fetch::disk::incoming::Leaving;
use crate::format::manifest::{self, Facts, MAX_FILES};
use crate::format::record::{PackRef, Statistics};
use crate::id::check_name;
use crate::probe::probe_quickly;
use crate::store::Store;
use crate::workers::Workers;
use crate::{Error, FileKind, Name, Node, NodeConfig, Snapshot, SnapshotId, Urgency};
use builder::Builder;
use parents::Parents;
use source::Block;
use transaction::Transaction;
use upload::PackWriter;

pub(crate) use below::SnapshotFile;
pub use host::{differences, host_facts};
#[cfg(feature = "fuzzing")]
pub(crate) use index::fuzzing as index_fuzzing;
pub(crate) use lineage::condemned;
pub use lineage::{BASE_LABEL, Lineage};
pub(crate) use source::SourceFile;

/// Blocks that are being scanned ahead of the builder, for each worker.
const SCANS_AHEAD: usize = 4;

/// A file to be packed.
#[derive(Clone, Debug)]
pub struct Input {
    /// `memory`, `state`, or the disk's name.
    pub name: String,
    /// What it is.
    pub kind: FileKind,
    /// Where it is.
    pub path: PathBuf,
}

/// What to pack, and what to say about it.
#[derive(Clone, Debug)]
pub struct Request {
    /// The name that the snapshot gets. If it stands for another snapshot now, it moves.
    pub name: Name,
    /// The files; memory first.
    pub inputs: Vec<Input>,
    /// For people and for choosing among snapshots.
    pub labels: BTreeMap<String, String>,
    /// The VMM that wrote the snapshot.
    pub vmm: Option<String>,
    /// Its version.
    pub vmm_version: Option<String>,
    /// Bytes of a guest page at snapshot time.
    pub guest_page_bytes: Option<u64>,
    /// The zstd level of the packs.
    pub level: i32,
    /// Whose pages it may refer to.
    pub lineage: Lineage,
    /// The memory file is a diff over the first parent of the lineage: a hole is the parent's page,
    /// zeros that are there are zero.
    pub diff: bool,
    /// Directory of this node's reader; what is packed is left for its cache. For remote stores: a local
    /// one is read in place.
    pub cache_dir: Option<PathBuf>,
    /// It takes the place of this snapshot: it is committed without a name, and whoever asked moves
    /// the names.
    pub replaces: Option<SnapshotId>,
}

impl Request {
    /// These files under this name, at level 3, with nothing said of them and no parents.
    pub fn new(name: Name, inputs: Vec<Input>) -> Self {
        Self {
            name,
            inputs,
            labels: BTreeMap::new(),
            vmm: None,
            vmm_version: None,
            guest_page_bytes: None,
            level: 3,
            lineage: Lineage::default(),
            diff: false,
            cache_dir: None,
            replaces: None,
        }
    }
}

/// How far packing is, in bytes of the files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Scanned and packed; holes count as scanned.
    pub packed_bytes: u64,
    /// Of all files.
    pub total_bytes: u64,
}

/// What came of it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Packed {
    /// The new snapshot.
    pub id: SnapshotId,
    /// Its name.
    pub name: Name,
    /// The name's record, if it was given a name.
    pub sequence: Option<u64>,
    /// Counts.
    pub statistics: Statistics,
    /// Bytes of all files.
    pub file_bytes: u64,
    /// Bytes of the manifest object.
    pub manifest_bytes: u64,
    /// Snapshots whose packs it refers to.
    pub parents: Vec<SnapshotId>,
    /// Bytes of packs that were left for this node's cache.
    pub left_bytes: u64,
}

/// Packs `request` into `store`. When it returns `Ok`, another node can restore the snapshot bit
/// for bit. Call it outside the runtime; memory use does not depend on the size of the files, but
/// for the manifest: 16 bytes a run, 56 a frame.
///
/// `progress` is told how far it is and may end it.
///
/// Errors: [`Invalid`](crate::ErrorKind::Invalid) for wrong input,
/// [`Refused`](crate::ErrorKind::Refused) when a file changed while it was read or a collector
/// ended the transaction; then nothing was added that a reader can see.
pub fn pack(
    store: &Store,
    runtime: &tokio::runtime::Runtime,
    request: &Request,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Packed, Error> {
    check(request)?;
    let base = if request.diff { Some(DiffBase::open(store, request)?) } else { None };
    let below = |input: &Input| match &base {
        Some(base) if input.kind == FileKind::Memory => base.memory().map(Some),
        _ => Ok(None),
    };
    let sources: Result<Vec<_>, Error> =
        request.inputs.iter().map(|input| SourceFile::open(input, below(input)?)).collect();
    let facts = Facts {
        host: host_facts(),
        vmm: request.vmm.clone(),
        vmm_version: request.vmm_version.clone(),
        guest_page_bytes: request.guest_page_bytes,
        labels: request.labels.clone(),
    };
    let outcome = sources
        .and_then(|sources| pack_sources(store, runtime, request, &facts, &sources, progress));
    if let Some(base) = base {
        base.close();
    }
    outcome
}

/// Packs files that are opened already; `request.inputs` is not looked at.
pub(crate) fn pack_sources(
    store: &Store,
    runtime: &tokio::runtime::Runtime,
    request: &Request,
    facts: &Facts,
    sources: &[SourceFile],
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Packed, Error> {
    if store.objects().local_root().is_none() {
        runtime.block_on(probe_quickly(store.objects()))?;
    }
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let workers = Workers::new(threads).map_err(|error| Error::local("starting threads", error))?;
    let mut transaction = Transaction::new(store, request)?;
    let mut leaving = begin_leaving(store, request, transaction.id())?;
    while let Some(step) = transaction.next() {
        if step == machine::Request::Store {
            let packs = PackWriter::new(transaction.id(), store, runtime, leaving.as_mut());
            let threads = (&workers, threads);
            let filled = fill(&transaction, runtime, packs, (facts, sources), threads, progress);
            runtime.block_on(transaction.stored(filled));
        } else {
            runtime.block_on(transaction.carry_out(step));
        }
    }
    let packed = transaction.end()?;
    Ok(Packed { left_bytes: leaving.map_or(0, Leaving::hand_over), ..packed })
}

fn begin_leaving(
    store: &Store,
    request: &Request,
    txn: SnapshotId,
) -> Result<Option<Leaving>, Error> {
    let Some(directory) = &request.cache_dir else { return Ok(None) };
    if store.objects().local_root().is_some() {
        let text = "a local store is read in place and has no cache: pack without it";
        return Err(Error::invalid(directory.display(), text));
    }
    Leaving::begin(directory, txn).map(Some)
}

/// The snapshot that a diff lies over, opened (and so pinned) by a reader of its own.
struct DiffBase {
    node: Node,
    snapshot: Arc<Snapshot>,
}

impl DiffBase {
    fn open(store: &Store, request: &Request) -> Result<Self, Error> {
        let Some(parent) = request.lineage.parents.first() else {
            return Err(Error::invalid(&request.name, "a diff needs its parent: give --parent"));
        };
        let readers_dir = request.lineage.index.clone();
        let reader = NodeConfig::reader(store.objects().url());
        let node = Node::start(&NodeConfig { readers_dir, ..reader })?;
        let snapshot = node.block_on(node.open_id(*parent))?;
        Ok(Self { node, snapshot })
    }

    fn memory(&self) -> Result<SnapshotFile, Error> {
        let is_memory = |file: &crate::File| file.kind == FileKind::Memory;
        let file = self.snapshot.files().iter().position(is_memory);
        let missing = || Error::invalid(self.snapshot.id(), "has no memory file to differ from");
        let file = file.ok_or_else(missing)?;
        let snapshot = self.snapshot.clone();
        Ok(SnapshotFile { snapshot, file, same_store: true, spares: None })
    }

    fn close(self) {
        drop(self.snapshot);
        self.node.block_on(self.node.release_pins());
    }
}

fn check(request: &Request) -> Result<(), Error> {
    if request.inputs.len() > MAX_FILES as usize {
        return Err(Error::invalid(
            &request.name,
            format!("a snapshot has at most {MAX_FILES} files"),
        ));
    }
    for (number, input) in request.inputs.iter().enumerate() {
        check_name(&input.name)?;
        if request.inputs[..number].iter().any(|earlier| earlier.name == input.name) {
            return Err(Error::invalid(&input.name, "two files have this name: give each its own"));
        }
    }
    Ok(())
}

/// What all files came to.
struct Filled {
    manifest: manifest::Manifest,
    statistics: Statistics,
    packs: Vec<PackRef>,
    parents: Vec<SnapshotId>,
}

/// Reads all files into packs, which are uploaded on the way.
fn fill(
    transaction: &Transaction<'_>,
    runtime: &tokio::runtime::Runtime,
    packs: PackWriter<'_>,
    (facts, sources): (&Facts, &[SourceFile]),
    (workers, threads): (&Workers, usize),
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Filled, Error> {
    let request = transaction.request();
    let parents = Arc::new(runtime.block_on(Parents::load(transaction))?);
    let mut builder = Builder::new(transaction.id(), packs, workers, &parents, request.level);
    let total_bytes = sources.iter().map(SourceFile::bytes).sum();
    let mut at = Progress { packed_bytes: 0, total_bytes };
    for source in sources {
        builder.begin_file(source.file());
        let mut scans = VecDeque::new();
        let mut spans = source.spans()?.into_iter();
        loop {
            while scans.len() < threads * SCANS_AHEAD {
                let Some(span) = spans.next() else { break };
                scans.push_back(scan(source, span, &parents, workers));
            }
            let Some(scanned) = scans.pop_front() else { break };
            let block: Block = wait(&scanned)??;
            at.packed_bytes += block.bytes();
            builder.add(&block)?;
            if progress(at).is_break() {
                return Err(Error::refused(&request.name, "packing was interrupted"));
            }
        }
        builder.end_file();
    }
    let filled = builder.finish(facts.clone())?;
    sources.iter().try_for_each(SourceFile::check_unchanged)?;
    Ok(filled)
}

fn scan(
    source: &SourceFile,
    span: source::Span,
    parents: &Arc<Parents>,
    workers: &Workers,
) -> Receiver<Result<Block, Error>> {
    let (sender, receiver) = sync_channel(1);
    let (reader, parents) = (Arc::clone(source.reader()), Arc::clone(parents));
    workers.submit(Urgency::Prefetch, move || {
        // The driver may have given up.
        sender.send(reader.read(span, &parents)).unwrap_or_default();
    });
    receiver
}

/// What a worker's job came to.
fn wait<T>(receiver: &Receiver<T>) -> Result<T, Error> {
    receiver.recv().map_err(|_| Error::local("packing", "a worker panicked; this is a bug"))
}
