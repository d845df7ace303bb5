//! Real guests through the real programs: packed, exported, mounted, restored both ways, recorded,
//! prefetched; and what happens when things break.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use reap_tests::lab::{Backend, Lab, Snapshot};
use reap_tests::worker::{Worker, reap_pack, reap_pack_command, reap_pack_json};

#[path = "end_to_end/cache.rs"]
mod cache;
#[path = "end_to_end/client.rs"]
mod client;
#[path = "end_to_end/crowd.rs"]
mod crowd;
#[path = "end_to_end/documents.rs"]
mod documents;
#[path = "end_to_end/fleet.rs"]
mod fleet;
#[path = "end_to_end/golden.rs"]
mod golden;
#[path = "end_to_end/killed.rs"]
mod killed;
#[path = "end_to_end/learning.rs"]
mod learning;
#[path = "end_to_end/metrics.rs"]
mod metrics;
#[path = "end_to_end/plain_copies.rs"]
mod plain_copies;
#[path = "end_to_end/proxy.rs"]
mod proxy;
#[path = "end_to_end/remote.rs"]
mod remote;
#[path = "end_to_end/requests.rs"]
mod requests;

/// A file of which the kernel keeps nothing and reads nothing ahead: what is read is asked of the daemon.
fn past_the_page_cache(path: &Path) -> Result<fs::File> {
    use std::os::unix::fs::OpenOptionsExt;
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits())?;
    Ok(fs::File::options().read(true).custom_flags(direct).open(path)?)
}

/// Reads a part of a file in pieces from back to front, so that nothing else is read ahead of it; whole pieces.
fn read_backwards(file: &fs::File, range: std::ops::Range<usize>) -> std::io::Result<Vec<u8>> {
    const PIECE: usize = 128 << 10;
    let mut bytes = vec![0; range.len()];
    for (number, piece) in bytes.chunks_exact_mut(PIECE).enumerate().rev() {
        file.read_exact_at(piece, (range.start + number * PIECE) as u64)?;
    }
    Ok(bytes)
}

struct Fixture {
    directory: tempfile::TempDir,
    url: String,
}

impl Fixture {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let url = format!("file://{}/store", directory.path().display());
        reap_pack_json(&url, &["init"])?;
        Ok(Self { directory, url })
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    /// A memory file that is none, but looks like one to a packer.
    fn memory_file(&self, name: &str, mib: usize) -> Result<String> {
        let mut bytes = vec![0u8; mib << 20];
        for (number, page) in bytes.chunks_exact_mut(4096).enumerate() {
            if number % 3 != 0 {
                page.iter_mut()
                    .enumerate()
                    .for_each(|(at, byte)| *byte = ((number * 7) ^ (at / 5)) as u8);
                page[..8].copy_from_slice(&(number as u64).to_le_bytes());
            }
        }
        let path = self.path(name);
        fs::write(&path, bytes)?;
        Ok(path.display().to_string())
    }

    /// A guest that has answered `one`, and whose memory is packed as `f`; with that answer.
    fn packed_guest(&self, lab: &Lab) -> Result<(Snapshot, String)> {
        let mut guest = lab.boot("helloworld", 256, &self.path("guest"))?;
        let answer = guest.request("one")?.line;
        let snapshot = guest.snapshot(&self.path("guest"))?;
        let memory = snapshot.memory.display().to_string();
        reap_pack_json(&self.url, &["pack", "--name", "f", "--memory", &memory])?;
        Ok((snapshot, answer))
    }

    /// Runs `reap-pack` and kills it after a while, wherever it is then.
    fn killed_after(&self, delay_ms: u64, arguments: &[&str]) -> Result<()> {
        let mut child = reap_pack_command(&self.url, arguments)?
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        std::thread::sleep(Duration::from_millis(delay_ms));
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    fn worker(&self, arguments: &[&str]) -> Result<Worker> {
        Worker::start(&self.url, &self.path("worker"), arguments)
    }
}

fn same_bytes(one: &Path, other: &Path) -> Result<bool> {
    Ok(Command::new("cmp").arg(one).arg(other).status()?.success())
}

/// The whole path of one function, and what must hold of it.
fn whole_path(function: &str, memory_mib: u32) -> Result<()> {
    let fixture = Fixture::new()?;
    let lab = Lab::open()?;
    let mut guest = lab.boot(function, memory_mib, &fixture.path("guest"))?;
    let before = [guest.request("first")?.line, guest.request("second")?.line];
    let snapshot = guest.snapshot(&fixture.path("guest"))?;
    let text = |path: &Path| path.display().to_string();
    let disk = format!("root={}", text(&snapshot.disk));
    let (memory, state) = (text(&snapshot.memory), text(&snapshot.state));
    let packed = reap_pack_json(
        &fixture.url,
        &["pack", "--name", "f:v1", "--memory", &memory, "--state", &state, "--disk", &disk],
    )?;
    ensure!(packed["statistics"]["zero_pages"].as_u64().context("zeros")? > 10_000, "{packed}");

    let out = fixture.path("out");
    reap_pack_json(&fixture.url, &["export", "f:v1", &text(&out)])?;
    let verified = reap_pack_json(&fixture.url, &["verify", "f:v1"])?;
    ensure!(verified["problems"].as_array().is_some_and(Vec::is_empty), "{verified}");
    let worker = fixture.worker(&["--settle", "1"])?;
    let mounted = worker.mount().join("snapshots/f:v1");
    let originals =
        [("memory", &snapshot.memory), ("state", &snapshot.state), ("root", &snapshot.disk)];
    for (name, original) in originals {
        ensure!(same_bytes(original, &out.join(name))?, "{name} is exported wrongly");
        ensure!(same_bytes(original, &mounted.join(name))?, "{name} is mounted wrongly");
    }

    // Everything from the mount, as a worker has nothing else.
    let from_mount = Snapshot {
        memory: mounted.join("memory"),
        state: mounted.join("state"),
        disk: mounted.join("root"),
        ..snapshot.clone()
    };
    let backend = Backend::File(from_mount.memory.clone());
    let mut guest = lab.restore_paused(&from_mount, &backend)?;
    guest.compare_memory(&snapshot.memory)?.expect_equal()?;
    guest.resume()?;
    ensure!(guest.request("first")?.line == before[0], "another answer from the mounted file");
    drop(guest);

    let prepared = worker.prepare("f:v1", "auto")?;
    let uffd = Backend::Uffd { socket: prepared["uffd"].as_str().context("a socket")?.into() };
    let mut guest = lab.restore(&from_mount, &uffd)?;
    ensure!(guest.request("first")?.line == before[0], "another answer while recording");
    drop(guest);
    worker.wait_for_working_set("f:v1")?;
    let shown = reap_pack_json(&fixture.url, &["show", "f:v1"])?;
    ensure!(shown["working_sets"].as_array().is_some_and(|sets| sets.len() == 1), "{shown}");

    let mut guest = lab.restore(&from_mount, &uffd)?;
    for (input, expected) in ["first", "second"].iter().zip(&before) {
        ensure!(&guest.request(input)?.line == expected, "another answer to {input}");
    }
    let restore = worker.newest_restore()?;
    let count = |key: &str| restore[key].as_u64().context(key.to_owned());
    let planned = count("planned_pages")? + count("planned_zero_pages")?;
    ensure!(restore["mode"] == "prefetch" && planned > 300, "{restore}");
    ensure!(
        count("late_pages")? * 20 <= planned,
        "more than 5 % of the recorded pages fault: {restore}"
    );
    drop(guest);

    // All of guest memory through the fault path.
    let mut guest = lab.restore_paused(&from_mount, &uffd)?;
    guest.compare_memory(&snapshot.memory)?.expect_equal()?;
    drop(guest);
    worker.stop()
}

#[test]
fn helloworld_goes_the_whole_path() -> Result<()> {
    whole_path("helloworld", 256)
}

#[test]
fn json_serdes_goes_the_whole_path() -> Result<()> {
    whole_path("json_serdes", 256)
}

#[test]
fn image_rotate_goes_the_whole_path() -> Result<()> {
    whole_path("image_rotate", 256)
}

/// Every function of the laboratory in guests of both sizes: ten minutes, so for `make soak`.
#[cfg(feature = "soak")]
#[test]
fn every_function_goes_the_whole_path_in_both_sizes() -> Result<()> {
    for memory_mib in [256, 512] {
        for function in reap_tests::lab::FUNCTIONS {
            whole_path(function, memory_mib)
                .with_context(|| format!("{function} with {memory_mib} MiB"))?;
            eprintln!("{function} with {memory_mib} MiB went the whole path");
        }
    }
    Ok(())
}

#[test]
fn a_guest_lives_on_when_the_daemon_stops() -> Result<()> {
    let fixture = Fixture::new()?;
    let lab = Lab::open()?;
    let (snapshot, before) = fixture.packed_guest(&lab)?;
    let worker = fixture.worker(&[])?;
    let prepared = worker.prepare("f", "demand")?;
    let uffd = Backend::Uffd { socket: prepared["uffd"].as_str().context("a socket")?.into() };
    let mut guest = lab.restore(&snapshot, &uffd)?;
    guest.request("one")?;
    worker.stop()?;
    ensure!(guest.request("one")?.line == before, "another answer after the daemon stopped");
    Ok(())
}

#[test]
fn a_vmm_that_cannot_be_served_is_ended_with_the_reason() -> Result<()> {
    let fixture = Fixture::new()?;
    let lab = Lab::open()?;
    let guest = lab.boot("helloworld", 256, &fixture.path("guest"))?;
    let snapshot = guest.snapshot(&fixture.path("guest"))?;
    let memory = snapshot.memory.display().to_string();
    reap_pack_json(&fixture.url, &["pack", "--name", "f", "--memory", &memory])?;
    let worker = fixture.worker(&[])?;
    let prepared = worker.prepare("f", "demand")?;
    let uffd = Backend::Uffd { socket: prepared["uffd"].as_str().context("a socket")?.into() };
    let mut guest = lab.restore_paused(&snapshot, &uffd)?;
    for entry in fs::read_dir(fixture.path("store/pack"))? {
        let path = entry?.path();
        let mut bytes = fs::read(&path)?;
        bytes[32..].iter_mut().for_each(|byte| *byte ^= 0x11);
        fs::write(&path, bytes)?;
    }
    guest.resume().unwrap_or_default();
    guest.wait_until_dead(Duration::from_secs(30))?;
    ensure!(worker.log().contains("is killed: a page cannot be had"), "{}", worker.log());
    drop(guest);
    worker.stop()
}

#[test]
fn a_packer_killed_anywhere_leaves_a_store_that_works() -> Result<()> {
    let fixture = Fixture::new()?;
    let memory = fixture.memory_file("memory", 48)?;
    for delay_ms in [1, 5, 10, 20, 30, 40, 60, 80, 100, 150] {
        let arguments = ["pack", "--name", "f", "--memory", &memory];
        fixture.killed_after(delay_ms, &arguments)?;
        reap_pack_json(&fixture.url, &["ls"])?;
        let verified = reap_pack_json(&fixture.url, &["verify", "--all"])?;
        ensure!(verified["problems"].as_array().is_some_and(Vec::is_empty), "{verified}");
    }
    reap_pack_json(&fixture.url, &["pack", "--name", "f", "--memory", &memory])?;
    let out = fixture.path("out");
    reap_pack_json(&fixture.url, &["export", "f", &out.display().to_string()])?;
    ensure!(same_bytes(Path::new(&memory), &out.join("memory"))?, "another file came out");
    Ok(())
}

#[test]
fn a_collector_killed_anywhere_loses_nothing() -> Result<()> {
    let fixture = Fixture::new()?;
    let memory = fixture.memory_file("memory", 8)?;
    let pack = || -> Result<String> {
        let packed = reap_pack_json(
            &fixture.url,
            &["pack", "--name", "f", "--no-parent", "--memory", &memory],
        )?;
        Ok(packed["id"].as_str().context("an id")?.to_owned())
    };
    let mut last = pack()?;
    for delay_ms in [2, 4, 6, 8, 10, 12, 15, 20, 30] {
        let next = pack()?;
        reap_pack_json(&fixture.url, &["rm", &last, "--force"])?;
        last = next;
        fixture.killed_after(delay_ms, &["gc", "--yes"])?;
        let verified = reap_pack_json(&fixture.url, &["verify", "--all"])?;
        ensure!(verified["problems"].as_array().is_some_and(Vec::is_empty), "{verified}");
    }
    reap_pack_json(&fixture.url, &["gc", "--yes"])?;
    reap_pack_json(&fixture.url, &["gc", "--yes"])?;
    let mut left = fs::read_dir(fixture.path("store/pack"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    left.retain(|name| !name.starts_with(&last));
    ensure!(left.is_empty(), "garbage is left: {left:?}");
    let out = fixture.path("out");
    reap_pack_json(&fixture.url, &["export", "f", &out.display().to_string()])?;
    ensure!(same_bytes(Path::new(&memory), &out.join("memory"))?, "another file came out");
    Ok(())
}

#[test]
fn wrong_input_gets_one_line_and_an_exit_code() -> Result<()> {
    let fixture = Fixture::new()?;
    let memory = fixture.memory_file("memory", 1)?;
    let empty = fixture.path("empty").display().to_string();
    fs::write(&empty, "")?;
    let nothing = fixture.path("nothing").display().to_string();
    let other = format!("file://{nothing}");
    let no_store = format!("file://{}", fixture.directory.path().display());
    let url = fixture.url.as_str();
    let pack = |name: &'static str, memory: &str| {
        ["pack", "--name", name, "--memory", memory].map(str::to_owned).to_vec()
    };
    let cases: Vec<(&str, Vec<String>, i32)> = vec![
        (url, pack("a/b", &memory), 2),
        (url, pack("a b", &memory), 2),
        (url, pack("..", &memory), 2),
        (url, pack("a", &nothing), 3),
        (url, pack("a", &empty), 2),
        (&other, pack("a", &memory), 3),
        (&no_store, pack("a", &memory), 3),
        ("nonsense", pack("a", &memory), 2),
        ("", pack("a", &memory), 2),
        (url, vec!["show".into(), "nobody".into()], 3),
        (url, vec!["init".into()], 6),
    ];
    for (url, arguments, code) in cases {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let output = reap_pack(url, &arguments)?;
        let error = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.code() == Some(code), "{arguments:?}: {}: {error}", output.status);
        ensure!(error.lines().count() == 1 && error.len() > 20, "{arguments:?}: {error:?}");
    }
    for kind in ["pack", "snap", "lease", "ref"] {
        let left = fs::read_dir(fixture.path("store").join(kind)).map_or(0, Iterator::count);
        ensure!(left == 0, "{left} objects are left under {kind}");
    }
    Ok(())
}

#[test]
fn a_killed_daemon_is_replaced_and_a_stopped_one_leaves_nothing() -> Result<()> {
    let fixture = Fixture::new()?;
    let memory = fixture.memory_file("memory", 4)?;
    reap_pack_json(&fixture.url, &["pack", "--name", "f", "--memory", &memory])?;
    let mut killed = fixture.worker(&["--prepare", "f"])?;
    killed.kill()?;
    ensure!(fs::metadata(killed.mount()).is_err(), "the mount is dead");
    let worker = fixture.worker(&["--prepare", "f"])?;
    ensure!(same_bytes(Path::new(&memory), &worker.mount().join("snapshots/f/memory"))?, "bytes");
    let (mount, run_dir) = (worker.mount(), worker.run_dir());
    worker.stop()?;
    std::mem::forget(killed);
    ensure!(fs::read_dir(&mount)?.next().is_none(), "something is still mounted");
    for left in ["ready", "api.sock", "uffd/f.sock"] {
        ensure!(!run_dir.join(left).exists(), "{left} is left behind");
    }
    Ok(())
}
