//! QEMU's machine protocol: one JSON object a line, commands and answers, with events in between.

use super::line::Lines;
use super::qemu::Process;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long QEMU may take for anything but a command that is known to be slow.
pub(super) const PROMPT: Duration = Duration::from_secs(30);

/// A connection that has been through QMP's greeting.
#[derive(Debug)]
pub(super) struct Qmp {
    lines: Lines,
}

impl Qmp {
    pub(super) fn connect(process: &mut Process, socket: &Path) -> Result<Qmp> {
        let mut qmp = Qmp { lines: Lines::connect(process, socket, "QMP", PROMPT)? };
        qmp.lines.receive(process, PROMPT)?;
        qmp.execute(process, "qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns what it returned.
    pub(super) fn execute(
        &mut self,
        process: &mut Process,
        command: &str,
        arguments: &Value,
    ) -> Result<Value> {
        self.send(process, command, arguments)?;
        self.answer(process, command, PROMPT)
    }

    /// Sends a command whose answer somebody asks for later.
    pub(super) fn send(
        &mut self,
        process: &Process,
        command: &str,
        arguments: &Value,
    ) -> Result<()> {
        let request = json!({"execute": command, "arguments": arguments});
        self.lines.send(process, &request.to_string())
    }

    /// The answer to the command that was sent last.
    pub(super) fn answer(
        &mut self,
        process: &mut Process,
        command: &str,
        timeout: Duration,
    ) -> Result<Value> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self
                .lines
                .receive(process, left)
                .with_context(|| format!("no answer to the QMP command {command}"))?;
            let mut message: Value = serde_json::from_str(&line)
                .with_context(|| format!("QMP is not JSON after {command}: {line}"))?;
            if let Some(error) = message.get("error") {
                bail!(process.failure(command, &format!("was refused: {}", error["desc"])));
            }
            if message.get("return").is_some() {
                return Ok(message["return"].take());
            }
        }
    }

    /// Carries guest memory neither out nor in: the memory file is the memory.
    pub(super) fn ignore_shared_memory(&mut self, process: &mut Process) -> Result<()> {
        let capability = json!([{"capability": "x-ignore-shared", "state": true}]);
        let arguments = json!({"capabilities": capability});
        self.execute(process, "migrate-set-capabilities", &arguments)?;
        Ok(())
    }

    /// Waits until an outgoing migration is over.
    pub(super) fn wait_until_saved(&mut self, process: &mut Process) -> Result<()> {
        let deadline = Instant::now() + PROMPT;
        loop {
            let migration = self.execute(process, "query-migrate", &json!({}))?;
            match migration["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    bail!(process.failure("saving the state", &migration.to_string()))
                }
                _ if Instant::now() > deadline => {
                    bail!(process.failure("saving the state", "takes too long"))
                }
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Waits until an incoming migration has been loaded. QEMU ends when it fails.
    pub(super) fn wait_until_loaded(&mut self, process: &mut Process) -> Result<()> {
        let deadline = Instant::now() + PROMPT;
        loop {
            let status = self.execute(process, "query-status", &json!({}))?;
            match status["status"].as_str() {
                Some("paused" | "prelaunch") => return Ok(()),
                Some("inmigrate") if Instant::now() <= deadline => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                _ => bail!(process.failure("loading the state", &format!("ended as {status}"))),
            }
        }
    }
}
