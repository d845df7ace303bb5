//! Object-store servers for tests, on loopback, ended with the value that stands for them.

mod process;
mod stand_in;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use process::{Process, answers, arguments, installed};
pub use stand_in::{Behaviour, StandIn};

const BUCKET: &str = "snapshots";

/// Variables of a program's environment.
pub type Environment = Vec<(&'static str, String)>;

/// Runs one test of this program in a process with this environment, as a user's program has it; answers
/// with what it printed.
pub fn run_body(name: &str, environment: &[(&'static str, String)]) -> Result<String> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--exact", name, "--nocapture"])
        .envs(environment.iter().cloned())
        .output()?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{printed}{said}");
    Ok(printed)
}

/// What programs need to find an S3 server on this port.
fn s3_environment(port: u16, key: &str, secret: &str) -> Environment {
    vec![
        ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
        ("AWS_ACCESS_KEY_ID", key.into()),
        ("AWS_SECRET_ACCESS_KEY", secret.into()),
        ("AWS_REGION", "us-east-1".into()),
        ("NO_PROXY", "127.0.0.1".into()),
    ]
}

/// moto: S3's semantics, create-only included, in memory.
pub struct Moto(Process);

impl Moto {
    /// Starts one with an empty bucket. `tests/servers/install.sh` puts it into `target/servers/moto`.
    pub fn start() -> Result<Self> {
        let program = installed("moto/bin/python")?;
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/servers/s3_mock.py");
        let with = |port: u16| arguments([script, &port.to_string()]);
        Ok(Self(Process::start(&program, &with, &make_bucket)?))
    }

    /// URL of a store in its bucket.
    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{BUCKET}/{prefix}")
    }

    /// What our programs need to find it.
    pub fn environment(&self) -> Environment {
        s3_environment(self.0.port, "key", "secret")
    }

    /// Its process.
    pub fn process_id(&self) -> u32 {
        self.0.id()
    }
}

fn make_bucket(port: u16) -> Result<()> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    let head = format!("PUT /{BUCKET} HTTP/1.1\r\nHost: 127.0.0.1\r\n");
    write!(stream, "{head}Content-Length: 0\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.lines().next().context("an answer")?;
    ensure!(status.contains(" 200 "), "{status}");
    Ok(())
}

/// An S3 server that does not keep create-only.
pub struct Careless {
    process: Process,
    keys: (&'static str, &'static str),
}

impl Careless {
    /// s3rver: ignores `If-None-Match` and overwrites. Over an empty directory, with an empty bucket.
    pub fn overwriting(directory: &Path) -> Result<Self> {
        let directory = directory.display().to_string();
        let with = |port: u16| {
            let place = ["-d", &directory, "-a", "127.0.0.1", "-p", &port.to_string()];
            [arguments(place), arguments(["--configure-bucket", BUCKET])].concat()
        };
        let program = installed("npm/node_modules/.bin/s3rver")?;
        let process = Process::start(&program, &with, &answers)?;
        Ok(Self { process, keys: ("S3RVER", "S3RVER") })
    }

    /// s3s-fs: looks whether a key is there and then writes it, so that several of those who create it at the
    /// same time succeed. Over an empty directory, with an empty bucket.
    pub fn racing(directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory.join(BUCKET))?;
        let directory = directory.display().to_string();
        let (key, secret) = ("key", "secret");
        let with = |port: u16| {
            let keys = ["--access-key", key, "--secret-key", secret];
            let place = ["--host", "127.0.0.1", "--port", &port.to_string(), &directory];
            [arguments(keys), arguments(place)].concat()
        };
        let program = installed("s3s/bin/s3s-fs")?;
        let process = Process::start(&program, &with, &answers)?;
        Ok(Self { process, keys: (key, secret) })
    }

    /// What our programs need to find it.
    pub fn environment(&self) -> Environment {
        let (key, secret) = self.keys;
        s3_environment(self.process.port, key, secret)
    }
}

/// azurite: Azure's blob storage, on disk.
pub struct Azurite(Process);

impl Azurite {
    /// Starts one over an empty directory, with an empty container.
    pub fn start(directory: &Path) -> Result<Self> {
        Ok(Self(Process::start(&installed(AZURITE)?, &azurite(directory), &make_container)?))
    }

    /// Ends its process as a crash does.
    pub fn kill(&mut self) -> Result<()> {
        self.0.kill()
    }

    /// Starts another one over the same directory, at the same address.
    pub fn start_again(&mut self, directory: &Path) -> Result<()> {
        self.0.start_again(&installed(AZURITE)?, &azurite(directory), &answers)
    }

    /// URL of a store in its container.
    pub fn url(&self, prefix: &str) -> String {
        format!("az://{BUCKET}/{prefix}")
    }

    /// What our programs need to find it.
    pub fn environment(&self) -> Environment {
        vec![
            ("AZURE_STORAGE_USE_EMULATOR", "true".into()),
            ("AZURITE_BLOB_STORAGE_URL", format!("http://127.0.0.1:{}", self.0.port)),
            ("NO_PROXY", "127.0.0.1".into()),
        ]
    }
}

const AZURITE: &str = "npm/node_modules/.bin/azurite-blob";

fn azurite(directory: &Path) -> impl Fn(u16) -> Vec<String> {
    let directory = directory.display().to_string();
    move |port| {
        let place = ["--location", &directory, "--blobHost", "127.0.0.1"];
        // The client may speak a newer version of the protocol than the emulator knows by name.
        let how = ["--blobPort", &port.to_string(), "--skipApiVersionCheck", "--silent"];
        [arguments(place), arguments(how)].concat()
    }
}

fn make_container(port: u16) -> Result<()> {
    answers(port)?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("servers/make-container.js");
    let url = format!("http://127.0.0.1:{port}");
    let made = Command::new("node").arg(script).args([&url, BUCKET]).output()?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    Ok(())
}
