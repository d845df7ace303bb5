//! Requests that count: what opening, reading and packing ask of a store, by the proxy's log.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use reap_store::{FrameIndex, Node, NodeConfig, Urgency};
use reap_tests::lab::{Backend, Lab, READS_ITS_DISK, Snapshot};
use reap_tests::pretend::PretendVmm;
use reap_tests::proxy::{Delay, Draws, Entry, Operation, Plan, Proxy, Shape, rounds, server_in};
use reap_tests::servers::Moto;
use reap_tests::worker::{Worker, reap_pack_command};
use serde_json::Value;

const PAGE: usize = 4096;
const STORE: &str = "REAP_TEST_REQUESTS_STORE";
const SNAPSHOT: &str = "REAP_TEST_REQUESTS_SNAPSHOT";

/// A store behind a proxy.
struct Behind {
    // Ended in this order.
    proxy: Proxy,
    server: Moto,
    directory: tempfile::TempDir,
}

impl Behind {
    fn start() -> Result<Self> {
        let server = Moto::start()?;
        let proxy = Proxy::start(server_in(server.environment())?, Plan::default())?;
        let behind = Self { proxy, server, directory: tempfile::tempdir()? };
        behind.pack_command(&["init"])?;
        Ok(behind)
    }

    fn environment(&self) -> Vec<(&'static str, String)> {
        self.proxy.environment(self.server.environment())
    }

    fn url(&self) -> String {
        self.server.url("requests")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn pack_command(&self, arguments: &[&str]) -> Result<Value> {
        let output = reap_pack_command(&self.url(), &[&["--json"], arguments].concat())?
            .envs(self.environment())
            .env("REAP_INDEX", self.path("index"))
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{arguments:?}: {said}");
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Packs `bytes` as `f`; answers with the snapshot's id and what it said.
    fn pack(&self, bytes: &[u8], more: &[&str]) -> Result<(String, Value)> {
        let memory = self.path("memory");
        fs::write(&memory, bytes)?;
        let memory = memory.display().to_string();
        let named: &[&str] = if more.contains(&"--name") { &[] } else { &["--name", "f"] };
        let arguments = [&["pack", "--memory", &memory], named].concat();
        let packed = self.pack_command(&[&arguments[..], more].concat())?;
        Ok((packed["id"].as_str().context("an id")?.to_owned(), packed))
    }

    /// A node that has never seen anything.
    fn new_node(&self, name: &str) -> Result<Worker> {
        self.node_with(name, &[])
    }

    fn node_with(&self, name: &str, arguments: &[&str]) -> Result<Worker> {
        Worker::start_with(&self.url(), &self.path(name), arguments, &self.environment())
    }

    /// Prepares `f` there and starts a VM that touches each of so many pages.
    fn restore(&self, node: &Worker, mode: &str, pages: usize) -> Result<()> {
        let prepared = node.prepare("f", mode)?;
        let socket = prepared["uffd"].as_str().context("a socket")?;
        let mut vmm = PretendVmm::start(socket, &self.path("memory"))?;
        vmm.tell(&format!("check 0 {pages} 1 0"))?;
        vmm.touches_us()?.context("the VM ended")?;
        Ok(())
    }

    /// From now on every answer takes so long, so that what need not wait for it overlaps.
    fn slow_down(&self, first_byte_ms: u64) {
        let first_byte = Delay::Fixed(Duration::from_millis(first_byte_ms));
        let shape = Shape { first_byte, ..Shape::default() };
        self.proxy.follow(Plan { shape, ..Plan::default() });
        self.proxy.forget();
    }
}

fn is_pack_read(entry: &Entry) -> bool {
    entry.operation == Operation::Get && entry.key.contains("/pack/")
}

/// Pages of which half compresses, all different.
fn pages(count: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; count * PAGE];
    for (number, page) in bytes.chunks_exact_mut(PAGE).enumerate() {
        fill(page, &mut Draws::new(seed, number as u64));
    }
    bytes
}

fn fill(page: &mut [u8], draws: &mut Draws) {
    for words in page.chunks_exact_mut(16) {
        words[..8].copy_from_slice(&draws.bits().to_le_bytes());
    }
}

#[test]
fn a_cold_open_takes_two_rounds_by_id_and_three_by_name() -> Result<()> {
    let behind = Behind::start()?;
    let (id, _) = behind.pack(&pages(256, 1), &[])?;
    for other in 2..5 {
        behind.pack(&pages(16, other), &["--name", "moved"])?;
    }
    behind.pack_command(&["tag", &id, "moved"])?;
    let ways = [
        ("by-id", format!("by-id/{id}/memory"), 2),
        ("by-name", "snapshots/f/memory".into(), 3),
        ("by-a-name-that-moved", "snapshots/moved/memory".into(), 3),
    ];
    for (way, path, most) in ways {
        let node = behind.new_node(way)?;
        behind.slow_down(150);
        let mut page = [0; PAGE];
        fs::File::open(node.mount().join(&path))?.read_exact_at(&mut page, 0)?;
        let requests = behind.proxy.requests();
        let first = requests.iter().position(is_pack_read).context("no frame was read")?;
        let before = rounds(&requests[..first]);
        let keys: Vec<_> =
            requests[..first].iter().map(|entry| (entry.operation, &entry.key)).collect();
        println!("{path}: {before} rounds before the first frame: {keys:?}");
        ensure!(before <= most, "{path}: {before} rounds: {requests:#?}");
        behind.proxy.follow(Plan::default());
        node.stop()?;
    }
    Ok(())
}

/// From the prepare to the last page: name; pin, records, list of working sets, and the first of them; tomb.
#[test]
fn a_restore_by_a_node_that_has_seen_nothing_takes_three_rounds() -> Result<()> {
    const PAGES: usize = 1024;
    let behind = Behind::start()?;
    behind.pack(&pages(PAGES, 1), &[])?;
    let record = |node: &str| {
        let recorder = behind.node_with(node, &["--settle", "1"])?;
        behind.restore(&recorder, "auto", PAGES)?;
        recorder.wait_for_working_set("f")?;
        recorder.stop()?;
        let listed = behind.pack_command(&["ws", "ls", "f"])?;
        listed[0]["stored_bytes"].as_u64().context("bytes")
    };
    let is_set = |entry: &&Entry| entry.operation == Operation::Get && entry.key.contains("/ws/");
    // What was asked for of set number `number` while a new node restored with it.
    let restored = |node: &str, number: u64, round: usize, stored: u64| {
        let node = behind.new_node(node)?;
        behind.slow_down(150);
        behind.restore(&node, "prefetch", PAGES)?;
        let requests = behind.proxy.requests();
        let key = format!("{number:012}");
        let is_newest = |entry: &&Entry| is_set(entry) && entry.key.ends_with(&key);
        let first = requests.iter().position(|entry| is_newest(&entry));
        let (in_round, all) =
            (rounds(&requests[..=first.context("no set was read")?]), rounds(&requests));
        let set: Vec<_> = requests.iter().filter(is_newest).collect();
        let brought = set.iter().filter(|entry| entry.status == Some(206));
        let read: u64 = brought.map(|entry| entry.sent_bytes).sum();
        println!(
            "set {number}: in round {in_round} of {all}; {} requests, {} of them for its {stored} bytes",
            requests.len(),
            set.len()
        );
        ensure!(in_round == round && all == 3, "in round {in_round} of {all}: {requests:#?}");
        ensure!(read == stored && set.len() <= 16, "{read} of {stored} bytes were read: {set:#?}");
        ensure!(!requests.iter().any(is_pack_read), "a pack was read: {requests:#?}");
        behind.proxy.follow(Plan::default());
        node.stop()
    };
    let stored = record("recorder")?;
    ensure!(stored > 2 << 20, "a set of {stored} bytes is not spread");
    restored("node", 1, 2, stored)?;

    // What is on its disk it does not read ahead.
    let node = behind.new_node("node")?;
    behind.proxy.forget();
    behind.restore(&node, "prefetch", PAGES)?;
    let requests = behind.proxy.requests();
    let set: Vec<_> = requests.iter().filter(is_set).collect();
    ensure!(set.len() == 1 && set[0].sent_bytes < stored, "not only the header: {set:#?}");
    node.stop()?;

    // Where the first set is not the newest, it is the second of these rounds that brings the list.
    behind.pack_command(&["ws", "rm", "f"])?;
    let stored = record("another recorder")?;
    restored("another node", 3, 3, stored)?;

    // Reading early must not serve what is removed.
    behind.pack_command(&["rm", "f"])?;
    let node = behind.new_node("late")?;
    behind.proxy.forget();
    ensure!(node.prepare("f", "prefetch").is_err(), "a removed snapshot is prepared");
    let looked = behind.proxy.requests().iter().any(|entry| entry.key.contains("/tomb/"));
    ensure!(looked, "nobody looked for the tomb");
    node.stop()
}

#[test]
fn a_hundred_readers_of_one_cold_frame_through_the_mount_cause_one_get() -> Result<()> {
    let behind = Behind::start()?;
    let bytes = pages(16, 1);
    let (id, _) = behind.pack(&bytes, &[])?;
    let node = behind.new_node("node")?;
    let path = node.mount().join("by-id").join(id).join("memory");
    let file = Arc::new(fs::File::open(&path)?);
    behind.slow_down(300);
    let barrier = Arc::new(Barrier::new(100));
    let readers: Vec<_> = (0..100usize)
        .map(|reader| {
            let (file, barrier) = (file.clone(), barrier.clone());
            std::thread::spawn(move || -> Result<(usize, Vec<u8>)> {
                let mut page = vec![0; PAGE];
                barrier.wait();
                file.read_exact_at(&mut page, (reader % 16 * PAGE) as u64)?;
                Ok((reader, page))
            })
        })
        .collect();
    for reader in readers {
        let (reader, page) = reader.join().map_err(|_| anyhow!("a reader panicked"))??;
        ensure!(page == bytes[reader % 16 * PAGE..][..PAGE], "other bytes");
    }
    let gets = behind.proxy.requests().into_iter().filter(is_pack_read).count();
    ensure!(gets == 1, "{gets} GETs: {:#?}", behind.proxy.requests());
    node.stop()
}

#[test]
fn a_hundred_readers_of_one_cold_frame_in_one_process_cause_one_get() -> Result<()> {
    let behind = Behind::start()?;
    let (id, _) = behind.pack(&pages(16, 1), &[])?;
    behind.slow_down(300);
    let output = std::process::Command::new(std::env::current_exe()?)
        .args(["--exact", "requests::hundred_readers", "--nocapture"])
        .envs(behind.environment())
        .env(STORE, behind.url())
        .env(SNAPSHOT, id)
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let gets = behind.proxy.requests().into_iter().filter(is_pack_read).count();
    ensure!(gets == 1, "{gets} GETs: {:#?}", behind.proxy.requests());
    Ok(())
}

/// Not a test of its own: the body of the one above.
#[test]
fn hundred_readers() -> Result<()> {
    let Ok(url) = std::env::var(STORE) else { return Ok(()) };
    let id = std::env::var(SNAPSHOT)?.parse()?;
    let node = Node::start(&NodeConfig::reader(&url))?;
    let snapshot = node.block_on(node.open_id(id))?;
    let barrier = Arc::new(Barrier::new(100));
    let readers: Vec<_> = (0..100)
        .map(|_| {
            let (snapshot, barrier) = (snapshot.clone(), barrier.clone());
            std::thread::spawn(move || {
                let (sender, receiver) = std::sync::mpsc::channel();
                barrier.wait();
                snapshot.fetch(&[FrameIndex(0)], Urgency::Demand, move |_, frame| {
                    let _gone = sender.send(frame.map(|frame| frame.page_count()));
                });
                receiver.recv()
            })
        })
        .collect();
    for reader in readers {
        let pages = reader.join().map_err(|_| anyhow!("a reader panicked"))???;
        ensure!(pages == 16, "{pages} pages");
    }
    drop(snapshot);
    node.block_on(node.release_pins());
    Ok(())
}

#[test]
fn packing_again_uploads_little_more_than_what_changed() -> Result<()> {
    let behind = Behind::start()?;
    let mut bytes = pages(16_384, 1);
    behind.pack(&bytes, &[])?;
    let (mut draws, mut changed) = (Draws::new(9, 9), Vec::new());
    for _ in 0..164 {
        let number = draws.below(16_384);
        let page = &mut bytes[number * PAGE..][..PAGE];
        fill(page, &mut draws);
        changed.extend_from_slice(page);
    }
    behind.proxy.forget();
    let (_, packed) = behind.pack(&bytes, &[])?;
    let requests = behind.proxy.requests();
    let puts = requests.iter().filter(|entry| entry.operation == Operation::Put);
    let uploaded: u64 = puts.map(|entry| entry.received_bytes).sum();
    let compressed = zstd::bulk::compress(&changed, 3)?.len() as u64;
    println!(
        "uploaded {uploaded} bytes for {compressed}: {:.2}",
        uploaded as f64 / compressed as f64
    );
    ensure!(uploaded * 10 <= compressed * 13, "{uploaded} for {compressed}: {packed}");
    Ok(())
}

#[test]
fn a_snapshot_is_read_in_long_requests() -> Result<()> {
    let behind = Behind::start()?;
    let (_, packed) = behind.pack(&pages(16_384, 1), &[])?;
    let stored = packed["statistics"]["pack_bytes"].as_u64().context("bytes")?;
    let gets = |way: &str| -> Result<()> {
        let requests = behind.proxy.requests();
        let ranges: Vec<_> =
            requests.iter().filter(|entry| is_pack_read(entry)).map(|entry| entry.range).collect();
        println!("{way}: {} GETs for {stored} bytes", ranges.len());
        let most = stored * 11 / 10 / (4 << 20);
        ensure!(ranges.len() as u64 <= most, "{way}, at most {most}: {ranges:?}");
        Ok(())
    };
    behind.proxy.forget();
    behind.pack_command(&["export", "f", &behind.path("out").display().to_string()])?;
    gets("export")?;
    let node = behind.new_node("node")?;
    behind.proxy.forget();
    ensure!(fs::read(node.mount().join("snapshots/f/memory"))? == pages(16_384, 1), "other bytes");
    gets("through the mount")?;
    node.stop()
}

/// Restores a guest on a node that has seen nothing, its disk from there too or from the file `disk`; answers
/// with the rounds of requests between its handshake and its answer.
fn rounds_of_a_guest(
    behind: &Behind,
    guest: &mut GuestFiles,
    node: &str,
    profile: &str,
    disk: Option<&Path>,
) -> Result<usize> {
    let worker = behind.node_with(node, &["--settle", "1"])?;
    let arguments = ["f", "--mode", "auto", "--profile", profile];
    let prepared = worker.ask("prepare", &arguments)?;
    let mounted = prepared["disks"]["disk"].as_str().context("a disk")?;
    guest.snapshot.disk = disk.map_or_else(|| PathBuf::from(mounted), Path::to_owned);
    let socket = prepared["uffd"].as_str().context("a socket")?.into();
    behind.slow_down(30);
    let mut restored = guest.lab.restore(&guest.snapshot, &Backend::Uffd { socket })?;
    ensure!(restored.request("one")?.line == guest.answer, "another answer");
    let rounds = rounds(&behind.proxy.requests());
    behind.proxy.follow(Plan::default());
    drop(restored);
    let restore = worker.wait_for_restore(|restore| !restore["end"].is_null())?;
    if restore["mode"] == "record" {
        worker.wait_for_published(&format!("f,{profile}"), 1)?;
    }
    worker.stop()?;
    Ok(rounds)
}

/// A real guest, and what it answered before it was packed.
struct GuestFiles {
    lab: Lab,
    snapshot: Snapshot,
    answer: String,
}

#[test]
fn what_a_guest_reads_of_its_disk_after_a_restore_is_brought_ahead_too() -> Result<()> {
    let behind = Behind::start()?;
    let lab = Lab::open()?;
    let mut guest = lab.boot(READS_ITS_DISK, 256, &behind.path("guest"))?;
    let answer = guest.request("one")?.line;
    let snapshot = guest.snapshot(&behind.path("guest"))?;
    let disk = snapshot.disk.clone();
    let memory = snapshot.memory.display().to_string();
    let state = snapshot.state.display().to_string();
    let named = format!("disk={}", disk.display());
    let files = ["--memory", &memory, "--state", &state, "--disk", &named];
    behind.pack_command(&[&["pack", "--name", "f"], &files[..]].concat())?;
    let mut guest = GuestFiles { lab, snapshot, answer };

    // One profile is recorded with its disk out of our sight, the other with all of it.
    rounds_of_a_guest(&behind, &mut guest, "one", "blind", Some(&disk))?;
    rounds_of_a_guest(&behind, &mut guest, "two", "all", None)?;
    let blind = rounds_of_a_guest(&behind, &mut guest, "three", "blind", None)?;
    let all = rounds_of_a_guest(&behind, &mut guest, "four", "all", None)?;
    println!("rounds until the answer: {blind} with memory brought ahead, {all} with the disk too");
    ensure!(blind >= 12, "{blind} rounds for the disk: this shows nothing");
    ensure!(all * 2 <= blind, "{all} rounds with a disk that is brought ahead, {blind} without");
    Ok(())
}

#[test]
fn what_is_damaged_on_the_way_is_read_once_more() -> Result<()> {
    let behind = Behind::start()?;
    let (id, _) = behind.pack(&pages(64, 1), &[])?;
    for part in ["/format", "/snap/", "/manifest/", "/pack/"] {
        let fault = reap_tests::proxy::Fault::Flip;
        let rule = reap_tests::proxy::Rule {
            operation: Some(Operation::Get),
            key_contains: part.into(),
            skip: 0,
            times: 1,
            fault,
        };
        behind.proxy.follow(Plan { rules: vec![rule], ..Plan::default() });
        behind.proxy.forget();
        let to = behind.path(&part.replace('/', ""));
        behind.pack_command(&["export", &id, &to.display().to_string()])?;
        ensure!(fs::read(to.join("memory"))? == pages(64, 1), "{part}: other bytes");
        let flipped = behind.proxy.requests().iter().filter(|entry| entry.fault.is_some()).count();
        ensure!(flipped == 1, "{part}: nothing was damaged");
    }
    Ok(())
}
