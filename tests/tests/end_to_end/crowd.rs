//! Many VMMs in processes of their own under one `reapd`: they share it, and none disturbs another.
//!
//! `make test` runs them in a shorter form; `make soak` in full, and prints what `docs/BENCHMARKS.md` says.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use reap_tests::pretend::{PretendVmm, quantile};
use reap_tests::worker::{Worker, reap_pack_json};
use reap_vmm::{PretendVm, is_refused, send, true_memory};
use serde_json::Value;

use super::Fixture;

#[path = "crowd/lost.rs"]
mod lost;

const FULL: bool = cfg!(feature = "soak");
const PAGES: u64 = 2048;

/// A worker that serves one snapshot, in a mode.
struct Served {
    worker: Worker,
    socket: String,
    memory: PathBuf,
    fixture: Fixture,
}

impl Served {
    fn start(mode: &str, arguments: &[&str]) -> Result<Self> {
        Self::of_pages(PAGES, mode, arguments)
    }

    fn of_pages(pages: u64, mode: &str, arguments: &[&str]) -> Result<Self> {
        let fixture = Fixture::new()?;
        let memory = fixture.path("memory");
        std::fs::write(&memory, true_memory(pages))?;
        let file = memory.display().to_string();
        reap_pack_json(&fixture.url, &["pack", "--name", "f", "--memory", &file])?;
        let worker = fixture.worker(arguments)?;
        let prepared = worker.prepare("f", mode)?;
        let socket = prepared["uffd"].as_str().context("a socket")?.to_owned();
        Ok(Self { worker, socket, memory, fixture })
    }

    fn vmm(&self) -> Result<PretendVmm> {
        PretendVmm::start(&self.socket, &self.memory)
    }

    fn descriptors(&self) -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/{}/fd", self.worker.process_id()))?.count())
    }

    /// A line of `/proc/PID/status`, in KiB.
    fn status_kib(&self, name: &str) -> Result<u64> {
        let path = format!("/proc/{}/status", self.worker.process_id());
        let status = std::fs::read_to_string(path)?;
        let line = status.lines().find_map(|line| line.strip_prefix(name)).context("a line")?;
        Ok(line.trim_start_matches(':').trim().trim_end_matches(" kB").parse()?)
    }

    fn restores(&self) -> Result<Vec<Value>> {
        Ok(self.worker.ask("status", &[])?["restores"].as_array().cloned().unwrap_or_default())
    }

    /// Descriptors come back as the ends of VMs are noticed.
    fn wait_for_descriptors(&self, most: usize) -> Result<()> {
        let began = Instant::now();
        while self.descriptors()? > most {
            let now = self.descriptors()?;
            ensure!(began.elapsed() < Duration::from_secs(20), "{most} descriptors, {now} now");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

#[test]
fn hundreds_of_vms_at_once_get_every_byte() -> Result<()> {
    let count = if FULL { 500 } else { 60 };
    let served = Served::start("demand", &["--memory-cache", "64MiB"])?;
    // One before, so that what is opened once is open.
    let mut first = served.vmm()?;
    first.tell(&format!("check 0 {PAGES} 1 0"))?;
    first.touches_us()?.context("it ended")?;
    drop(first);
    served.worker.wait_for_restore(|restore| !restore["end"].is_null())?;
    let before = served.descriptors()?;
    let mut vmms = (0..count).map(|_| served.vmm()).collect::<Result<Vec<_>>>()?;
    let began = Instant::now();
    for vmm in &mut vmms {
        vmm.tell(&format!("check 0 {PAGES} 1 0"))?;
    }
    let mut touches = Vec::new();
    for vmm in &mut vmms {
        touches.extend(vmm.touches_us()?.context("a VMM ended")?);
    }
    let took = began.elapsed();
    ensure!(touches.len() as u64 == count * PAGES, "{} touches", touches.len());
    let served_us = |class: &str| {
        let restores = served.restores()?;
        let longest = restores.iter().filter_map(|restore| restore[class]["max_us"].as_u64());
        Ok::<_, anyhow::Error>(longest.max().unwrap_or(0))
    };
    let longest = ["faults_cached", "faults_fetched", "faults_zero"].map(served_us);
    let longest = longest.into_iter().collect::<Result<Vec<_>>>()?;
    println!(
        "{count} VMs, {PAGES} pages each, on demand: {:.1} s; a touch p50 {} us, p99 {} us, longest {} us; longest fault in \
         reapd: cached {} us, fetched {} us, zero {} us; reapd {} MiB at most",
        took.as_secs_f64(),
        quantile(&mut touches, 0.5),
        quantile(&mut touches, 0.99),
        quantile(&mut touches, 1.0),
        longest[0],
        longest[1],
        longest[2],
        served.status_kib("VmHWM")? >> 10,
    );
    let threads = served.status_kib("Threads")?;
    ensure!(threads < 40, "{threads} threads for {count} VMs");
    drop(vmms);
    served.wait_for_descriptors(before)?;
    ensure!(served.status_kib("VmHWM")? >> 10 < 128, "64 MiB and the cache of 64 MiB");
    served.worker.stop()
}

/// Sets that are many times the budget, of many VMs at once.
#[test]
fn prefetches_stay_within_their_budget_and_bring_every_byte() -> Result<()> {
    let (count, pages) = if FULL { (20, 131_072) } else { (8, 8192) };
    let arguments = ["--prefetch-budget", "16MiB", "--memory-cache", "8MiB", "--settle", "1"];
    let served = Served::of_pages(pages, "record", &arguments)?;
    let mut recorded = served.vmm()?;
    recorded.tell(&format!("check 0 {pages} 1 0"))?;
    recorded.touches_us()?.context("it ended")?;
    served.worker.wait_for_working_set("f")?;
    drop(recorded);
    served.worker.prepare("f", "prefetch")?;
    let prefetch =
        || Ok::<_, anyhow::Error>(served.worker.ask("status", &[])?["cache"]["prefetch"].clone());
    let bytes = |status: &Value, name: &str| status[name].as_u64().context(name.to_owned());
    let vmms = (0..count).map(|_| served.vmm()).collect::<Result<Vec<_>>>()?;
    let began = Instant::now();
    loop {
        let status = prefetch()?;
        let is_idle = (bytes(&status, "in_flight_bytes")?, bytes(&status, "waiting")?) == (0, 0);
        // Each was taken in, and its set was asked for.
        let is_done = |restore: &&Value| {
            restore["mode"] == "prefetch" && restore["prefetched_pages"] == restore["planned_pages"]
        };
        if is_idle && served.restores()?.iter().filter(is_done).count() == count {
            break;
        }
        ensure!(began.elapsed() < Duration::from_secs(300), "{status}");
        std::thread::sleep(Duration::from_millis(20));
    }
    for mut vmm in vmms {
        vmm.tell(&format!("check 0 {pages} 1 0"))?;
        vmm.touches_us()?.context("a VMM ended")?;
    }
    let restores = served.restores()?;
    let prefetched = restores.iter().filter(|restore| restore["mode"] == "prefetch");
    ensure!(prefetched.clone().count() == count, "{restores:?}");
    for restore in prefetched {
        ensure!(restore["prefetched_pages"] == restore["planned_pages"], "{restore}");
    }
    let status = prefetch()?;
    let (highest, limit) = (bytes(&status, "highest_bytes")?, bytes(&status, "limit_bytes")?);
    println!(
        "{count} VMs, sets of {} MiB, {:.1} s; prefetch {} KiB in flight at most, of {} KiB; reapd {} MiB at most",
        pages >> 8,
        began.elapsed().as_secs_f64(),
        highest >> 10,
        limit >> 10,
        served.status_kib("VmHWM")? >> 10
    );
    ensure!(limit == 16 << 20 && highest <= limit, "{status}");
    ensure!(highest >= limit / 2, "this shows nothing: {status}");
    served.worker.stop()
}

#[test]
fn a_vm_that_floods_leaves_the_others_their_turns() -> Result<()> {
    let (others, pages, rounds) = if FULL { (49, 150, 4) } else { (10, 100, 1) };
    let served = Served::start("demand", &[])?;
    let mut waits: [Vec<u64>; 3] = Default::default();
    let mut vmms = (0..others).map(|_| served.vmm()).collect::<Result<Vec<_>>>()?;
    // All frames in memory, so that every wait is for the fault thread.
    let mut first = served.vmm()?;
    first.tell(&format!("check 0 {PAGES} 1 0"))?;
    first.touches_us()?.context("it ended")?;
    let mut from = 0;
    for _ in 0..rounds {
        for (number, load) in [None, Some("spin 2"), Some("flood 0 64 2")].into_iter().enumerate() {
            let mut loaded = served.vmm()?;
            if let Some(command) = load {
                loaded.tell(command)?;
                loaded.answer()?.context("it ended")?;
            }
            for vmm in &mut vmms {
                vmm.tell(&format!("check {from} {} 1 2000", from + pages))?;
            }
            for vmm in &mut vmms {
                waits[number].extend(vmm.touches_us()?.context("a VMM ended")?);
            }
            from += pages;
            ensure!(!loaded.ends_within(Duration::ZERO)?, "the loaded VMM ended");
        }
    }
    let removed: u64 =
        served.restores()?.iter().filter_map(|restore| restore["removed_pages"].as_u64()).sum();
    ensure!(removed > 1000, "the flood happened");
    for (name, waits) in ["idle", "spinning", "flooding"].into_iter().zip(&mut waits) {
        println!(
            "{others} VMs beside one that is {name}: p50 {} us, p99 {} us ({} touches)",
            quantile(waits, 0.5),
            quantile(waits, 0.99),
            waits.len()
        );
    }
    drop(vmms);
    drop(first);
    served.worker.stop()
}

#[test]
fn broken_handshakes_cost_nothing_that_stays() -> Result<()> {
    let count = if FULL { 10_000 } else { 1000 };
    let served = Served::start("demand", &[])?;
    let mut good = served.vmm()?;
    good.tell(&format!("check 0 {} 1 0", PAGES / 2))?;
    good.touches_us()?.context("it ended")?;
    let other = PretendVm::whole(PAGES)?;
    let message = other.message();
    let broken: [(Vec<u8>, usize); 8] = [
        (b"{}".into(), 1),
        (b"[]".into(), 1),
        (b"not JSON".into(), 0),
        (message.replace("\"offset\":0", "\"offset\":4096").into(), 1),
        (message.replace("4096", "8192").into(), 1),
        (message.clone().into(), 2),
        (vec![b'['; 70_000], 1),
        (message[..message.len() / 2].into(), 1),
    ];
    let connect = |number: usize| -> Result<UnixStream> {
        let (bytes, descriptors) = &broken[number % broken.len()];
        let stream = UnixStream::connect(&served.socket)?;
        let fds = vec![other.uffd(); *descriptors];
        // Refused before it has said all: as good.
        let _cut_short = send(&stream, bytes, &fds);
        // The half message is complete when the peer is gone.
        stream.shutdown(std::net::Shutdown::Write)?;
        Ok(stream)
    };
    for number in 0..200 {
        ensure!(is_refused(connect(number)?), "{number} was not refused");
    }
    let (before, memory) = (served.descriptors()?, served.status_kib("VmRSS")?);
    for number in 0..count {
        ensure!(is_refused(connect(number)?), "{number} was not refused");
    }
    let after = served.status_kib("VmRSS")?;
    println!(
        "{count} broken handshakes: {before} descriptors before, {} after; {memory} KiB resident before, {after} KiB after",
        served.descriptors()?
    );
    served.wait_for_descriptors(before)?;
    ensure!(after < memory + 2048, "{memory} KiB before, {after} KiB after");
    good.tell(&format!("check {} {PAGES} 1 0", PAGES / 2))?;
    good.touches_us()?.context("the other VM was disturbed")?;
    ensure!(served.restores()?.len() == 1, "a broken handshake became a restore");
    drop(good);
    served.worker.stop()
}
