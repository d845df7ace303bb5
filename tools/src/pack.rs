//! `reap-pack`: turns snapshots into store objects and looks after them.

mod arguments;
mod copy;
mod gc;
mod picture;
mod repack;
mod repair;
mod show;
mod stats;
mod tree;
mod verify;
mod ws;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use clap::Parser;
use reap_store::pack::{Input, Lineage, Request};
use reap_store::{Error, ErrorKind, FileKind, Name, Node, NodeConfig, SnapshotId, Store};
use serde_json::json;
use tokio::runtime::Runtime;

use crate::output::{Progress, size};
use arguments::IndexDirectory;
pub use arguments::{Arguments, Command, WorkingSets};

/// Runs `reap-pack` with the process's arguments.
pub fn main() -> std::process::ExitCode {
    let arguments = Arguments::parse();
    crate::output::finish("reap-pack", run(&arguments))
}

/// Runs one command.
pub fn run(arguments: &Arguments) -> Result<()> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let context = Context { url: &arguments.store, json: arguments.json, runtime: &runtime };
    match &arguments.command {
        Command::Init => context.init(),
        Command::Pack(pack) => context.pack(pack),
        Command::Ls { tree: false } => context.ls(),
        Command::Ls { tree: true } => context.tree(),
        Command::Stats => context.stats(),
        Command::Copy { snapshot, to, name, index } => {
            context.copy(snapshot, to, name.as_deref(), index)
        }
        Command::Repack { snapshot, threshold, index, .. } => {
            context.repack(snapshot.as_deref(), *threshold, index)
        }
        Command::Show { snapshot } => context.show(snapshot),
        Command::Export { snapshot, directory } => context.export(snapshot, directory),
        Command::Verify(verify) => context.verify(verify),
        Command::Repair { snapshot, from, caches, dry_run, .. } => {
            context.repair(snapshot.as_deref(), from.as_deref(), caches, *dry_run)
        }
        Command::Gc { dry_run, yes, lease_timeout } => {
            let options = reap_store::collect::Options {
                dry_run: *dry_run,
                confirmed: *yes,
                lease_timeout: std::time::Duration::from_secs(*lease_timeout),
            };
            context.gc(options)
        }
        Command::Ws(command) => context.ws(command),
        Command::Tag { snapshot, name } => context.tag(snapshot, name),
        Command::Rm { snapshot, force } => context.rm(snapshot, *force),
    }
}

struct Context<'a> {
    url: &'a str,
    json: bool,
    runtime: &'a Runtime,
}

impl Context<'_> {
    fn store(&self) -> Result<Store> {
        self.check_url()?;
        Ok(self.runtime.block_on(Store::open(self.url))?)
    }

    /// Prints `value` with `--json`, else `text`.
    fn print(&self, value: &serde_json::Value, text: &str) -> Result<()> {
        use std::io::Write;
        let mut out = std::io::stdout().lock();
        if self.json {
            serde_json::to_writer_pretty(&mut out, value)?;
            writeln!(out)?;
        } else if !text.is_empty() {
            writeln!(out, "{}", text.trim_end())?;
        }
        Ok(())
    }

    /// Gives `read` a node of its own, and gives up its pins afterwards, however it went. `readers_dir`:
    /// where it can be found should it be killed.
    fn with_node<T>(
        &self,
        readers_dir: Option<PathBuf>,
        read: impl FnOnce(&Node) -> Result<T>,
    ) -> Result<T> {
        let node = Node::start(&NodeConfig { readers_dir, ..NodeConfig::reader(self.url) })?;
        let outcome = read(&node);
        node.block_on(node.release_pins());
        outcome
    }

    fn check_url(&self) -> Result<()> {
        if self.url.is_empty() {
            let remedy = "give the store's URL, such as file:///var/lib/reap/store";
            return Err(Error::invalid("--store (or REAP_STORE)", remedy).into());
        }
        Ok(())
    }

    fn init(&self) -> Result<()> {
        self.check_url()?;
        let store = self.runtime.block_on(Store::init(self.url))?;
        let value = json!({ "store": store.id(), "url": self.url });
        self.print(&value, &format!("{}: a new store, {}", self.url, store.id()))
    }

    fn pack(&self, arguments: &arguments::Pack) -> Result<()> {
        let mut request = request(arguments)?;
        let store = self.store()?;
        let parents: Result<_> =
            arguments.parents.iter().map(|parent| self.find_live(&store, parent)).collect();
        request.lineage = Lineage {
            parents: parents?,
            automatic: arguments.parents.is_empty() && !arguments.no_parent,
            index: arguments.index.path(),
            ..Lineage::default()
        };
        let interrupted = watch_signals(self.runtime)?;
        let mut progress = Progress::new("packing", self.json);
        let mut report = reporter(&mut progress, &interrupted);
        let packed = reap_store::pack::pack(&store, self.runtime, &request, &mut report);
        drop(report);
        progress.end();
        let packed = packed?;
        let statistics = packed.statistics;
        let text = format!(
            "{} is {}: {} in {}; pages: {} in all, {} zero, {} unique, {} duplicate, {} of them in parents",
            packed.name,
            packed.id,
            size(packed.file_bytes),
            size(statistics.pack_bytes + packed.manifest_bytes),
            statistics.pages,
            statistics.zero_pages,
            statistics.unique_pages,
            statistics.duplicate_pages,
            statistics.parent_pages,
        );
        self.print(&serde_json::to_value(&packed)?, &text)
    }

    /// What the user calls a snapshot: a name, or an id.
    fn find(&self, store: &Store, text: &str) -> Result<SnapshotId> {
        let by_name = match text.parse::<Name>() {
            Ok(name) => self.runtime.block_on(store.resolve(&name)),
            Err(error) => Err(error),
        };
        match (by_name, text.parse::<SnapshotId>()) {
            (Ok(id), _) => Ok(id),
            (Err(error), Ok(id)) if error.kind() == ErrorKind::NotFound => Ok(id),
            (Err(error), _) => Err(error.into()),
        }
    }

    /// The same, and it must not be removed.
    fn find_live(&self, store: &Store, text: &str) -> Result<SnapshotId> {
        let id = self.find(store, text)?;
        if self.runtime.block_on(store.is_removed(id))? {
            return Err(Error::not_found(text, "the snapshot was removed").into());
        }
        Ok(id)
    }

    fn export(&self, snapshot: &str, directory: &Path) -> Result<()> {
        let id = self.find(&self.store()?, snapshot)?;
        let mut progress = Progress::new("exporting", self.json);
        let outcome = self.with_node(IndexDirectory::usual(), |node| {
            let exported = node.block_on(async {
                let snapshot = node.open_id(id).await?;
                let mut report = |done, total| progress.at(done, total);
                reap_store::export::export(&snapshot, directory, &mut report).await
            });
            Ok(exported?)
        });
        progress.end();
        let paths = outcome?;
        let lines: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
        self.print(&json!({ "snapshot": id, "files": lines }), &lines.join("\n"))
    }

    fn tag(&self, snapshot: &str, name: &str) -> Result<()> {
        let name: Name = name.parse()?;
        let store = self.store()?;
        let id = self.find_live(&store, snapshot)?;
        self.runtime.block_on(store.commit(id))?;
        let sequence = self.runtime.block_on(store.tag(&name, id))?;
        let value = json!({ "name": name, "snapshot": id, "sequence": sequence });
        self.print(&value, &format!("{name} is {id}"))
    }

    fn rm(&self, snapshot: &str, force: bool) -> Result<()> {
        let store = self.store()?;
        let id = self.find_live(&store, snapshot)?;
        self.runtime.block_on(store.commit(id))?;
        let names = self.runtime.block_on(store.names())?;
        let others: Vec<String> = names
            .iter()
            .filter(|named| named.snapshot == id && named.name.as_str() != snapshot)
            .map(|named| named.name.to_string())
            .collect();
        if !others.is_empty() && !force {
            let text =
                format!("the snapshot is also named {}: --force removes it", others.join(", "));
            return Err(Error::refused(snapshot, text).into());
        }
        self.runtime.block_on(store.remove(id, SnapshotId::random()))?;
        self.print(&json!({ "removed": id, "names": others }), &format!("{id} is removed"))
    }
}

fn request(arguments: &arguments::Pack) -> Result<Request> {
    let mut inputs = vec![Input {
        name: "memory".into(),
        kind: FileKind::Memory,
        path: arguments.memory.clone(),
    }];
    if let Some(state) = &arguments.state {
        inputs.push(Input { name: "state".into(), kind: FileKind::State, path: state.clone() });
    }
    for disk in &arguments.disks {
        let (name, path) =
            disk.split_once('=').ok_or_else(|| Error::invalid(disk, "a disk is NAME=FILE"))?;
        inputs.push(Input { name: name.into(), kind: FileKind::Disk, path: path.into() });
    }
    let mut labels = BTreeMap::new();
    for label in &arguments.labels {
        let (key, value) =
            label.split_once('=').ok_or_else(|| Error::invalid(label, "a label is KEY=VALUE"))?;
        labels.insert(key.to_owned(), value.to_owned());
    }
    Ok(Request {
        labels,
        vmm: arguments.vmm.clone(),
        vmm_version: arguments.vmm_version.clone(),
        guest_page_bytes: arguments.guest_page_size,
        level: arguments.level,
        diff: arguments.diff,
        cache_dir: arguments.cache.clone(),
        ..Request::new(arguments.name.parse()?, inputs)
    })
}

/// Shows progress, and ends the packing when it is interrupted.
fn reporter<'a>(
    progress: &'a mut Progress,
    interrupted: &'a AtomicBool,
) -> impl FnMut(reap_store::pack::Progress) -> ControlFlow<()> + 'a {
    |at| {
        progress.at(at.packed_bytes, at.total_bytes);
        match interrupted.load(Ordering::Relaxed) {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

/// A flag that SIGINT and SIGTERM raise, so that an interrupted packer gives up its lease.
fn watch_signals(runtime: &Runtime) -> Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let flag = Arc::new(AtomicBool::new(false));
    let raised = flag.clone();
    let _context = runtime.enter();
    let (mut interrupt, mut terminate) =
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    runtime.spawn(async move {
        tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
        raised.store(true, Ordering::Relaxed);
    });
    Ok(flag)
}
