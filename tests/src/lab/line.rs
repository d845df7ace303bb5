//! Lines over a Unix socket of QEMU, with a deadline and an eye on QEMU itself.

use super::qemu::Process;
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a wait looks whether QEMU still lives.
const GLANCE: Duration = Duration::from_millis(100);

/// One of QEMU's sockets: the guest's serial line, or QMP.
#[derive(Debug)]
pub(super) struct Lines {
    stream: BufReader<UnixStream>,
    what: &'static str,
}

impl Lines {
    /// Connects, as soon as QEMU listens.
    pub(super) fn connect(
        process: &mut Process,
        socket: &Path,
        what: &'static str,
        timeout: Duration,
    ) -> Result<Lines> {
        let deadline = Instant::now() + timeout;
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(GLANCE))?;
                    stream.set_write_timeout(Some(timeout))?;
                    return Ok(Lines { stream: BufReader::new(stream), what });
                }
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| process.failure(what, "did not listen"));
                }
                Err(_) => process.check_alive(what)?,
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(super) fn send(&mut self, process: &Process, line: &str) -> Result<()> {
        let mut bytes = line.as_bytes().to_vec();
        bytes.push(b'\n');
        self.stream
            .get_mut()
            .write_all(&bytes)
            .with_context(|| process.failure(self.what, "cannot be written to"))
    }

    /// The next line, without its end.
    pub(super) fn receive(&mut self, process: &mut Process, timeout: Duration) -> Result<String> {
        let deadline = Instant::now() + timeout;
        let mut line = Vec::new();
        loop {
            // What a read that timed out had already got stays in `line`.
            match self.stream.read_until(b'\n', &mut line) {
                Ok(_) if line.ends_with(b"\n") => {
                    line.pop();
                    return Ok(String::from_utf8(line)?);
                }
                Ok(_) => bail!(process.failure(self.what, "was closed")),
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                        process.check_alive(self.what)?
                    }
                    ErrorKind::Interrupted => (),
                    _ => return Err(error).with_context(|| process.failure(self.what, "failed")),
                },
            }
            if Instant::now() > deadline {
                bail!(process.failure(self.what, &format!("gave no line in {timeout:?}")));
            }
        }
    }
}
