//! Plain copies in the real programs: a guest on one, who maps one while the daemon is killed, and refusals. Where the kernel (before
//! 6.9) has no use for one, that is the refusal.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use reap_tests::lab::{Backend, Lab};
use reap_tests::worker::{Worker, metric, reap_pack_json};
use serde_json::Value;

use super::{Fixture, same_bytes};

/// Prepares `f` with a plain copy; `None` where the kernel has no use for one.
fn prepare(worker: &Worker, arguments: &[&str]) -> Result<Option<Value>> {
    match worker.ask("prepare", &[&["f", "--plain-copy"], arguments].concat()) {
        Err(error) if format!("{error:#}").contains("from Linux 6.9") => Ok(None),
        prepared => prepared.map(Some),
    }
}

#[test]
fn a_guest_starts_from_a_plain_copy_of_its_memory() -> Result<()> {
    let fixture = Fixture::new()?;
    let lab = Lab::open()?;
    let (snapshot, before) = fixture.packed_guest(&lab)?;
    let worker = fixture.worker(&[])?;
    let Some(prepared) = prepare(&worker, &["--mode", "demand"])? else { return Ok(()) };
    let bytes = prepared["plain_copy_bytes"].as_f64().context("bytes")?;
    // Two profiles of one snapshot have one copy.
    prepare(&worker, &["--mode", "demand", "--profile", "other"])?;
    let counted = |wanted: f64| -> Result<()> {
        let metrics = worker.metrics()?;
        let copies = metric(&metrics, "reap_plain_copies", "")?;
        let used = metric(&metrics, "reap_plain_copies_used_bytes", "")?;
        ensure!(copies == wanted && used == bytes * wanted, "{copies} copies, {used} bytes");
        Ok(())
    };
    counted(1.0)?;
    let path = Path::new(prepared["memory"].as_str().context("a path")?).to_owned();
    let decoded = || metric(&worker.metrics()?, "reap_decoded_frames_total", "");
    let decoded_before = decoded()?;
    ensure!(same_bytes(&snapshot.memory, &path)?, "the copy has other bytes");
    let mut guest = lab.restore_paused(&snapshot, &Backend::File(path))?;
    worker.ask("release", &["f"])?;
    counted(1.0)?;
    worker.ask("release", &["f", "--profile", "other"])?;
    // The VMM has closed the file; what it has mapped is the kernel's business alone.
    let began = Instant::now();
    while counted(0.0).is_err() && began.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(20));
    }
    counted(0.0)?;
    guest.compare_memory(&snapshot.memory)?.expect_equal()?;
    guest.resume()?;
    ensure!(guest.request("one")?.line == before, "another answer from the copy");
    ensure!(decoded()? == decoded_before, "the mount was read");
    drop(guest);
    worker.stop()
}

#[test]
fn who_has_mapped_a_plain_copy_keeps_it_when_the_daemon_is_killed() -> Result<()> {
    let fixture = Fixture::new()?;
    let memory = fixture.memory_file("memory", 8)?;
    reap_pack_json(&fixture.url, &["pack", "--name", "f", "--memory", &memory])?;
    let mut worker = fixture.worker(&[])?;
    let Some(prepared) = prepare(&worker, &[])? else { return Ok(()) };
    // Maps it as a VMM does, touches nothing until it is told to, and compares.
    let script = "import mmap, sys\n\
        file = open(sys.argv[1], 'rb')\n\
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)\n\
        print('mapped', flush=True)\n\
        sys.stdin.read()\n\
        sys.exit(0 if bytes(memory) == open(sys.argv[2], 'rb').read() else 1)\n";
    let mut vmm = Command::new("python3")
        .args(["-c", script, prepared["memory"].as_str().context("a path")?, &memory])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut said = [0; 7];
    vmm.stdout.as_mut().context("a pipe")?.read_exact(&mut said)?;
    worker.kill()?;
    vmm.stdin.take().context("a pipe")?.flush()?;
    ensure!(vmm.wait()?.success(), "the mapping has lost bytes");
    drop(worker);
    // Nothing of it is found again.
    let worker = fixture.worker(&[])?;
    ensure!(metric(&worker.metrics()?, "reap_plain_copies", "")? == 0.0);
    ensure!(same_bytes(Path::new(&memory), &worker.mount().join("snapshots/f/memory"))?);
    worker.stop()
}

#[test]
fn a_plain_copy_that_cannot_be_is_refused_in_one_line() -> Result<()> {
    let fixture = Fixture::new()?;
    let memory = fixture.memory_file("memory", 8)?;
    reap_pack_json(&fixture.url, &["pack", "--name", "f", "--memory", &memory])?;
    for (arguments, expected) in [
        (["--plain-copies", "1MiB"], "release another snapshot or allow more"),
        (["--cache-free-floor", "1000TiB"], "must keep"),
    ] {
        let worker = fixture.worker(&arguments)?;
        let refused = prepare(&worker, &[]);
        if matches!(refused, Ok(None)) {
            return Ok(());
        }
        let said = refused.err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(said.contains("exit status: 6") && said.contains(expected), "{said}");
        ensure!(said.trim().lines().count() == 1, "{said}");
        // What it is without a copy it is all the same.
        ensure!(same_bytes(Path::new(&memory), &worker.mount().join("snapshots/f/memory"))?);
        let left = worker.ask("status", &[])?;
        ensure!(left["snapshots"].as_array().is_some_and(Vec::is_empty), "{left}");
        worker.stop()?;
    }
    ensure!(fs::read_dir(fixture.path("worker/cache"))?.count() == 1, "more than the node's id");
    Ok(())
}
