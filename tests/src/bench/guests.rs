//! Memory files and traces from real guests of the laboratory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::Trace;
use super::ways::Function;
use crate::lab::{Backend, Lab, Snapshot};
use crate::worker::{Worker, reap_pack, reap_pack_json};

/// A guest that was made, and all of it.
pub struct Made {
    /// What the other ways need.
    pub function: Function,
    /// Its files.
    pub snapshot: Snapshot,
    /// A store with this snapshot, under the function's name, and its working set.
    pub url: String,
    /// Where everything lies.
    pub directory: PathBuf,
    /// What it answers to the input of the recording.
    pub answer: String,
}

/// Boots a guest, snapshots it, records a restore of it through `reapd` with one request, and exports the
/// recording as a trace. Everything is left under `directory`.
pub fn function(lab: &Lab, name: &str, memory_mib: u32, directory: &Path) -> Result<Made> {
    let directory = directory.join(format!("{name}-{memory_mib}"));
    std::fs::create_dir_all(&directory)?;
    let mut guest = lab.boot(name, memory_mib, &directory)?;
    let answer = guest.request("one")?.line;
    let snapshot = guest.snapshot(&directory)?;
    let url = format!("file://{}/store", directory.display());
    reap_pack_json(&url, &["init"])?;
    let memory = snapshot.memory.to_str().context("a path in UTF-8")?;
    reap_pack_json(&url, &["pack", "--name", name, "--memory", memory])?;
    let worker = Worker::start(&url, &directory.join("worker"), &["--settle", "1"])?;
    let prepared = worker.prepare(name, "auto")?;
    let socket = prepared["uffd"].as_str().context("a socket")?.into();
    let mut guest = lab.restore(&snapshot, &Backend::Uffd { socket })?;
    guest.request("one")?;
    drop(guest);
    worker.wait_for_working_set(name)?;
    worker.stop()?;
    let trace_file = directory.join("trace");
    let to = trace_file.to_str().context("a path in UTF-8")?;
    let exported = reap_pack(&url, &["ws", "export", name, to])?;
    ensure!(exported.status.success(), "{}", String::from_utf8_lossy(&exported.stderr));
    let trace = Trace::read(&trace_file, u64::from(memory_mib) << 8)?;
    let name = format!("{name}-{memory_mib}");
    let function = Function { name, memory: snapshot.memory.clone(), trace_file, trace };
    Ok(Made { function, snapshot, url, directory, answer })
}
