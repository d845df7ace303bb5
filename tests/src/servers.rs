//! Object-store servers for tests, on loopback, ended with the value that stands for them.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long a server may take to answer for the first time.
const PATIENCE: Duration = Duration::from_secs(60);
const BUCKET: &str = "snapshots";

/// moto: S3's semantics, create-only included, in memory.
pub struct Moto {
    child: Child,
    port: u16,
}

impl Moto {
    /// Starts one with an empty bucket. `tests/servers/install.sh` puts it into `target/servers/moto`.
    pub fn start() -> Result<Self> {
        let program =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/servers/moto/bin/moto_server");
        ensure!(
            program.exists(),
            "there is no {}: run tests/servers/install.sh",
            program.display()
        );
        // Free a moment ago; whoever takes it in between makes this start fail, and say so.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let child = Command::new(program)
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let mut server = Self { child, port };
        let began = Instant::now();
        while let Err(error) = server.make_bucket() {
            if let Some(status) = server.child.try_wait()? {
                bail!("moto ended with {status}");
            }
            if began.elapsed() > PATIENCE {
                return Err(error.context("moto does not answer"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }

    fn make_bucket(&self) -> Result<()> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        let head = format!("PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1\r\n");
        write!(stream, "{head}Content-Length: 0\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let status = answer.lines().next().context("an answer")?;
        ensure!(status.contains(" 200 "), "{status}");
        Ok(())
    }

    /// URL of a store in its bucket.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// What our programs need to find it.
    pub fn environment(&self) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", self.port)),
            ("AWS_ACCESS_KEY_ID", "key".into()),
            ("AWS_SECRET_ACCESS_KEY", "secret".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("NO_PROXY", "127.0.0.1".into()),
        ]
    }

    /// Its process.
    pub fn process_id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        self.child.kill().unwrap_or_default();
        let _ended = self.child.wait();
    }
}
