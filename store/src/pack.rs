//! Packing: a paused VM's files become packs, a manifest, a commit record and a name, in the
//! order of the collection protocol, so that a crash at any point leaves a readable store.
//!
//! One thread drives; the workers scan (read, find zeros, hash) and compress. [`Builder`] in
//! between is sequential, because the order of pages decides what lies next to what.

mod builder;
mod host;
mod lease;
mod page_table;
mod source;
mod transaction;
mod upload;

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use crate::format::manifest::{self, Facts, MAX_FILES};
use crate::format::record::Statistics;
use crate::id::check_name;
use crate::store::Store;
use crate::workers::Workers;
use crate::{Error, FileKind, Name, SnapshotId, Urgency};
use builder::Builder;
use source::{Block, SourceFile};
use transaction::Transaction;

pub use host::{differences, host_facts};

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
    /// The name's record.
    pub sequence: u64,
    /// Counts.
    pub statistics: Statistics,
    /// Bytes of all files.
    pub file_bytes: u64,
    /// Bytes of the manifest object.
    pub manifest_bytes: u64,
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
    let sources: Vec<_> = request.inputs.iter().map(SourceFile::open).collect::<Result<_, _>>()?;
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    let workers = Workers::new(threads).map_err(|error| Error::local("starting threads", error))?;
    let transaction = Transaction::begin(store, runtime)?;
    let outcome = fill(&transaction, &sources, &workers, threads, request, progress).and_then(
        |(manifest, statistics, packs)| {
            sources.iter().try_for_each(SourceFile::check_unchanged)?;
            transaction.commit(request, &manifest, statistics, packs)
        },
    );
    transaction.end();
    outcome
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

type Filled = (manifest::Manifest, Statistics, Vec<crate::format::record::PackRef>);

/// Reads all files into packs, which are uploaded on the way.
fn fill(
    transaction: &Transaction<'_>,
    sources: &[SourceFile],
    workers: &Workers,
    threads: usize,
    request: &Request,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Filled, Error> {
    let total_bytes = sources.iter().map(SourceFile::bytes).sum();
    let mut at = Progress { packed_bytes: 0, total_bytes };
    let mut builder = Builder::new(transaction, workers, request.level);
    for source in sources {
        builder.begin_file(source.file());
        let mut scans = VecDeque::new();
        let mut spans = source.spans()?.into_iter();
        loop {
            while scans.len() < threads * SCANS_AHEAD {
                let Some(span) = spans.next() else { break };
                scans.push_back(scan(source, span, workers));
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
    let facts = Facts {
        host: host_facts(),
        vmm: request.vmm.clone(),
        vmm_version: request.vmm_version.clone(),
        guest_page_bytes: request.guest_page_bytes,
        labels: request.labels.clone(),
    };
    builder.finish(facts)
}

fn scan(
    source: &SourceFile,
    span: source::Span,
    workers: &Workers,
) -> Receiver<Result<Block, Error>> {
    let (sender, receiver) = sync_channel(1);
    let reader = Arc::clone(source.reader());
    workers.submit(Urgency::Prefetch, move || {
        // The driver may have given up.
        sender.send(reader.read(span)).unwrap_or_default();
    });
    receiver
}

/// What a worker's job came to.
fn wait<T>(receiver: &Receiver<T>) -> Result<T, Error> {
    receiver.recv().map_err(|_| Error::local("packing", "a worker panicked; this is a bug"))
}
