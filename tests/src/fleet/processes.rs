//! `reap-pack` as processes that are killed and stopped.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::proxy::Draws;
use crate::worker::{reap_pack, reap_pack_command};

/// A process that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(240);
/// One process in so many is killed, and one in so many is stopped for a while.
const KILLED: usize = 7;
const STOPPED: usize = 6;

/// What happens to a process, from its start on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chaos {
    delay: Duration,
    kill_after: Option<Duration>,
    stop: Option<(Duration, Duration)>,
}

impl Chaos {
    pub(super) fn draw(draws: &mut Draws, delay: Duration) -> Self {
        let [soon, later, long] = [2, 1500, 3500].map(Duration::from_millis);
        let kill_after = (draws.below(KILLED) == 0).then(|| draws.between(&(soon..later)));
        let stop = (draws.below(STOPPED) == 0)
            .then(|| (draws.between(&(soon..later)), draws.between(&(soon..long))));
        Self { delay, kill_after, stop }
    }
}

/// How to start the programs.
pub(super) struct Programs {
    url: String,
    proxy: SocketAddr,
    directory: PathBuf,
}

/// A process that a thread of ours looks after.
pub(super) struct Started(JoinHandle<Result<Ended>>);

/// A process that has ended.
pub(super) struct Ended {
    pub(super) what: String,
    /// `None` if it was killed.
    pub(super) output: Option<Output>,
    pub(super) was_stopped: bool,
}

impl Programs {
    pub(super) fn new(url: &str, proxy: SocketAddr, directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        Ok(Self { url: url.to_owned(), proxy, directory: directory.to_owned() })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// The server's place for those that go through the proxy.
    pub(super) fn endpoint(&self) -> (&'static str, String) {
        ("AWS_ENDPOINT_URL", format!("http://{}", self.proxy))
    }

    /// Runs a command past the proxy, to its good end.
    pub(super) fn quietly(&self, arguments: &[&str]) -> Result<()> {
        let output = reap_pack(&self.url, arguments)?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{arguments:?} ended with {}: {said}", output.status);
        Ok(())
    }

    /// Starts a command behind the proxy, on node number `node`.
    pub(super) fn start(&self, arguments: &[&str], node: usize, chaos: Chaos) -> Result<Started> {
        let mut command = reap_pack_command(&self.url, &[&["--json"], arguments].concat())?;
        let (variable, value) = self.endpoint();
        command
            .env(variable, value)
            .env("REAP_INDEX", self.directory.join(format!("index-{node}")))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let what = arguments.join(" ");
        let thread = std::thread::Builder::new().name(what.chars().take(15).collect());
        let looked_after = thread.spawn(move || {
            std::thread::sleep(chaos.delay);
            look_after(command.spawn()?, what, chaos)
        });
        Ok(Started(looked_after?))
    }
}

impl Started {
    /// Waits for its end.
    pub(super) fn wait(self) -> Result<Ended> {
        self.0.join().map_err(|_| anyhow!("a thread of the test panicked"))?
    }
}

impl Ended {
    pub(super) fn succeeded(&self) -> bool {
        self.output.as_ref().is_some_and(|output| output.status.success())
    }

    pub(super) fn printed(&self) -> &[u8] {
        self.output.as_ref().map_or(&[], |output| &output.stdout)
    }

    pub(super) fn said(&self) -> String {
        let output = self.output.as_ref();
        output.map_or_else(String::new, |output| String::from_utf8_lossy(&output.stderr).into())
    }
}

/// Waits for a process, and does to it what chaos wants. Its output is small: it fits into the pipes.
fn look_after(mut child: Child, what: String, chaos: Chaos) -> Result<Ended> {
    let began = Instant::now();
    let pid = Pid::from_raw(i32::try_from(child.id())?).context("a process id")?;
    let (mut was_stopped, mut goes_on_at) = (false, None);
    while child.try_wait()?.is_none() {
        let age = began.elapsed();
        if chaos.kill_after.is_some_and(|after| age >= after) {
            child.kill()?;
            child.wait()?;
            return Ok(Ended { what, output: None, was_stopped });
        }
        match chaos.stop {
            Some((after, long)) if !was_stopped && age >= after => {
                kill_process(pid, Signal::STOP)?;
                (was_stopped, goes_on_at) = (true, Some(age + long));
            }
            _ => {}
        }
        if goes_on_at.is_some_and(|at| age >= at) {
            kill_process(pid, Signal::CONT)?;
            goes_on_at = None;
        }
        if age > PATIENCE {
            child.kill()?;
            return Err(anyhow!("{what} did not end in {PATIENCE:?}"));
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    let output = Some(child.wait_with_output()?);
    Ok(Ended { what, output, was_stopped })
}
