//! The node's cache in the real programs, over S3's protocol: what packers leave for it, what is kept in it,
//! and what a killed daemon leaves of it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use reap_tests::worker::{Worker, reap_pack, reap_pack_json};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::remote::{STORE, store_and_server, with_server};
use super::{Fixture, same_bytes};

#[test]
fn what_a_node_packs_it_serves_without_a_request() -> Result<()> {
    with_server("cache::left_by_packers")
}

#[test]
fn a_warm_snapshot_is_served_while_s3_is_away_and_its_frames_stay() -> Result<()> {
    with_server("cache::warm")
}

#[test]
fn a_daemon_that_is_killed_while_it_fills_its_cache_goes_on_with_it() -> Result<()> {
    with_server("cache::killed_while_filling")
}

fn cache(worker: &Worker) -> Result<Value> {
    let status = worker.ask("status", &[])?;
    Ok(json!({ "disk": status["cache"]["disk"], "fetched": status["store"]["fetch"] }))
}

/// Waits until the daemon's cache is as wanted.
fn until(worker: &Worker, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
    let began = Instant::now();
    loop {
        let cache = cache(worker)?;
        if wanted(&cache) {
            return Ok(cache);
        }
        if began.elapsed() > Duration::from_secs(30) {
            bail!("the cache never came so far: {cache}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether packers have left something that is not taken over yet.
fn is_left(cache_dir: &Path) -> Result<bool> {
    Ok(fs::read_dir(cache_dir.join("frames/incoming"))?.next().is_some())
}

fn mounted(worker: &Worker, name: &str) -> std::path::PathBuf {
    worker.mount().join("snapshots").join(name).join("memory")
}

/// Not a test of its own: the body of the one above.
#[test]
fn left_by_packers() -> Result<()> {
    let Ok(url) = std::env::var(STORE) else { return Ok(()) };
    let fixture = Fixture::new()?;
    reap_pack_json(&url, &["init"])?;
    let directory = fixture.path("worker");
    let cache_dir = directory.join("cache");
    let cache_dir_text = cache_dir.display().to_string();
    let pack = |name: &str, memory: &str| -> Result<Value> {
        let arguments = ["pack", "--name", name, "--memory", memory, "--cache", &cache_dir_text];
        reap_pack_json(&url, &arguments)
    };
    let first = fixture.memory_file("first", 48)?;
    let arguments = ["pack", "--name", "f", "--memory", &first, "--cache", &cache_dir_text];
    let early = reap_pack(&url, &arguments)?;
    let said = String::from_utf8_lossy(&early.stderr).into_owned();
    ensure!(early.status.code() == Some(2) && said.contains("is no cache"), "{said}");
    ensure!(!cache_dir.exists(), "something was left behind");
    let local = reap_pack(&fixture.url, &arguments)?;
    let said = String::from_utf8_lossy(&local.stderr).into_owned();
    ensure!(local.status.code() == Some(2) && said.contains("read in place"), "{said}");

    let worker = Worker::start(&url, &directory, &[])?;
    // While the daemon runs, and holds its cache's lock.
    let packed = pack("f", &first)?;
    ensure!(packed["left_bytes"].as_u64() > Some(0), "{packed}");
    let taken = until(&worker, |_| is_left(&cache_dir).is_ok_and(|left| !left))?;
    ensure!(taken["disk"]["frames"].as_u64() > Some(0), "{taken}");
    ensure!(same_bytes(Path::new(&first), &mounted(&worker, "f"))?, "is mounted wrongly");
    let read = cache(&worker)?;
    ensure!(read["fetched"]["disk_cache_reads"].as_u64() > Some(0), "{read}");
    ensure!(read["fetched"]["store_reads"] == 0, "frames were asked for: {read}");
    worker.stop()?;

    // While it does not run; its next start takes over.
    let second = fixture.path("second");
    let bytes: Vec<u8> = fs::read(&first)?.iter().map(|byte| byte.wrapping_add(1)).collect();
    fs::write(&second, bytes)?;
    pack("g", &second.display().to_string())?;
    ensure!(is_left(&cache_dir)?, "nothing was left");
    let worker = Worker::start(&url, &directory, &[])?;
    until(&worker, |_| is_left(&cache_dir).is_ok_and(|left| !left))?;
    for (name, memory) in [("f", Path::new(&first)), ("g", &second)] {
        ensure!(same_bytes(memory, &mounted(&worker, name))?, "{name} is mounted wrongly");
    }
    let read = cache(&worker)?;
    ensure!(read["fetched"]["store_reads"] == 0, "frames were asked for: {read}");
    worker.stop()
}

/// Not a test of its own: the body of the one above.
#[test]
fn warm() -> Result<()> {
    let Some((url, server)) = store_and_server()? else { return Ok(()) };
    let fixture = Fixture::new()?;
    let memory = fixture.memory_file("memory", 48)?;
    reap_pack_json(&url, &["init"])?;
    reap_pack_json(&url, &["pack", "--name", "f", "--memory", &memory])?;
    let directory = fixture.path("worker");

    let small = Worker::start(&url, &fixture.path("small"), &["--cache-size", "1MiB"])?;
    let refused = small.ask("prepare", &["f", "--warm"]);
    let said = refused.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(said.contains("half of the cache, 524288 bytes, is the most"), "{said}");
    ensure!(cache(&small)?["disk"]["missing_pinned_bytes"] == 0, "a refused pin is left");
    small.stop()?;

    let mut worker = Worker::start(&url, &directory, &[])?;
    let prepared = worker.ask("prepare", &["f", "--warm"])?;
    // Under its id: what a name stands for is asked of the store.
    let by_id = prepared["memory"].as_str().context("a path")?.to_owned();
    let disk = cache(&worker)?["disk"].clone();
    let pinned = disk["pinned_bytes"].as_u64().context("bytes")?;
    ensure!(pinned > 0 && disk["missing_pinned_bytes"] == 0, "{disk}");
    rustix::process::kill_process(server, Signal::STOP)?;
    let same = same_bytes(Path::new(&memory), Path::new(&by_id));
    rustix::process::kill_process(server, Signal::CONT)?;
    ensure!(same?, "is mounted wrongly");
    // A killed daemon's successor finds the frames, and pins them when it prepares again.
    worker.kill()?;
    drop(worker);
    let worker = Worker::start(&url, &directory, &[])?;
    ensure!(cache(&worker)?["disk"]["pinned_bytes"] == 0, "nothing is prepared");
    worker.ask("prepare", &["f", "--warm"])?;
    let again = cache(&worker)?;
    ensure!(again["disk"]["pinned_bytes"] == pinned, "{again}");
    ensure!(again["fetched"]["store_reads"] == 0, "frames were asked for: {again}");
    worker.ask("release", &["f"])?;
    ensure!(cache(&worker)?["disk"]["pinned_bytes"] == 0, "still pinned after release");
    worker.stop()
}

/// Not a test of its own: the body of the one above.
#[test]
fn killed_while_filling() -> Result<()> {
    let Ok(url) = std::env::var(STORE) else { return Ok(()) };
    let fixture = Fixture::new()?;
    let memory = fixture.memory_file("memory", 48)?;
    reap_pack_json(&url, &["init"])?;
    reap_pack_json(&url, &["pack", "--name", "f", "--memory", &memory])?;
    let expected = fs::read(&memory)?;
    let directory = fixture.path("worker");
    let mut frames = Vec::new();
    for round in 0..6_u32 {
        let mut worker = Worker::start(&url, &directory, &[])?;
        frames.push(cache(&worker)?["disk"]["frames"].as_u64().context("frames")?);
        let file = fs::File::open(mounted(&worker, "f"))?;
        let part = expected.len() / 6;
        let reader = std::thread::spawn(move || {
            let mut bytes = vec![0; part];
            let read = file.read_exact_at(&mut bytes, u64::from(round) * part as u64);
            read.map(|()| bytes)
        });
        // In the middle of it, each time elsewhere.
        std::thread::sleep(Duration::from_millis(30 + 40 * u64::from(round)));
        worker.kill()?;
        drop(worker);
        if let Ok(Ok(bytes)) = reader.join() {
            let begin = round as usize * part;
            ensure!(bytes == expected[begin..begin + part], "other bytes in round {round}");
        }
    }
    ensure!(frames.windows(2).all(|pair| pair[0] <= pair[1]), "the cache lost frames: {frames:?}");
    ensure!(frames.iter().any(|count| *count > 0), "nothing was ever cached: {frames:?}");
    let worker = Worker::start(&url, &directory, &[])?;
    ensure!(same_bytes(Path::new(&memory), &mounted(&worker, "f"))?, "is mounted wrongly");
    let read = cache(&worker)?;
    ensure!(read["fetched"]["damaged_frames"] == 0, "a killed daemon left damage: {read}");
    worker.stop()
}

/// Not a test: prints how fast the mount is read where its frames are on this node.
#[cfg(feature = "measure")]
#[test]
fn measure_sequential_reads() -> Result<()> {
    with_server("cache::sequential_reads")
}

/// The body of the one above: a guest's memory file in the page cache, against the mount whose frames are on this node's
/// disk (and so in the page cache too, as stored bytes), decoded in its memory, against reading the mount again, and against its plain copy. A copy
/// on tmpfs shows what the kernel's page cache can do where it has single pages, as it has for FUSE.
#[cfg(feature = "measure")]
#[test]
fn sequential_reads() -> Result<()> {
    let Ok(url) = std::env::var(STORE) else { return Ok(()) };
    let fixture = Fixture::new()?;
    let lab = reap_tests::lab::Lab::open()?;
    let guest = fixture.path("guest");
    let mut booted = lab.boot("lr_serving", 512, &guest)?;
    booted.request("first")?;
    let snapshot = booted.snapshot(&guest)?;
    let memory = snapshot.memory.display().to_string();
    let single_pages = tempfile::tempdir_in("/dev/shm")?;
    let single_pages = single_pages.path().join("memory");
    fs::write(&single_pages, fs::read(&snapshot.memory)?)?;
    reap_pack_json(&url, &["init"])?;
    let directory = fixture.path("worker");
    Worker::start(&url, &directory, &[])?.stop()?;
    let cache_dir = directory.join("cache").display().to_string();
    reap_pack_json(&url, &["pack", "--name", "f", "--memory", &memory, "--cache", &cache_dir])?;
    for buffer in [1 << 20, 128 << 10] {
        for round in 1..=5 {
            let worker = Worker::start(&url, &directory, &["--memory-cache", "512MiB"])?;
            until(&worker, |_| is_left(Path::new(&cache_dir)).is_ok_and(|left| !left))?;
            let mounted = mounted(&worker, "f");
            let read = |path: &Path| read_all(path, buffer);
            read(&snapshot.memory)?;
            let plain = read(&snapshot.memory)?;
            let as_stored = read(&mounted)?;
            let again = read(&mounted)?;
            let file = fs::File::open(&mounted)?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
            drop(file);
            let decoded = read(&mounted)?;
            let began = Instant::now();
            worker.ask("prepare", &["f", "--mode", "demand", "--plain-copy"])?;
            let copying = began.elapsed();
            let copied = read(&mounted)?;
            let copied_again = read(&mounted)?;
            let tmpfs = read(&single_pages)?;
            let ratio = |other: Duration| plain.as_secs_f64() / other.as_secs_f64();
            println!(
                "{} KiB a read, round {round}: plain {plain:?}; mount from frames on disk {as_stored:?} ({:.2}), in memory \
                 {decoded:?} ({:.2}), again {again:?} ({:.2}); plain copy, written in {copying:?}, {copied:?} ({:.2}), again \
                 {copied_again:?} ({:.2}); tmpfs {tmpfs:?} ({:.2})",
                buffer >> 10,
                ratio(as_stored),
                ratio(decoded),
                ratio(again),
                ratio(copied),
                ratio(copied_again),
                ratio(tmpfs)
            );
            let read = cache(&worker)?;
            ensure!(read["fetched"]["store_reads"] == 0, "not from the cache: {read}");
            worker.stop()?;
        }
    }
    Ok(())
}

/// How long it takes to read a file from its beginning to its end, so many bytes at a time.
#[cfg(feature = "measure")]
fn read_all(path: &Path, buffer: usize) -> Result<Duration> {
    let mut file = fs::File::open(path)?;
    let mut buffer = vec![0; buffer];
    let began = Instant::now();
    while std::io::Read::read(&mut file, &mut buffer)? > 0 {}
    Ok(began.elapsed())
}
