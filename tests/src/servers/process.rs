//! A server's process on a port of loopback.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

/// How long a server may take to answer for the first time.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program that `tests/servers/install.sh` puts into `target/servers`.
pub(super) fn installed(name: &str) -> Result<PathBuf> {
    let servers = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/servers");
    let program = servers.join(name);
    ensure!(program.exists(), "there is no {}: run tests/servers/install.sh", program.display());
    Ok(program)
}

/// Ready when it accepts connections.
pub(super) fn answers(port: u16) -> Result<()> {
    TcpStream::connect(("127.0.0.1", port))?;
    Ok(())
}

/// Arguments of a command line.
pub(super) fn arguments<const N: usize>(parts: [&str; N]) -> Vec<String> {
    parts.map(str::to_owned).into()
}

/// A process, ended on drop.
pub(super) struct Process {
    child: Child,
    pub(super) port: u16,
}

impl Process {
    /// Starts `program` on a free port with the arguments for it, and waits until it is ready.
    pub(super) fn start(
        program: &Path,
        arguments: &dyn Fn(u16) -> Vec<String>,
        ready: &dyn Fn(u16) -> Result<()>,
    ) -> Result<Self> {
        // Free a moment ago; whoever takes it in between makes this start fail, and say so.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let mut process = Self { child: spawn(program, &arguments(port))?, port };
        process.wait_until(ready)?;
        Ok(process)
    }

    /// The same on the same port.
    pub(super) fn start_again(
        &mut self,
        program: &Path,
        arguments: &dyn Fn(u16) -> Vec<String>,
        ready: &dyn Fn(u16) -> Result<()>,
    ) -> Result<()> {
        self.child = spawn(program, &arguments(self.port))?;
        self.wait_until(ready)
    }

    fn wait_until(&mut self, ready: &dyn Fn(u16) -> Result<()>) -> Result<()> {
        let began = Instant::now();
        while let Err(error) = ready(self.port) {
            if let Some(status) = self.child.try_wait()? {
                bail!("the server ended with {status}");
            }
            if began.elapsed() > PATIENCE {
                return Err(error.context("the server does not answer"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    pub(super) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

fn spawn(program: &Path, arguments: &[String]) -> Result<Child> {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Ok(command.spawn()?)
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already is the usual answer of one that was killed.
        let _ended = self.kill();
    }
}
