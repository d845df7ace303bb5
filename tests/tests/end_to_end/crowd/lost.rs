//! VMs whose pages are nowhere to be had: each is ended within its deadline with the reason, and none reads a
//! byte that is not its own. Over a local store and over S3.

use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use reap_tests::pretend::PretendVmm;
use reap_tests::proxy::{Fault, Operation, Plan, Proxy, Rule, server_in};
use reap_tests::servers::StandIn;
use reap_tests::worker::{Worker, metric, reap_pack_command};
use reap_vmm::true_memory;

use super::{FULL, PAGES, Served};

/// Given to `reapd`.
const DEADLINE: Duration = Duration::from_secs(2);
const ARGUMENTS: [&str; 2] = ["--fault-deadline", "2"];

/// What becomes of the store under VMs that run.
#[derive(Clone, Copy, Debug)]
enum Loss {
    StoreGone,
    PacksTruncated,
    PacksDamaged,
    PacksUnreadable,
}

impl Loss {
    fn strike(self, store: &Path) -> Result<()> {
        if matches!(self, Self::StoreGone) {
            return Ok(std::fs::rename(store, store.with_extension("gone"))?);
        }
        for entry in std::fs::read_dir(store.join("pack"))? {
            let path = entry?.path();
            let mut bytes = Vec::new();
            std::fs::File::open(&path)?.read_to_end(&mut bytes)?;
            match self {
                Self::StoreGone => {}
                Self::PacksTruncated => bytes.truncate(40),
                // One bit in each 512 bytes.
                Self::PacksDamaged => bytes[32..].iter_mut().step_by(512).for_each(|b| *b ^= 4),
                Self::PacksUnreadable => {
                    std::fs::remove_file(&path)?;
                    std::fs::create_dir(&path)?;
                    continue;
                }
            }
            std::fs::write(&path, bytes)?;
        }
        Ok(())
    }
}

#[test]
fn a_vm_whose_pages_are_lost_is_ended_with_the_reason() -> Result<()> {
    let each = if FULL { 20 } else { 5 };
    for loss in [Loss::StoreGone, Loss::PacksTruncated, Loss::PacksDamaged, Loss::PacksUnreadable] {
        let served = Served::start("demand", &ARGUMENTS)?;
        let mut vmms = (0..each).map(|_| served.vmm()).collect::<Result<Vec<_>>>()?;
        loss.strike(&served.fixture.path("store"))?;
        all_end(&mut vmms, &format!("{loss:?}"))?;
        each_has_a_reason(&served.worker, each)?;
        served.worker.stop()?;
    }
    Ok(())
}

/// The same of a store on S3.
#[derive(Clone, Copy, Debug)]
enum RemoteLoss {
    /// Nobody listens any more.
    ServerGone,
    PacksMissing,
    /// Requests for packs, from now on and for ever.
    Every(Fault),
}

impl RemoteLoss {
    const ALL: [Self; 8] = [
        Self::ServerGone,
        Self::PacksMissing,
        Self::Every(Fault::Refuse(500)),
        Self::Every(Fault::Refuse(503)),
        Self::Every(Fault::Reset),
        Self::Every(Fault::Hang(Duration::from_secs(600))),
        Self::Every(Fault::Truncate),
        Self::Every(Fault::Flip),
    ];

    fn strike(self, server: &mut StandIn, proxy: &Proxy) {
        match self {
            Self::ServerGone => server.go_away(),
            Self::PacksMissing => server.behaviour.lose("/pack/"),
            Self::Every(fault) => {
                let (operation, key_contains) = (Some(Operation::Get), "/pack/".into());
                let rule = Rule { operation, key_contains, skip: 0, times: u32::MAX, fault };
                proxy.follow(Plan { rules: vec![rule], ..Plan::default() });
            }
        }
    }
}

#[test]
fn a_vm_whose_pages_are_lost_on_s3_is_ended_with_the_reason() -> Result<()> {
    let each = if FULL { 10 } else { 2 };
    for loss in RemoteLoss::ALL {
        // Ended in the other order.
        let directory = tempfile::tempdir()?;
        let mut server = StandIn::start()?;
        let proxy = Proxy::start(server_in(server.environment())?, Plan::default())?;
        let environment = proxy.environment(server.environment_with_keys());
        let memory = directory.path().join("memory");
        std::fs::write(&memory, true_memory(PAGES))?;
        let file = memory.display().to_string();
        let index = directory.path().join("index");
        for arguments in [&["init"][..], &["pack", "--name", "f", "--memory", &file]] {
            let mut command = reap_pack_command(&server.url(), arguments)?;
            let output =
                command.envs(environment.iter().cloned()).env("REAP_INDEX", &index).output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let at = directory.path().join("worker");
        let worker = Worker::start_with(&server.url(), &at, &ARGUMENTS, &environment)?;
        let prepared = worker.prepare("f", "demand")?;
        let socket = prepared["uffd"].as_str().context("a socket")?;
        let vmms = (0..each).map(|_| PretendVmm::start(socket, &memory));
        let mut vmms = vmms.collect::<Result<Vec<_>>>()?;
        loss.strike(&mut server, &proxy);
        all_end(&mut vmms, &format!("{loss:?}"))?;
        each_has_a_reason(&worker, each)?;
        // Without the server it would wait to give its pin up.
        if matches!(loss, RemoteLoss::ServerGone) {
            server.come_back()?;
        }
        proxy.follow(Plan::default());
        worker.stop()?;
    }
    Ok(())
}

/// Each VM wants pages of its own, and dies of it.
fn all_end(vmms: &mut [PretendVmm], what: &str) -> Result<()> {
    let began = Instant::now();
    let share = PAGES / vmms.len() as u64;
    for (number, vmm) in vmms.iter_mut().enumerate() {
        // Not from a zero page on: those need no store.
        let from = (number as u64 * share).next_multiple_of(5) + 1;
        vmm.tell(&format!("check {from} {} 1 0", from + 4))?;
    }
    for vmm in vmms.iter_mut() {
        ensure!(vmm.touches_us()?.is_none(), "{what}: a page was read that cannot be had");
        ensure!(vmm.ends_within(Duration::from_secs(30))?, "{what}: a VMM hangs");
    }
    let longest = began.elapsed();
    println!("{what}: {} VMs ended within {longest:?}", vmms.len());
    let most = DEADLINE + Duration::from_secs(1);
    ensure!(!FULL || longest <= most, "{what}: the last VM lived on for {longest:?}");
    Ok(())
}

fn each_has_a_reason(worker: &Worker, count: usize) -> Result<()> {
    let restores = worker.ask("status", &[])?["restores"].as_array().cloned().unwrap_or_default();
    let reasons = restores.iter().filter_map(|restore| restore["end"]["killed"]["reason"].as_str());
    let stated = reasons.filter(|reason| reason.len() > 20).count();
    ensure!(stated == count, "{stated} reasons: {restores:?}");
    let said = worker.log().matches("is killed: ").count();
    ensure!(said == count, "{said} reasons in the log");
    let metrics = worker.metrics()?;
    let counted = ["deadline", "unservable"]
        .map(|cause| metric(&metrics, "reap_restores_killed_total", &format!("cause=\"{cause}\"")));
    let counted: f64 = counted.into_iter().sum::<Result<f64>>()?;
    ensure!(counted == count as f64, "{counted} in the metrics");
    Ok(())
}
