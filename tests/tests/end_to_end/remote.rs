//! The same programs over S3's protocol, against a server that this test starts.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use reap_tests::servers::{Azurite, Moto, run_body};
use reap_tests::worker::{Worker, program, reap_pack, reap_pack_json};
use rustix::process::{Pid, Signal};

use super::{Fixture, past_the_page_cache, read_backwards, same_bytes};

pub(super) const STORE: &str = "REAP_TEST_S3_STORE";
const SERVER: &str = "REAP_TEST_S3_SERVER";

/// Runs the body, the path of a test, in a process whose environment names the server, as a user's does.
pub(super) fn with_server(body: &str) -> Result<()> {
    let server = Moto::start()?;
    let mut environment = server.environment();
    environment.push((STORE, server.url("fleet/one")));
    environment.push((SERVER, server.process_id().to_string()));
    run_body(body, &environment).map(|_| ())
}

/// For such a body: its store, and the server's process. `None` where it was not asked for.
pub(super) fn store_and_server() -> Result<Option<(String, Pid)>> {
    let Ok(url) = std::env::var(STORE) else { return Ok(None) };
    let server: i32 = std::env::var(SERVER)?.parse()?;
    Ok(Some((url, Pid::from_raw(server).context("a process id")?)))
}

#[test]
fn a_snapshot_goes_through_s3_and_is_collected() -> Result<()> {
    with_server("remote::through_s3")
}

#[test]
fn a_snapshot_goes_through_azure_and_is_collected() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let server = Azurite::start(directory.path())?;
    let mut environment = server.environment();
    environment.push((STORE, server.url("fleet/one")));
    run_body("remote::through_s3", &environment).map(|_| ())
}

#[test]
fn what_is_cached_is_served_while_s3_is_away() -> Result<()> {
    with_server("remote::s3_away")
}

/// A short form of `make fleet`.
#[test]
fn a_fleet_loses_nothing_through_faults_and_kills() -> Result<()> {
    let server = Moto::start()?;
    let output = Command::new(program("fleet")?)
        .args(["--rounds", "7", "--store", &server.url("fleet")])
        .envs(server.environment())
        .output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}{said}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

/// Not a test of its own: the body of those over S3 and Azure.
#[test]
fn through_s3() -> Result<()> {
    let Ok(url) = std::env::var(STORE) else { return Ok(()) };
    let fixture = Fixture::new()?;
    let missing = reap_pack(&url, &["ls"])?;
    ensure!(missing.status.code() == Some(3), "no store is there yet: {missing:?}");
    reap_pack_json(&url, &["init"])?;
    let again = reap_pack(&url, &["init"])?;
    ensure!(again.status.code() == Some(6), "a store is there already: {again:?}");

    let memory = fixture.memory_file("memory", 48)?;
    let first = reap_pack_json(&url, &["pack", "--name", "f", "--memory", &memory])?;
    let mut bytes = fs::read(&memory)?;
    bytes[5 * 4096] ^= 1;
    fs::write(&memory, bytes)?;
    let second = reap_pack_json(&url, &["pack", "--name", "f", "--memory", &memory])?;
    let stored = |packed: &serde_json::Value| packed["statistics"]["pack_bytes"].as_u64();
    ensure!(stored(&second) < stored(&first).map(|bytes| bytes / 10), "not shared: {second}");

    let out = fixture.path("out");
    reap_pack_json(&url, &["export", "f", &out.display().to_string()])?;
    ensure!(same_bytes(Path::new(&memory), &out.join("memory"))?, "is exported wrongly");
    let worker = Worker::start(&url, &fixture.path("worker"), &[])?;
    let mounted = worker.mount().join("snapshots/f/memory");
    ensure!(same_bytes(Path::new(&memory), &mounted)?, "is mounted wrongly");
    worker.stop()?;

    let id = first["id"].as_str().context("an id")?;
    reap_pack_json(&url, &["rm", id])?;
    let collected = reap_pack_json(&url, &["gc", "--yes"])?;
    let keys = collected["garbage"].as_array().context("garbage")?;
    // The second snapshot refers to the first one's packs: they stay.
    ensure!(keys.len() == 1 && keys[0]["key"] == format!("manifest/{id}"), "{collected}");
    let verified = reap_pack_json(&url, &["verify", "--all"])?;
    ensure!(verified["problems"].as_array().is_some_and(Vec::is_empty), "{verified}");
    reap_pack_json(&url, &["rm", "f"])?;
    reap_pack_json(&url, &["gc", "--yes"])?;
    let nothing = reap_pack_json(&url, &["gc", "--dry-run"])?;
    ensure!(nothing["pack_bytes"] == 0, "{nothing}");
    Ok(())
}

/// Not a test of its own: the body of the one above.
#[test]
fn s3_away() -> Result<()> {
    let Some((url, server)) = store_and_server()? else { return Ok(()) };
    let fixture = Fixture::new()?;
    let memory = fixture.memory_file("memory", 16)?;
    reap_pack_json(&url, &["init"])?;
    reap_pack_json(&url, &["pack", "--name", "f", "--memory", &memory])?;
    let worker = Worker::start(&url, &fixture.path("worker"), &[])?;
    worker.prepare("f", "demand")?;
    let mounted = worker.mount().join("snapshots/f/memory");
    let expected = fs::read(&memory)?;
    let file = past_the_page_cache(&mounted)?;
    let half = read_backwards(&file, 0..expected.len() / 2)?;

    rustix::process::kill_process(server, Signal::STOP)?;
    // The node has these frames; the kernel's own cache of the mount is emptied first.
    reap_tests::lab::evict(&mounted)?;
    let cached = read_backwards(&file, 0..half.len());
    // The rest waits for the server, and comes when it is back.
    let path = mounted.clone();
    let waiting = std::thread::spawn(move || fs::read(path));
    std::thread::sleep(std::time::Duration::from_secs(3));
    let waited = !waiting.is_finished();
    rustix::process::kill_process(server, Signal::CONT)?;
    let back = std::time::Instant::now();
    let whole = waiting.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
    let again = cached.context("cached reads do not go on")?;
    ensure!(again == half && half[..] == expected[..half.len()], "other bytes from the cache");
    ensure!(waited, "the rest did not need the server: this test shows nothing");
    ensure!(whole? == expected, "other bytes after the server came back");
    println!("recovered in {:?}", back.elapsed());
    worker.stop()
}
