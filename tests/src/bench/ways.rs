//! The alternatives, and the order in which they take turns.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Trace;
use super::touch::{Touched, write_reap_file};
use crate::lab::{evict, evict_tree};
use crate::worker::{Worker, reap_pack_json};

/// One alternative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Alternative {
    /// Private mapping of the memory file, nothing in page cache.
    FileCold,
    /// The same, all in page cache.
    FileWarm,
    /// Minimal userfaultfd handler over the mapped memory file, nothing in page cache.
    DemandCold,
    /// The same, all in page cache.
    DemandWarm,
    /// REAP as published, O_DIRECT.
    ReapCold,
    /// REAP, its file in page cache.
    ReapWarm,
    /// Our mount, new daemon, store evicted.
    MountCold,
    /// Our mount, the second time.
    MountWarm,
    /// Our handler without a working set, new daemon, store evicted.
    OursDemandCold,
    /// The same, the second time.
    OursDemandWarm,
    /// Our handler with the working set, new daemon, store evicted.
    OursCold,
    /// The same, the second time: a warm node.
    OursWarm,
    /// Our handler without a working set, all in its memory, while it records.
    OursRecordWarm,
    /// The same, not recording, while a working set of 64 MiB is prefetched from the disk into another VM, which does
    /// nothing meanwhile.
    OursDemandBeside,
    /// The same, and the other VM touches all of it as it comes.
    OursDemandBusy,
    /// Our handler with the working set in a store that is shaped as S3 is, on a node that knows nothing but the
    /// name: from the call that prepares it.
    OursRemote,
}

use Alternative::*;

/// Pages of the working set that is prefetched while another VM is served: 64 MiB.
const OTHER_PAGES: usize = 16_384;
/// Such snapshots: a second prefetch of one would find it decoded in memory.
const OTHERS: [&str; 2] = ["other", "another"];

/// All of them, in the order of the table.
pub const ALTERNATIVES: [Alternative; 16] = [
    FileCold,
    DemandCold,
    ReapCold,
    MountCold,
    OursDemandCold,
    OursCold,
    FileWarm,
    DemandWarm,
    ReapWarm,
    MountWarm,
    OursDemandWarm,
    OursRecordWarm,
    OursDemandBeside,
    OursDemandBusy,
    OursWarm,
    OursRemote,
];

impl Alternative {
    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            FileCold => "file mapping, cold",
            FileWarm => "file mapping, warm",
            DemandCold => "minimal handler, cold",
            DemandWarm => "minimal handler, warm",
            ReapCold => "REAP, cold (O_DIRECT)",
            ReapWarm => "REAP, in page cache",
            MountCold => "our mount, cold",
            MountWarm => "our mount, warm",
            OursDemandCold => "ours on demand, cold",
            OursDemandWarm => "ours on demand, warm",
            OursRecordWarm => "ours recording, warm",
            OursDemandBeside => "demand, prefetch beside",
            OursDemandBusy => "demand, VM beside",
            OursCold => "ours, cold",
            OursWarm => "ours, warm node",
            OursRemote => "ours, remote (as S3)",
        }
    }
}

/// A function to measure.
pub struct Function {
    /// Its name, also in the store.
    pub name: String,
    /// Its memory file.
    pub memory: PathBuf,
    /// The trace, as a file, for the processes that touch it.
    pub trace_file: PathBuf,
    /// The same, read.
    pub trace: Trace,
}

/// A store with all functions packed and their working sets recorded.
pub struct Bench {
    scratch: PathBuf,
    url: String,
}

impl Bench {
    /// Packs the functions into a new store under `scratch`, which should be on the disk that is to be
    /// measured, and records a working set of each by touching its trace.
    pub fn set_up(scratch: &Path, functions: &[Function]) -> Result<Self> {
        std::fs::create_dir_all(scratch)?;
        let url = format!("file://{}/store", scratch.display());
        reap_pack_json(&url, &["init"])?;
        let bench = Self { scratch: scratch.to_owned(), url };
        for function in functions {
            let memory = function.memory.to_str().context("a path in UTF-8")?;
            reap_pack_json(&bench.url, &["pack", "--name", &function.name, "--memory", memory])?;
            write_reap_file(&function.memory, &function.trace, &bench.reap_file(function))?;
        }
        let others = [bench.other(OTHERS[0])?, bench.other(OTHERS[1])?];
        for other in &others {
            let memory = other.memory.to_str().context("a path in UTF-8")?;
            reap_pack_json(&bench.url, &["pack", "--name", &other.name, "--memory", memory])?;
        }
        let worker = bench.worker(&["--settle", "1"])?;
        for function in functions.iter().chain(&others) {
            let socket = bench.socket(&worker, function, "auto")?;
            touch_apart(function, &["socket", &socket])?;
            worker.wait_for_working_set(&function.name)?;
        }
        worker.stop()?;
        Ok(bench)
    }

    /// Where the store is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// A snapshot that is prefetched while another VM is served on demand: 64 MiB in runs of four
    /// pages, which compress to a third.
    fn other(&self, name: &str) -> Result<Function> {
        let (memory, trace_file) = (self.scratch.join("other"), self.scratch.join("other.trace"));
        if !memory.exists() {
            let (mut random, mut bytes) = (1u64, Vec::new());
            for word in 0..(2 * OTHER_PAGES * 4096 / 8) as u64 {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                bytes.extend((if word % 3 == 0 { random } else { word / 512 }).to_le_bytes());
            }
            std::fs::write(&memory, bytes)?;
            let pages = (0..OTHER_PAGES).map(|page| page / 4 * 8 + page % 4);
            let lines: Vec<_> = pages.map(|page| format!("{page}\n")).collect();
            std::fs::write(&trace_file, lines.concat())?;
        }
        let trace = Trace::read(&trace_file, 2 * OTHER_PAGES as u64)?;
        Ok(Function { name: name.into(), memory, trace_file, trace })
    }

    fn reap_file(&self, function: &Function) -> PathBuf {
        self.scratch.join(format!("{}.reap", function.name))
    }

    fn worker(&self, arguments: &[&str]) -> Result<Worker> {
        Worker::start(&self.url, &self.scratch.join("worker"), arguments)
    }

    fn socket(&self, worker: &Worker, function: &Function, mode: &str) -> Result<String> {
        let prepared = worker.prepare(&function.name, mode)?;
        Ok(prepared["uffd"].as_str().context("a socket")?.to_owned())
    }

    /// One round: every alternative once, but for the remote one, which [`super::remote`] has.
    pub fn round(&self, function: &Function) -> Result<Vec<(Alternative, Touched)>> {
        let path = |path: &Path| path.to_str().map(str::to_owned).context("a path in UTF-8");
        let (memory, reap) = (path(&function.memory)?, path(&self.reap_file(function))?);
        let file = ["file", &memory];
        let mut taken = Vec::new();
        let mut take = |alternative, cold: bool, way: &[&str]| -> Result<()> {
            if cold {
                evict(&function.memory)?;
                evict(&self.reap_file(function))?;
            }
            taken.push((alternative, touch_apart(function, way)?));
            Ok(())
        };
        take(FileCold, true, &file)?;
        take(DemandCold, true, &["demand"])?;
        take(ReapCold, true, &["reap", &reap])?;
        // Read through the file system's own reads, so that all of both files is there.
        std::fs::read(&function.memory)?;
        std::fs::read(self.reap_file(function))?;
        take(FileWarm, false, &file)?;
        take(DemandWarm, false, &["demand"])?;
        take(ReapWarm, false, &["reap", &reap, "--cached"])?;
        for (cold, warm, mode) in
            [(OursCold, OursWarm, "prefetch"), (OursDemandCold, OursDemandWarm, "demand")]
        {
            let worker = self.worker(&[])?;
            let socket = self.socket(&worker, function, mode)?;
            self.evict_store()?;
            take(cold, false, &["socket", &socket])?;
            take(warm, false, &["socket", &socket])?;
            if mode == "demand" {
                let busy = [(OursDemandBeside, true), (OursDemandBusy, false)];
                for ((busy, held), other) in busy.into_iter().zip(OTHERS) {
                    let other = self.other(other)?;
                    let way = self.socket(&worker, &other, "prefetch")?;
                    evict_tree(&self.scratch.join("store"))?;
                    let other = Start::begin(&other, &["socket", &way], held)?;
                    wait_for_prefetch(&worker)?;
                    take(busy, false, &["socket", &socket])?;
                    other.end()?;
                }
                let socket = self.socket(&worker, function, "record")?;
                take(OursRecordWarm, false, &["socket", &socket])?;
            }
            worker.stop()?;
        }
        let worker = self.worker(&[])?;
        let mounted = path(&worker.mount().join("snapshots").join(&function.name).join("memory"))?;
        worker.prepare(&function.name, "demand")?;
        self.evict_store()?;
        take(MountCold, false, &["file", &mounted])?;
        take(MountWarm, false, &["file", &mounted])?;
        worker.stop()?;
        Ok(taken)
    }

    fn evict_store(&self) -> Result<()> {
        evict_tree(&self.scratch.join("store"))
    }
}

/// One start in a process of its own.
pub(super) fn touch_apart(function: &Function, way: &[&str]) -> Result<Touched> {
    Start::begin(function, way, false)?.end()
}

/// A start that is under way in a process of its own.
struct Start {
    process: Child,
    what: String,
}

impl Start {
    /// One that is held touches nothing before [`Self::end`].
    fn begin(function: &Function, way: &[&str], held: bool) -> Result<Self> {
        let process = Command::new(std::env::current_exe()?)
            .arg("touch")
            .args(held.then_some("--held"))
            .arg(&function.memory)
            .arg(&function.trace_file)
            .args(way)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        Ok(Self { process, what: format!("{}: {way:?}", function.name) })
    }

    fn end(self) -> Result<Touched> {
        // This ends its input.
        let output = self.process.wait_with_output()?;
        let reason = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {}: {reason}", self.what, output.status);
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// Until the newest restore has installed something ahead.
fn wait_for_prefetch(worker: &Worker) -> Result<()> {
    let began = Instant::now();
    while worker.newest_restore()?["prefetched_pages"].as_u64().unwrap_or(0) == 0 {
        ensure!(began.elapsed() < Duration::from_secs(10), "nothing is prefetched");
    }
    Ok(())
}
