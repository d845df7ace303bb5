//! `pretend-vmm` as a process: a VMM that touches what it is told to and checks every byte.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::worker::program;

/// A running pretend VMM, ended on drop.
pub struct PretendVmm {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl PretendVmm {
    /// Starts one; its memory is served at `socket`, and should be what `memory_file` holds.
    pub fn start(socket: &str, memory_file: &Path) -> Result<Self> {
        let mut child = Command::new(program("pretend-vmm")?)
            .arg(socket)
            .arg(memory_file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let commands = child.stdin.take().context("a pipe")?;
        let answers = BufReader::new(child.stdout.take().context("a pipe")?);
        let mut vmm = Self { child, commands, answers };
        let ready = vmm.answer()?;
        ensure!(ready.as_deref() == Some("ready"), "the pretend VMM said {ready:?}");
        Ok(vmm)
    }

    /// Gives a command, without waiting.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        Ok(writeln!(self.commands, "{command}")?)
    }

    /// The answer to the oldest command; `None` if the process ends instead.
    pub fn answer(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        Ok(line.strip_prefix("ANSWER ").map(|answer| answer.trim_end().to_owned()))
    }

    /// The answer to a `check`: how long each touch took, in microseconds. An error if a byte was wrong; `None` if the
    /// process ended.
    pub fn touches_us(&mut self) -> Result<Option<Vec<u64>>> {
        let Some(answer) = self.answer()? else { return Ok(None) };
        let Some(times) = answer.strip_prefix("right") else { bail!("{answer}") };
        let times = times.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        Ok(Some(times))
    }

    /// Its process.
    pub fn process_id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end; whether it came in time.
    pub fn ends_within(&mut self, limit: Duration) -> Result<bool> {
        let began = Instant::now();
        while self.child.try_wait()?.is_none() {
            if began.elapsed() > limit {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(true)
    }
}

impl Drop for PretendVmm {
    fn drop(&mut self) {
        self.child.kill().unwrap_or_default();
        let _ended = self.child.wait();
    }
}

/// A quantile of times, sorted in place.
pub fn quantile(times_us: &mut [u64], part: f64) -> u64 {
    times_us.sort_unstable();
    let rank = (times_us.len() as f64 * part).ceil() as usize;
    times_us.get(rank.clamp(1, times_us.len().max(1)) - 1).copied().unwrap_or(0)
}
