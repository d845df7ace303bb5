//! `make demo`: real guests through the whole path, and a table of what it did for them.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use reap_tests::lab::{Backend, Guest, Lab, Snapshot};
use reap_tests::worker::{Worker, reap_pack, reap_pack_json};
use serde_json::Value;

const FUNCTIONS: [&str; 3] = ["helloworld", "json_serdes", "image_rotate"];
const MEMORY_MIB: u32 = 256;
/// Each way is measured this often, in turns; the table shows medians.
const ROUNDS: usize = 3;
const WAYS: [&str; 5] = [
    "plain file, cold",
    "our mount, cold",
    "uffd on demand, cold",
    "uffd + working set, cold",
    "plain file, warm",
];

/// One restore: milliseconds from resume to answer, and faults that had to be served.
#[derive(Clone, Copy)]
struct Measured {
    answer_ms: f64,
    faults: u64,
}

fn main() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let url = format!("file://{}/store", scratch.path().display());
    println!("building the guest (once)");
    let lab = Lab::open()?;
    println!("making a store at {url}");
    reap_pack_json(&url, &["init"])?;
    let mut snapshots = Vec::new();
    for function in FUNCTIONS {
        println!("{function}: boot, warm up, snapshot, pack");
        snapshots.push(make_snapshot(&lab, &url, scratch.path(), function)?);
    }
    println!("recording working sets");
    record(&lab, &url, scratch.path(), &snapshots)?;
    let mut rows = Vec::new();
    for (snapshot, expected) in &snapshots {
        println!("{}: {ROUNDS} rounds of {} ways", snapshot.function, WAYS.len());
        rows.push((
            snapshot.function.clone(),
            measure(&lab, &url, scratch.path(), snapshot, expected)?,
        ));
    }
    print_table(&rows);
    print_savings(&url)
}

fn make_snapshot(
    lab: &Lab,
    url: &str,
    scratch: &Path,
    function: &str,
) -> Result<(Snapshot, String)> {
    let directory = scratch.join(function);
    std::fs::create_dir_all(&directory)?;
    let mut guest = lab.boot(function, MEMORY_MIB, &directory)?;
    let expected = guest.request("one")?.line;
    let snapshot = guest.snapshot(&directory)?;
    let path = |path: &Path| path.to_str().map(str::to_owned).context("a path in UTF-8");
    let disk = format!("root={}", path(&snapshot.disk)?);
    let (memory, state) = (path(&snapshot.memory)?, path(&snapshot.state)?);
    let arguments = [
        "pack", "--name", function, "--memory", &memory, "--state", &state, "--disk", &disk,
        "--vmm", "qemu",
    ];
    let output = reap_pack(url, &arguments)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    print!("  {}", String::from_utf8_lossy(&output.stdout));
    Ok((snapshot, expected))
}

fn record(lab: &Lab, url: &str, scratch: &Path, snapshots: &[(Snapshot, String)]) -> Result<()> {
    let worker = Worker::start(url, &scratch.join("worker"), &["--settle", "1"])?;
    for (snapshot, expected) in snapshots {
        let prepared = worker.prepare(&snapshot.function, "auto")?;
        let backend = uffd(&prepared)?;
        let mut guest = lab.restore(snapshot, &backend)?;
        let answer = guest.request("one")?.line;
        ensure!(&answer == expected, "{} answered {answer}, not {expected}", snapshot.function);
        drop(guest);
        worker.wait_for_working_set(&snapshot.function)?;
    }
    worker.stop()
}

fn uffd(prepared: &Value) -> Result<Backend> {
    let socket = prepared["uffd"].as_str().context("a socket")?;
    Ok(Backend::Uffd { socket: socket.into() })
}

fn measure(
    lab: &Lab,
    url: &str,
    scratch: &Path,
    snapshot: &Snapshot,
    expected: &str,
) -> Result<Vec<Measured>> {
    let mut rounds = vec![Vec::new(); WAYS.len()];
    for _ in 0..ROUNDS {
        for (way, measured) in rounds.iter_mut().enumerate() {
            measured.push(match way {
                0 => plain(lab, snapshot, expected, true)?,
                1..=3 => ours(lab, url, scratch, snapshot, expected, way)?,
                _ => {
                    plain(lab, snapshot, expected, false)?;
                    plain(lab, snapshot, expected, false)?
                }
            });
        }
    }
    Ok(rounds.into_iter().map(median).collect())
}

fn median(mut rounds: Vec<Measured>) -> Measured {
    rounds.sort_by(|one, other| one.answer_ms.total_cmp(&other.answer_ms));
    rounds[rounds.len() / 2]
}

/// From the plain file. QEMU itself is warm in every way: what is measured is guest memory.
fn plain(lab: &Lab, snapshot: &Snapshot, expected: &str, cold: bool) -> Result<Measured> {
    if cold {
        reap_tests::lab::evict(&snapshot.memory)?;
    }
    let mut guest = lab.restore(snapshot, &Backend::File(snapshot.memory.clone()))?;
    let before = major_faults(&guest)?;
    let answer_ms = answer(&mut guest, expected)?;
    Ok(Measured { answer_ms, faults: major_faults(&guest)? - before })
}

fn ours(
    lab: &Lab,
    url: &str,
    scratch: &Path,
    snapshot: &Snapshot,
    expected: &str,
    way: usize,
) -> Result<Measured> {
    // So that every byte comes from the disk.
    reap_tests::lab::evict_tree(&scratch.join("store"))?;
    // A new daemon has nothing in memory.
    let worker = Worker::start(url, &scratch.join("worker"), &[])?;
    let mode = if way == 3 { "prefetch" } else { "demand" };
    let prepared = worker.prepare(&snapshot.function, mode)?;
    let memory = prepared["memory"].as_str().context("a memory path")?;
    let backend = if way == 1 { Backend::File(memory.into()) } else { uffd(&prepared)? };
    let mut guest = lab.restore(snapshot, &backend)?;
    let before = major_faults(&guest)?;
    let answer_ms = answer(&mut guest, expected)?;
    let faults = match way {
        1 => major_faults(&guest)? - before,
        _ => served_faults(&worker.newest_restore()?),
    };
    drop(guest);
    worker.stop()?;
    Ok(Measured { answer_ms, faults })
}

fn answer(guest: &mut Guest, expected: &str) -> Result<f64> {
    let answer = guest.request("one")?;
    ensure!(answer.line == expected, "the guest answered {}, not {expected}", answer.line);
    Ok(answer.since_resume.as_secs_f64() * 1000.0)
}

fn served_faults(restore: &Value) -> u64 {
    let classes = ["faults_cached", "faults_fetched", "faults_zero", "faults_removed"];
    classes.iter().filter_map(|class| restore[class]["count"].as_u64()).sum()
}

/// Faults of the VMM that had to wait for a file, from its `stat`.
fn major_faults(guest: &Guest) -> Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", guest.process_id()))?;
    let after_name = stat.rsplit_once(')').context("a stat line")?.1;
    Ok(after_name.split_whitespace().nth(9).context("majflt")?.parse()?)
}

fn print_table(rows: &[(String, Vec<Measured>)]) {
    println!("\nresume to first answer, ms (faults that had to be served), median of {ROUNDS}\n");
    print!("{:<14}", "function");
    WAYS.iter().for_each(|way| print!("{way:>26}"));
    println!();
    for (function, measured) in rows {
        print!("{function:<14}");
        for one in measured {
            print!("{:>26}", format!("{:.0} ({})", one.answer_ms, one.faults));
        }
        println!();
    }
    println!(
        "\nQEMU emulates the CPU here, and translates guest code anew in every process: that is part of each\n\
         time, the warm one too. The difference to the warm time is what paging costs."
    );
}

fn print_savings(url: &str) -> Result<()> {
    let listed = reap_pack_json(url, &["ls"])?;
    let sum = |key: &str| -> u64 {
        listed.as_array().into_iter().flatten().filter_map(|row| row[key].as_u64()).sum()
    };
    let (raw, stored) = (sum("file_bytes"), sum("pack_bytes"));
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!(
        "\nthe store holds {:.0} MiB of snapshots in {:.0} MiB, {:.1} : 1",
        mib(raw),
        mib(stored),
        raw as f64 / stored.max(1) as f64
    );
    Ok(())
}
