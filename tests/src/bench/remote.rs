//! The functions in a store that is shaped as S3 is: each answer begins late, and each connection is slow.
//!
//! The server keeps the objects in this process's memory and answers at once, so that what is measured is the
//! shape and our own work, not a server's. It speaks HTTP without TLS, and a connection is made at once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::touch::Touched;
use super::ways::{Function, touch_apart};
use crate::proxy::{Delay, Entry, Plan, Proxy, Shape, rounds, server_in};
use crate::servers::{Environment, StandIn};
use crate::worker::{Worker, reap_pack_command};

/// Until the first byte of an answer.
const FIRST_BYTE: Duration = Duration::from_millis(30);
/// Of each connection.
const BYTES_PER_SECOND: u64 = 90_000_000;
/// What a start may take: so many rounds, the stored bytes over so many connections, and a fifth more.
const ROUNDS: u32 = 3;
const CONNECTIONS: u64 = 16;
const ALLOWANCE: f64 = 1.2;

/// Most that a start with a working set of so many stored bytes may take, milliseconds.
pub fn bound_ms(stored_bytes: u64) -> f64 {
    let rounds = FIRST_BYTE.as_secs_f64() * f64::from(ROUNDS);
    let bytes = stored_bytes as f64 / (CONNECTIONS * BYTES_PER_SECOND) as f64;
    (rounds + bytes) * ALLOWANCE * 1000.0
}

/// Such a store.
pub struct Remote {
    // Ended in this order.
    proxy: Proxy,
    server: StandIn,
    scratch: PathBuf,
    /// Stored bytes of each function's.
    working_sets: BTreeMap<String, u64>,
}

/// What a start from it took.
#[derive(Clone, Debug)]
pub struct RemoteStart {
    /// From the call that prepares the name.
    pub touched: Touched,
    /// What was asked of the store meanwhile.
    pub requests: Vec<Entry>,
}

impl RemoteStart {
    /// Rounds of requests, one after the other.
    pub fn rounds(&self) -> usize {
        rounds(&self.requests)
    }
}

impl Remote {
    /// Copies the functions and their working sets there, from the store at `url`.
    pub fn set_up(url: &str, functions: &[Function], scratch: &Path) -> Result<Self> {
        let server = StandIn::start()?;
        let proxy = Proxy::start(server_in(server.environment())?, Plan::default())?;
        let working_sets = BTreeMap::new();
        let mut remote = Self { proxy, server, scratch: scratch.to_owned(), working_sets };
        let to = remote.server.url();
        remote.reap_pack(&to, &["init"])?;
        for function in functions {
            remote.reap_pack(url, &["copy", &function.name, "--to", &to])?;
            let listed = remote.reap_pack(&to, &["ws", "ls", &function.name])?;
            let bytes = listed[0]["stored_bytes"].as_u64().context("a working set")?;
            remote.working_sets.insert(function.name.clone(), bytes);
        }
        let shape = Shape {
            first_byte: Delay::Fixed(FIRST_BYTE),
            bytes_per_second: Some(BYTES_PER_SECOND),
        };
        remote.proxy.follow(Plan { shape, ..Plan::default() });
        Ok(remote)
    }

    fn environment(&self) -> Environment {
        self.proxy.environment(self.server.environment_with_keys())
    }

    fn reap_pack(&self, url: &str, arguments: &[&str]) -> Result<Value> {
        let mut command = reap_pack_command(url, &[&["--json"], arguments].concat())?;
        let output = command.envs(self.environment()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{arguments:?}: {said}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Stored bytes of the function's working set.
    pub fn working_set_bytes(&self, function: &Function) -> u64 {
        self.working_sets.get(&function.name).copied().unwrap_or(0)
    }

    /// One start on a node that knows nothing but the store's URL and the function's name.
    pub fn start(&self, function: &Function) -> Result<RemoteStart> {
        let directory = tempfile::tempdir_in(&self.scratch)?;
        let worker =
            Worker::start_with(&self.server.url(), directory.path(), &[], &self.environment())?;
        self.proxy.forget();
        let api = worker.run_dir().join("api.sock");
        let api = api.to_str().context("a path in UTF-8")?;
        let touched = touch_apart(function, &["prepare", api, &function.name])?;
        let requests = self.proxy.requests();
        worker.stop()?;
        Ok(RemoteStart { touched, requests })
    }
}
