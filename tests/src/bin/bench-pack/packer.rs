//! `reap-pack` on a store of its own, measured.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use reap_store::{Node, NodeConfig};
use reap_tests::worker::{reap_pack_command, reap_pack_json};

/// A store and this node's index of it.
pub(crate) struct Packer {
    pub(crate) store: PathBuf,
    url: String,
}

/// What reading a snapshot to its end took.
pub(crate) struct Read {
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
    pub(crate) stored_bytes: u64,
    pub(crate) packs: usize,
}

impl Packer {
    pub(crate) fn new(directory: &Path) -> Result<Self> {
        let store = directory.join("store");
        let url = format!("file://{}", store.display());
        reap_pack_json(&url, &["init"])?;
        Ok(Self { store, url })
    }

    fn command(&self, name: &str, memory: &Path, more: &[&str]) -> Result<Command> {
        let memory = memory.to_str().context("a path in UTF-8")?;
        let pack = ["--json", "pack", "--name", name, "--memory", memory];
        reap_pack_command(&self.url, &[&pack, more].concat())
    }

    /// Seconds.
    pub(crate) fn pack(&self, name: &str, memory: &Path, more: &[&str]) -> Result<f64> {
        let mut command = self.command(name, memory, more)?;
        let began = Instant::now();
        super::succeed(&mut command)?;
        Ok(began.elapsed().as_secs_f64())
    }

    /// The most memory that packing had at once, as the kernel counts it.
    pub(crate) fn peak_bytes(&self, name: &str, memory: &Path) -> Result<u64> {
        let mut command = self.command(name, memory, &[])?;
        let mut child = command.stdout(Stdio::null()).spawn()?;
        let status = format!("/proc/{}/status", child.id());
        let mut peak = 0;
        while child.try_wait()?.is_none() {
            let text = std::fs::read_to_string(&status).unwrap_or_default();
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            peak = peak.max(kib.unwrap_or_default() * 1024);
            std::thread::sleep(Duration::from_millis(2));
        }
        ensure!(child.wait()?.success(), "reap-pack failed");
        Ok(peak)
    }

    /// Fails if what comes out is not what went in.
    pub(crate) fn check(&self, name: &str, memory: &Path, out: &Path) -> Result<()> {
        self.read_all(name, out)?;
        super::succeed(Command::new("cmp").arg(memory).arg(out.join("memory"))).map(|_| ())
    }

    /// Reads a snapshot to its end by a node that has never seen it.
    pub(crate) fn read_all(&self, name: &str, out: &Path) -> Result<Read> {
        if out.exists() {
            std::fs::remove_dir_all(out)?;
        }
        let node = Node::start(&NodeConfig::reader(&self.url))?;
        let snapshot = node.block_on(node.open_name(&name.parse()?))?;
        node.block_on(reap_store::export::export(&snapshot, out, &mut |_, _| {}))?;
        let counters = node.counters();
        let requests = counters.store_reads.load(Ordering::Relaxed);
        let bytes = counters.store_bytes.load(Ordering::Relaxed);
        let packs = snapshot.commit().packs.len();
        let id = snapshot.id().to_string();
        drop(snapshot);
        node.block_on(node.release_pins());
        let stats = reap_pack_json(&self.url, &["stats"])?;
        let rows = stats["snapshots"].as_array().context("snapshots")?;
        let row = rows.iter().find(|row| row["snapshot"] == id.as_str()).context("a row")?;
        let stored_bytes = row["stored_bytes"].as_u64().context("stored bytes")?;
        Ok(Read { requests, bytes, stored_bytes, packs })
    }
}

/// Bytes of all files under `directory`.
pub(crate) fn store_bytes(directory: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { store_bytes(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}
