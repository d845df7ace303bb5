//! A guest: requests, snapshots, restores.

use super::Snapshot;
use super::line::Lines;
use super::memory::{self, Comparison};
use super::qemu::{Machine, Mode, Process};
use super::qmp::{PROMPT, Qmp};
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a boot may take: seconds as a rule, more on a machine that builds something meanwhile.
const BOOT: Duration = Duration::from_secs(180);
/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(60);

/// A guest in its own QEMU, which ends when this is dropped.
#[derive(Debug)]
pub struct Guest {
    // Sockets before the process: they close first.
    requests: Lines,
    qmp: Qmp,
    process: Process,
    function: String,
    memory: PathBuf,
    disk: PathBuf,
    memory_mib: u32,
    /// Its memory file is its memory: only then can it become a snapshot.
    booted: bool,
    times: Times,
}

/// The moments of a start.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// QEMU was started.
    pub started: Instant,
    /// A restore's state was loaded, or a boot's function was ready.
    pub loaded: Instant,
    /// `cont` was sent; `None` while the guest is paused. A boot counts as resumed when it is ready.
    pub resumed: Option<Instant>,
    /// QEMU acknowledged `cont`.
    pub acknowledged: Option<Instant>,
}

/// A function's answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// All of it; depends on nothing but the request's input.
    pub line: String,
    /// The function's checksum over what it made.
    pub checksum: String,
    /// From sending the request.
    pub took: Duration,
    /// From sending `cont`: for the first answer, the time that counts.
    pub since_resume: Duration,
}

impl Guest {
    pub(super) fn boot(machine: &Machine<'_>) -> Result<Guest> {
        let mut guest = Guest::start(machine)?;
        let line = guest
            .requests
            .receive(&mut guest.process, BOOT)
            .with_context(|| format!("{} does not boot", machine.function))?;
        let message: Value = serde_json::from_str(&line)
            .with_context(|| format!("the guest's first line is not JSON: {line:?}"))?;
        ensure!(message["ready"] == machine.function, "the guest's first line was {line:?}");
        guest.times.loaded = Instant::now();
        guest.times.resumed = Some(guest.times.loaded);
        guest.times.acknowledged = Some(guest.times.loaded);
        Ok(guest)
    }

    pub(super) fn restore_paused(machine: &Machine<'_>, state: &Path) -> Result<Guest> {
        // QEMU would wait for a stream that never comes.
        fs::metadata(state).with_context(|| format!("no state at {}", state.display()))?;
        let mut guest = Guest::start(machine)?;
        let Guest { qmp, process, .. } = &mut guest;
        qmp.ignore_shared_memory(process)?;
        let uri = format!("exec:exec cat {}", shell_quoted(state)?);
        qmp.execute(process, "migrate-incoming", &json!({"uri": uri}))?;
        qmp.wait_until_loaded(process)?;
        guest.times.loaded = Instant::now();
        Ok(guest)
    }

    fn start(machine: &Machine<'_>) -> Result<Guest> {
        let mut process = machine.start()?;
        let socket = process.directory().join("qmp");
        let qmp = Qmp::connect(&mut process, &socket)?;
        let socket = process.directory().join("requests");
        let requests = Lines::connect(&mut process, &socket, "the guest", PROMPT)?;
        let started = process.started;
        Ok(Guest {
            requests,
            qmp,
            process,
            function: machine.function.to_owned(),
            memory: machine.memory.to_owned(),
            disk: machine.disk.to_owned(),
            memory_mib: machine.memory_mib,
            booted: matches!(machine.mode, Mode::Boot),
            times: Times { started, loaded: started, resumed: None, acknowledged: None },
        })
    }

    /// Lets a paused guest run.
    pub fn resume(&mut self) -> Result<()> {
        self.times.resumed = Some(Instant::now());
        self.qmp.execute(&mut self.process, "cont", &json!({}))?;
        self.times.acknowledged = Some(Instant::now());
        Ok(())
    }

    /// Asks the guest's function; any text is an input.
    pub fn request(&mut self, input: &str) -> Result<Answer> {
        let Some(resumed) = self.times.resumed else {
            bail!("the guest is paused");
        };
        let request = json!({"input": input}).to_string();
        let sent = Instant::now();
        self.requests.send(&self.process, &request)?;
        let line = self.requests.receive(&mut self.process, ANSWER)?;
        let (took, since_resume) = (sent.elapsed(), resumed.elapsed());
        let message: Value = serde_json::from_str(&line)
            .with_context(|| format!("the guest's answer is not JSON: {line:?}"))?;
        match message["output"]["checksum"].as_str() {
            Some(checksum) if message["input"] == input => {
                Ok(Answer { checksum: checksum.to_owned(), line, took, since_resume })
            }
            _ => bail!("{} did not answer {input:?} but {line}", self.function),
        }
    }

    /// Pauses the guest and writes it to `directory` as `memory`, `state` and `disk`; QEMU is gone
    /// afterwards and the files are on the disk. Only for a guest that was booted: a restored one does
    /// not write to its memory file.
    pub fn snapshot(mut self, directory: &Path) -> Result<Snapshot> {
        ensure!(self.booted, "only a guest that was booted can become a snapshot");
        fs::create_dir_all(directory)?;
        let directory = fs::canonicalize(directory)?;
        let snapshot = Snapshot::at(&directory, &self.function, self.memory_mib);
        for path in [&snapshot.memory, &snapshot.state, &snapshot.disk] {
            ensure!(!path.exists() || *path == self.memory, "{} is there already", path.display());
        }
        let Guest { qmp, process, .. } = &mut self;
        qmp.execute(process, "stop", &json!({}))?;
        qmp.ignore_shared_memory(process)?;
        // The name says that `cat` is through: QEMU's own word does not wait for it.
        let partial = directory.join("state.part");
        let (from, to) = (shell_quoted(&partial)?, shell_quoted(&snapshot.state)?);
        let uri = format!("exec:cat > {from} && mv {from} {to}");
        qmp.execute(process, "migrate", &json!({"uri": uri}))?;
        qmp.wait_until_saved(process)?;
        qmp.execute(process, "quit", &json!({}))?;
        process.wait(PROMPT)?;
        wait_for(&snapshot.state)?;
        move_file(&self.memory, &snapshot.memory)?;
        if fs::hard_link(&self.disk, &snapshot.disk).is_err() {
            fs::copy(&self.disk, &snapshot.disk)?;
        }
        memory::dig_holes(&snapshot.memory)?;
        for path in [&snapshot.memory, &snapshot.state, &snapshot.disk] {
            File::open(path)?.sync_all()?;
        }
        Ok(snapshot)
    }

    /// Reads all of guest memory through the paths by which the guest itself would get it, and compares
    /// it with a memory file. Meaningful before `resume`; afterwards no page is cold any more.
    pub fn compare_memory(&mut self, memory: &Path) -> Result<Comparison> {
        ensure!(self.times.resumed.is_none(), "the guest runs: its memory changes");
        memory::compare(&mut self.process, &mut self.qmp, memory, self.memory_mib)
    }

    /// When what happened.
    #[must_use]
    pub fn times(&self) -> Times {
        self.times
    }

    /// QEMU's process.
    #[must_use]
    pub fn process_id(&self) -> u32 {
        self.process.id()
    }

    /// Waits until QEMU ends by itself, as when somebody else kills it; an error when it does not.
    pub fn wait_until_dead(&mut self, timeout: Duration) -> Result<()> {
        self.process.wait(timeout).map(drop)
    }
}

/// A path as one word of a shell command.
fn shell_quoted(path: &Path) -> Result<String> {
    let text = path.to_str().with_context(|| format!("not UTF-8: {}", path.display()))?;
    Ok(format!("'{}'", text.replace('\'', r"'\''")))
}

fn wait_for(path: &Path) -> Result<()> {
    let deadline = Instant::now() + PROMPT;
    while !path.exists() {
        ensure!(Instant::now() < deadline, "QEMU left no {}", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn move_file(from: &Path, to: &Path) -> Result<()> {
    if fs::rename(from, to).is_err() {
        fs::copy(from, to)?;
        fs::remove_file(from)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quoted_path_is_one_word_of_the_shell() -> Result<()> {
        let path = Path::new("/a b/it's $HOME");
        let echo = format!("printf %s {}", shell_quoted(path)?);
        let output = std::process::Command::new("sh").args(["-c", &echo]).output()?;
        assert_eq!(output.stdout, b"/a b/it's $HOME");
        Ok(())
    }
}
