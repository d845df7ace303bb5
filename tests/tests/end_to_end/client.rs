//! How the programs bear a remote store that is late, overloaded, away, or wants other keys, against a server
//! that does each of these on demand.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use reap_store::{FrameIndex, Node, NodeConfig, Snapshot, Urgency};
use reap_tests::servers::{Azurite, Careless, Environment, StandIn, run_body};
use reap_tests::worker::{Worker, reap_pack_command};

use super::{Fixture, past_the_page_cache, read_backwards};

const STORE: &str = "REAP_TEST_STAND_IN_STORE";
const GOLDEN: &str = "REAP_TEST_GOLDEN_STORE";

/// Keys that never change, and the store.
fn fixed_keys(server: &StandIn) -> Environment {
    server.environment_with_keys().into_iter().chain([(STORE, server.url())]).collect()
}

fn reap_pack_in(environment: &Environment, url: &str, arguments: &[&str]) -> Result<()> {
    let output = reap_pack_command(url, arguments)?.envs(environment.iter().cloned()).output()?;
    ensure!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A store with one snapshot, `f`; answers with its memory file.
fn packed(url: &str, environment: &Environment, fixture: &Fixture) -> Result<String> {
    let memory = fixture.memory_file("memory", 48)?;
    reap_pack_in(environment, url, &["init"])?;
    reap_pack_in(environment, url, &["pack", "--name", "f", "--memory", &memory])?;
    Ok(memory)
}

/// A node of this process that has nothing yet, and the snapshot.
fn open() -> Result<(Node, Arc<Snapshot>)> {
    let node = Node::start(&NodeConfig::reader(&std::env::var(STORE)?))?;
    let snapshot = node.block_on(node.open_name(&"f".parse()?))?;
    Ok((node, snapshot))
}

fn frames(snapshot: &Snapshot) -> Vec<FrameIndex> {
    let mut frames = snapshot.frames_of(0, 0..snapshot.files()[0].page_count());
    frames.dedup();
    frames
}

/// Fetches each frame by a request of its own, so many at a time; answers with how long each took. A frame
/// that comes was compared with its hash.
fn fetch_each(
    snapshot: &Arc<Snapshot>,
    urgency: Urgency,
    at_a_time: usize,
) -> Result<Vec<Duration>> {
    let mut taken = Vec::new();
    for some in frames(snapshot).chunks(at_a_time) {
        let (sender, arrived) = mpsc::channel();
        for frame in some {
            let (sender, began) = (sender.clone(), Instant::now());
            snapshot.fetch(&[*frame], urgency, move |_, frame| {
                sender.send((frame.map(|_| ()), began.elapsed())).unwrap_or_default();
            });
        }
        drop(sender);
        for (frame, time) in arrived {
            frame?;
            taken.push(time);
        }
    }
    Ok(taken)
}

#[test]
fn late_answers_are_not_waited_for_and_few_requests_are_made_twice() -> Result<()> {
    let (server, fixture) = (StandIn::start()?, Fixture::new()?);
    let environment = fixed_keys(&server);
    packed(&server.url(), &environment, &fixture)?;
    server.behaviour.latency_ms.store(5, Ordering::SeqCst);
    server.behaviour.stall_every.store(50, Ordering::SeqCst);
    print!("{}", run_body("client::read_on_demand", &environment)?);
    Ok(())
}

/// Not a test of its own: the body of the one above. With REAP_TEST_ROUNDS a measurement: the same requests are made as
/// prefetch too, which is never asked for twice.
#[test]
fn read_on_demand() -> Result<()> {
    if std::env::var(STORE).is_err() {
        return Ok(());
    }
    let measured = std::env::var("REAP_TEST_ROUNDS").ok();
    let rounds: u64 = measured.as_deref().unwrap_or("1").parse()?;
    let (mut taken, mut single, mut hedged, mut won) = (Vec::new(), Vec::new(), 0, 0);
    for _ in 0..rounds {
        let (node, snapshot) = open()?;
        taken.extend(fetch_each(&snapshot, Urgency::Demand, 1)?);
        hedged += node.counters().hedged_reads.load(Ordering::Relaxed);
        won += node.counters().hedges_won.load(Ordering::Relaxed);
        if measured.is_some() {
            let (_node, snapshot) = open()?;
            single.extend(fetch_each(&snapshot, Urgency::Prefetch, 1)?);
        }
    }
    println!("{hedged} asked twice: {}", percentiles(&mut taken));
    if measured.is_some() {
        println!("never twice: {}", percentiles(&mut single));
    }
    let count = taken.len();
    let stalled = taken.iter().filter(|time| **time >= Duration::from_secs(1)).count();
    ensure!(count >= 200 && won >= 2, "this shows nothing: {won} second requests were of use");
    ensure!(stalled * 100 < count, "{stalled} of {count} reads waited for a late answer");
    ensure!(hedged * 20 <= count as u64 + 200 * rounds, "{hedged} of {count} were asked twice");
    Ok(())
}

fn percentiles(taken: &mut [Duration]) -> String {
    taken.sort_unstable();
    let at = |percent: usize| taken[(taken.len() * percent / 100).min(taken.len() - 1)];
    let (half, most, nearly_all) = (at(50), at(95), at(99));
    format!(
        "{} reads, p50 {half:?}, p95 {most:?}, p99 {nearly_all:?}, longest {:?}",
        taken.len(),
        at(100)
    )
}

#[test]
fn prefetch_gives_way_to_a_store_that_is_overloaded() -> Result<()> {
    let (server, fixture) = (StandIn::start()?, Fixture::new()?);
    let environment = fixed_keys(&server);
    packed(&server.url(), &environment, &fixture)?;
    let behaviour = &server.behaviour;
    behaviour.latency_ms.store(10, Ordering::SeqCst);
    behaviour.capacity.store(5, Ordering::SeqCst);
    let before = behaviour.served.load(Ordering::SeqCst);
    print!("{}", run_body("client::prefetch_everything", &environment)?);
    let served = behaviour.served.load(Ordering::SeqCst) - before;
    let turned_away = behaviour.turned_away.load(Ordering::SeqCst);
    println!("served {served}, turned away {turned_away}, capacity 5");
    ensure!(turned_away > 0 && served > 200, "this shows nothing: {turned_away} of {served}");
    // 16 requests all the time, 5 of which are served, would be 11 turned away for each 5.
    ensure!(turned_away * 2 < served, "{turned_away} requests were turned away, {served} served");
    Ok(())
}

/// Not a test of its own: the body of the one above.
#[test]
fn prefetch_everything() -> Result<()> {
    if std::env::var(STORE).is_err() {
        return Ok(());
    }
    let (node, snapshot) = open()?;
    let began = Instant::now();
    let count = fetch_each(&snapshot, Urgency::Prefetch, usize::MAX)?.len();
    let connection = node.connection();
    println!(
        "{count} prefetches in {:?}, at most {} at a time at the end, {} answers to slow down",
        began.elapsed(),
        connection.prefetch_requests,
        connection.throttled_answers
    );
    ensure!(connection.throttled_answers > 0 && connection.prefetch_requests < 16, "not seen");
    Ok(())
}

fn write_keys(path: &Path, key: &str) -> Result<()> {
    let text = format!("[fleet]\naws_access_key_id={key}\naws_secret_access_key=secret\n");
    let new = path.with_extension("new");
    fs::write(&new, text)?;
    Ok(fs::rename(new, path)?)
}

/// A worker on `f`, its memory file as mounted, and what it must hold.
struct Reader {
    worker: Worker,
    file: Arc<fs::File>,
    path: std::path::PathBuf,
    expected: Arc<Vec<u8>>,
}

impl Reader {
    fn start(url: &str, environment: &Environment, fixture: &Fixture) -> Result<Self> {
        let expected = Arc::new(fs::read(packed(url, environment, fixture)?)?);
        let directory = fixture.path("worker");
        let worker = Worker::start_with(url, &directory, &[], environment)?;
        let prepared = worker.prepare("f", "demand")?;
        let path = std::path::PathBuf::from(prepared["memory"].as_str().context("a path")?);
        let file = Arc::new(past_the_page_cache(&path)?);
        Ok(Self { worker, file, path, expected })
    }

    /// Reads a part of the file, given in eighths, and compares it.
    fn read(&self, eighths: std::ops::Range<usize>) -> Result<()> {
        self.read_later(eighths).join().map_err(|_| anyhow::anyhow!("the reader panicked"))?
    }

    /// The same on a thread of its own.
    fn read_later(&self, eighths: std::ops::Range<usize>) -> std::thread::JoinHandle<Result<()>> {
        let (file, expected) = (self.file.clone(), self.expected.clone());
        std::thread::spawn(move || {
            let eighth = expected.len() / 8;
            let range = eighths.start * eighth..eighths.end * eighth;
            ensure!(read_backwards(&file, range.clone())? == expected[range], "other bytes");
            Ok(())
        })
    }

    /// The store is away: what was read before is there, `part` waits, and comes when `back` brings the store back.
    fn outlives(
        &self,
        how: &str,
        part: std::ops::Range<usize>,
        back: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        self.evict()?;
        self.read(0..2).context("cached reads do not go on")?;
        let waiting = self.read_later(part);
        std::thread::sleep(Duration::from_secs(3));
        if waiting.is_finished() {
            let read = waiting.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
            let log = self.worker.log();
            read.with_context(|| format!("{how}: it was not waited for: {log}"))?;
            bail!("{how}: the store was not needed: this shows nothing");
        }
        back()?;
        let since = Instant::now();
        waiting.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        println!("{how}: recovered in {:?}", since.elapsed());
        Ok(())
    }

    /// Empties the kernel's cache of the mount, so that only the node's own is left.
    fn evict(&self) -> Result<()> {
        reap_tests::lab::evict(&self.path)
    }

    fn credentials(&self) -> Result<String> {
        let status = self.worker.ask("status", &[])?;
        Ok(status["store"]["connection"]["credentials"].to_string())
    }
}

#[test]
fn rotated_keys_are_taken_up_by_a_daemon_that_runs() -> Result<()> {
    let (server, fixture) = (StandIn::start()?, Fixture::new()?);
    let keys = fixture.path("credentials");
    write_keys(&keys, "KEY-ONE")?;
    server.behaviour.accept_only("KEY-ONE");
    let mut environment = server.environment();
    environment.push(("AWS_SHARED_CREDENTIALS_FILE", keys.display().to_string()));
    environment.push(("AWS_PROFILE", "fleet".into()));
    let reader = Reader::start(&server.url(), &environment, &fixture)?;
    reader.read(0..2)?;
    ensure!(reader.credentials()?.contains("...-ONE"), "{}", reader.credentials()?);

    // The new ones are written first, as they should be.
    write_keys(&keys, "KEY-TWO")?;
    server.behaviour.accept_only("KEY-TWO");
    reader.read(2..4)?;
    ensure!(reader.credentials()?.contains("...-TWO"), "{}", reader.credentials()?);

    // The old ones expire first: reads wait.
    server.behaviour.accept_only("KEY-THREE");
    let waiting = reader.read_later(4..6);
    std::thread::sleep(Duration::from_secs(2));
    let waited = !waiting.is_finished();
    write_keys(&keys, "KEY-THREE")?;
    waiting.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    ensure!(waited && server.behaviour.refused.load(Ordering::SeqCst) > 0, "nothing was refused");
    ensure!(reader.credentials()?.contains("...HREE"), "{}", reader.credentials()?);

    // Keys in the environment cannot change: that is said at once.
    let fixed = fixed_keys(&server);
    let refused = reap_pack_command(&server.url(), &["ls"])?.envs(fixed).output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(refused.status.code() == Some(6), "{refused:?}");
    ensure!(said.contains("AWS_ACCESS_KEY_ID") && said.contains(&server.url()), "{said}");
    reader.worker.stop()
}

#[test]
fn a_roles_keys_are_renewed_while_a_daemon_runs() -> Result<()> {
    let (server, fixture) = (StandIn::start()?, Fixture::new()?);
    server.behaviour.accept_only("ROLE-ONE");
    let mut environment = server.environment();
    environment.push(("HOME", fixture.path("nobody").display().to_string()));
    let reader = Reader::start(&server.url(), &environment, &fixture)?;
    reader.read(0..4)?;
    server.behaviour.accept_only("ROLE-TWO");
    reader.read(4..8)?;
    ensure!(reader.credentials()?.contains("instance role"), "{}", reader.credentials()?);
    reader.worker.stop()
}

#[test]
fn a_store_that_hangs_or_goes_away_is_waited_for_and_then_named() -> Result<()> {
    let (mut server, fixture) = (StandIn::start()?, Fixture::new()?);
    let environment = fixed_keys(&server);
    let reader = Reader::start(&server.url(), &environment, &fixture)?;
    reader.read(0..2)?;

    server.behaviour.hangs.store(true, Ordering::SeqCst);
    reader.outlives("connections hung", 2..4, || {
        server.behaviour.hangs.store(false, Ordering::SeqCst);
        Ok(())
    })?;
    server.go_away();
    reader.outlives("connections were refused", 4..6, || server.come_back())?;

    // What never comes back is an error that names what was asked and where.
    server.behaviour.hangs.store(true, Ordering::SeqCst);
    let began = Instant::now();
    // The kernel's cache would try several times, for 60 s each.
    let file = &reader.file;
    let at = reader.expected.len() as u64 / 8 * 7 + 4096;
    let failed = file.read_at(&mut [0; 4096], at).err();
    let failed = failed.context("bytes from a store that does not answer")?;
    ensure!(failed.raw_os_error() == Some(5), "not EIO: {failed}");
    ensure!(began.elapsed() > Duration::from_secs(10), "it was not waited for");
    let log = reader.worker.log();
    let named = log.lines().any(|line| {
        line.contains(&format!("{}/pack/", server.url())) && line.contains("given up after")
    });
    ensure!(named, "the log does not name pack and store: {log}");
    reader.read(0..2).context("cached reads do not go on")?;
    server.behaviour.hangs.store(false, Ordering::SeqCst);
    reader.read(6..8)?;
    reader.worker.stop()
}

#[test]
fn a_store_that_is_killed_and_started_again_is_used_on() -> Result<()> {
    let fixture = Fixture::new()?;
    let directory = fixture.path("azurite");
    let mut server = Azurite::start(&directory)?;
    let url = server.url("fleet");
    let reader = Reader::start(&url, &server.environment(), &fixture)?;
    reader.read(0..2)?;
    // The emulator writes down what it holds every few seconds.
    let began = Instant::now();
    let written = || fs::read_to_string(directory.join("__azurite_db_blob__.json"));
    while !written().is_ok_and(|text| text.contains("fleet/pin/")) {
        ensure!(began.elapsed() < Duration::from_secs(60), "azurite keeps nothing");
        std::thread::sleep(Duration::from_millis(100));
    }
    server.kill()?;
    reader.outlives("the server was killed", 2..8, || server.start_again(&directory))?;
    reader.worker.stop()
}

/// `init` refuses this server, and says `how` it fails.
fn is_refused(environment: &Environment, how: &str) -> Result<()> {
    let url = "s3://snapshots/fleet";
    let init = reap_pack_command(url, &["init"])?.envs(environment.iter().cloned()).output()?;
    let said = String::from_utf8_lossy(&init.stderr);
    ensure!(init.status.code() == Some(6) && said.lines().count() == 1, "{init:?}");
    ensure!(said.contains(how) && said.contains("If-None-Match"), "{said}");
    Ok(())
}

#[test]
fn a_store_that_several_racing_creators_win_is_refused() -> Result<()> {
    let fixture = Fixture::new()?;
    let server = Careless::racing(&fixture.path("server"))?;
    is_refused(&server.environment(), "several racing creators")
}

#[test]
fn a_store_that_overwrites_is_refused_to_all_but_readers() -> Result<()> {
    let fixture = Fixture::new()?;
    let server = Careless::overwriting(&fixture.path("server"))?;
    let environment = server.environment();
    is_refused(&environment, "created twice")?;

    // One that was made before somebody looked.
    let url = "s3://snapshots/golden";
    let mut own = environment.clone();
    own.push((GOLDEN, url.into()));
    run_body("client::put_golden_store", &own)?;
    let memory = fixture.memory_file("memory", 1)?;
    for arguments in [&["pack", "--name", "f", "--memory", &memory][..], &["gc"]] {
        let refused =
            reap_pack_command(url, arguments)?.envs(environment.iter().cloned()).output()?;
        let said = String::from_utf8_lossy(&refused.stderr);
        ensure!(refused.status.code() == Some(6) && said.contains("created twice"), "{refused:?}");
    }
    let worker = Worker::start_with(url, &fixture.path("worker"), &[], &environment)?;
    let prepared = worker.prepare("golden:v1", "demand")?;
    fs::read(prepared["memory"].as_str().context("a path")?)?;
    ensure!(worker.log().contains("created twice"), "no warning: {}", worker.log());
    worker.stop()
}

/// Not a test of its own: part of the one above.
#[test]
fn put_golden_store() -> Result<()> {
    let Ok(url) = std::env::var(GOLDEN) else { return Ok(()) };
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/v1/store");
    let objects = reap_store::objects::Objects::connect(&url, false)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let mut directories = vec![golden.clone()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let key = path.strip_prefix(&golden)?.display().to_string();
            runtime.block_on(objects.overwrite(&key, fs::read(&path)?))?;
        }
    }
    Ok(())
}
