//! The real programs as a worker node runs them: `reap-pack` as a command, `reapd` as a process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};
use serde_json::Value;

/// How long a daemon may take to be ready, or to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program of this workspace, beside the running one.
pub fn program(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let found = own.ancestors().skip(1).take(2).map(|at| at.join(name)).find(|at| at.is_file());
    found.with_context(|| format!("{name} is not built: run 'cargo build --release' first"))
}

/// Runs `reap-pack` on the store at `url`; the caller looks at how it went.
pub fn reap_pack(url: &str, arguments: &[&str]) -> Result<Output> {
    Ok(reap_pack_command(url, arguments)?.output()?)
}

/// The same, not run yet. The node's index lies beside a local store, and goes with it.
pub fn reap_pack_command(url: &str, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(program("reap-pack")?);
    let beside = url.strip_prefix("file://").map(|path| format!("{path}-index"));
    let index = beside.map_or_else(|| std::env::temp_dir().join("reap-index"), PathBuf::from);
    command.env("REAP_STORE", url).env("REAP_INDEX", index).args(arguments).stdin(Stdio::null());
    Ok(command)
}

/// Runs `reap-pack --json`, which must go well; answers with what it printed.
pub fn reap_pack_json(url: &str, arguments: &[&str]) -> Result<Value> {
    let output = reap_pack(url, &[&["--json"], arguments].concat())?;
    succeeded("reap-pack", &output)?;
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn succeeded(what: &str, output: &Output) -> Result<()> {
    if !output.status.success() {
        bail!("{what} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// The sum of a metric's samples whose labels have `part`, of what [`Worker::metrics`] answers.
pub fn metric(metrics: &str, name: &str, part: &str) -> Result<f64> {
    let samples = metrics.lines().filter_map(|line| {
        let (sample, value) = line.rsplit_once(' ')?;
        let labels = sample.strip_prefix(name)?;
        let is_it = labels.is_empty() || labels.starts_with('{');
        (is_it && labels.contains(part)).then_some(value)
    });
    let values: Vec<f64> = samples.map(str::parse).collect::<Result<_, _>>()?;
    anyhow::ensure!(!values.is_empty(), "there is no {name} with {part}");
    Ok(values.iter().sum())
}

/// A running `reapd`, ended and unmounted on drop.
pub struct Worker {
    child: Child,
    directory: PathBuf,
}

impl Worker {
    /// Starts a daemon whose directories are under `directory`, and waits until it is ready.
    pub fn start(url: &str, directory: &Path, arguments: &[&str]) -> Result<Self> {
        Self::start_with(url, directory, arguments, &[])
    }

    /// The same, with more in its environment.
    pub fn start_with(
        url: &str,
        directory: &Path,
        arguments: &[&str],
        environment: &[(&'static str, String)],
    ) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let log =
            std::fs::File::options().create(true).append(true).open(directory.join("reapd.log"))?;
        let child = Command::new(program("reapd")?)
            .args(["run", "--store", url, "--cache"])
            .arg(directory.join("cache"))
            .arg("--mount")
            .arg(directory.join("mnt"))
            .arg("--run-dir")
            .arg(directory.join("run"))
            .args(arguments)
            .envs(environment.iter().map(|(variable, value)| (variable, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        let mut worker = Self { child, directory: directory.to_owned() };
        let began = Instant::now();
        // A killed daemon leaves its `ready` behind: it is this one's when it holds its process id.
        let own = format!("{}\n", worker.child.id());
        let ready = worker.run_dir().join("ready");
        while std::fs::read_to_string(&ready).unwrap_or_default() != own {
            if let Some(status) = worker.child.try_wait()? {
                bail!("reapd ended with {status}: {}", worker.log());
            }
            if began.elapsed() > PATIENCE {
                bail!("reapd is not ready: {}", worker.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(worker)
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("reapd.log")).unwrap_or_default()
    }

    /// Where the store is mounted.
    pub fn mount(&self) -> PathBuf {
        self.directory.join("mnt")
    }

    /// The directory of its sockets.
    pub fn run_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// Its process.
    pub fn process_id(&self) -> u32 {
        self.child.id()
    }

    /// Runs `reapd COMMAND --json` against it.
    pub fn ask(&self, command: &str, arguments: &[&str]) -> Result<Value> {
        let output = Command::new(program("reapd")?)
            .args(["--json", command, "--run-dir"])
            .arg(self.run_dir())
            .args(arguments)
            .output()?;
        succeeded(&format!("reapd {command}"), &output)?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// What it has counted, as Prometheus reads it.
    pub fn metrics(&self) -> Result<String> {
        let text = self.ask("metrics", &[])?;
        Ok(text.as_str().context("metrics are a text")?.to_owned())
    }

    /// Prepares a snapshot; answers with its paths.
    pub fn prepare(&self, name: &str, mode: &str) -> Result<Value> {
        self.ask("prepare", &[name, "--mode", mode])
    }

    /// The newest restore.
    pub fn newest_restore(&self) -> Result<Value> {
        let status = self.ask("status", &[])?;
        let restores = status["restores"].as_array().cloned().unwrap_or_default();
        restores.last().cloned().context("there was no restore")
    }

    /// Waits until `wanted` is true of the newest restore.
    pub fn wait_for_restore(&self, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let began = Instant::now();
        loop {
            let newest = self.newest_restore()?;
            if wanted(&newest) {
                return Ok(newest);
            }
            if began.elapsed() > PATIENCE {
                bail!("the restore never came so far: {newest}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until the prepared snapshot has a working set.
    pub fn wait_for_working_set(&self, name: &str) -> Result<u64> {
        let has_one = |snapshot: &Value| snapshot["working_set"].as_u64();
        self.wait_for_snapshot(name, has_one)
    }

    /// Waits until the daemon has published so many working sets for `name`, or `name,profile`.
    pub fn wait_for_published(&self, name: &str, count: u64) -> Result<u64> {
        let published = |snapshot: &Value| snapshot["learning"]["published"].as_u64();
        self.wait_for_snapshot(name, |snapshot| published(snapshot).filter(|sets| *sets >= count))
    }

    fn wait_for_snapshot(&self, name: &str, wanted: impl Fn(&Value) -> Option<u64>) -> Result<u64> {
        let (name, profile) = name.split_once(',').unwrap_or((name, ""));
        let began = Instant::now();
        loop {
            let status = self.ask("status", &[])?;
            let snapshots = status["snapshots"].as_array().cloned().unwrap_or_default();
            let found = snapshots
                .iter()
                .find(|snapshot| snapshot["name"] == name && snapshot["profile"] == profile);
            if let Some(sequence) = found.and_then(&wanted) {
                return Ok(sequence);
            }
            if began.elapsed() > PATIENCE {
                bail!("{name} never got its working set: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Ends it as systemd does, and waits.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            let pid = i32::try_from(self.child.id())?;
            let pid = Pid::from_raw(pid).context("a process id")?;
            rustix::process::kill_process(pid, Signal::TERM)?;
        }
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait()? {
                if !status.success() {
                    bail!("reapd ended with {status}: {}", self.log());
                }
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("reapd does not stop: {}", self.log())
    }

    /// Ends it as a crash does: the mount stays behind, dead.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("{error:#}");
            self.child.kill().unwrap_or_default();
            let _gone = self.child.wait();
        }
        // Nothing there is the usual answer.
        let flags = rustix::mount::UnmountFlags::DETACH;
        rustix::mount::unmount(self.mount(), flags).unwrap_or_default();
    }
}
