//! `make demo`: real guests through the whole path, and a table of what it did for them. `make demo-s3`: the
//! same over a real S3 server, which `tests/servers/with-server.sh` has started.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use reap_tests::lab::{Backend, Guest, Lab, Snapshot};
use reap_tests::worker::{Worker, reap_pack, reap_pack_json};
use serde_json::Value;

const FUNCTIONS: [&str; 3] = ["helloworld", "json_serdes", "image_rotate"];
const MEMORY_MIB: u32 = 256;
/// Each way is measured this often, in turns; the table shows medians.
const ROUNDS: usize = 3;

/// How a guest gets its memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    PlainCold,
    /// A node that has nothing of the snapshot, by file.
    MountCold,
    /// By userfaultfd, page by page.
    DemandCold,
    /// By userfaultfd, with the working set.
    PrefetchCold,
    /// The same on a node that has had the snapshot from a remote store before.
    PrefetchCached,
    PlainWarm,
}

impl Way {
    fn title(self) -> &'static str {
        match self {
            Self::PlainCold => "plain file, cold",
            Self::MountCold => "our mount, cold",
            Self::DemandCold => "uffd on demand, cold",
            Self::PrefetchCold => "uffd + working set, cold",
            Self::PrefetchCached => "the same, node cache",
            Self::PlainWarm => "plain file, warm",
        }
    }
}

/// Where everything is.
struct Place {
    lab: Lab,
    scratch: PathBuf,
    url: String,
    /// The store's directory, if it is a local one.
    local: Option<PathBuf>,
}

/// One restore: milliseconds from resume to answer, and faults that had to be served.
#[derive(Clone, Copy)]
struct Measured {
    answer_ms: f64,
    faults: u64,
}

fn main() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (url, local) = match std::env::args().nth(1) {
        Some(url) => (url, None),
        None => {
            let store = scratch.path().join("store");
            (format!("file://{}", store.display()), Some(store))
        }
    };
    println!("building the guest (once)");
    let place = Place { lab: Lab::open()?, scratch: scratch.path().to_owned(), url, local };
    println!("making a store at {}", place.url);
    reap_pack_json(&place.url, &["init"])?;
    let mut snapshots = Vec::new();
    for function in FUNCTIONS {
        println!("{function}: boot, warm up, snapshot, pack");
        snapshots.push(make_snapshot(&place, function)?);
    }
    println!("recording working sets");
    record(&place, &snapshots)?;
    let mut ways = vec![Way::PlainCold, Way::MountCold, Way::DemandCold, Way::PrefetchCold];
    if place.local.is_none() {
        ways.push(Way::PrefetchCached);
    }
    ways.push(Way::PlainWarm);
    let mut rows = Vec::new();
    for (snapshot, expected) in &snapshots {
        println!("{}: {ROUNDS} rounds of {} ways", snapshot.function, ways.len());
        rows.push((snapshot.function.clone(), measure(&place, &ways, snapshot, expected)?));
    }
    print_table(&ways, &rows);
    print_savings(&place.url)
}

fn make_snapshot(place: &Place, function: &str) -> Result<(Snapshot, String)> {
    let directory = place.scratch.join(function);
    std::fs::create_dir_all(&directory)?;
    let mut guest = place.lab.boot(function, MEMORY_MIB, &directory)?;
    let expected = guest.request("one")?.line;
    let snapshot = guest.snapshot(&directory)?;
    let path = |path: &Path| path.to_str().map(str::to_owned).context("a path in UTF-8");
    let disk = format!("root={}", path(&snapshot.disk)?);
    let (memory, state) = (path(&snapshot.memory)?, path(&snapshot.state)?);
    let arguments = [
        "pack", "--name", function, "--memory", &memory, "--state", &state, "--disk", &disk,
        "--vmm", "qemu",
    ];
    let output = reap_pack(&place.url, &arguments)?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    print!("  {}", String::from_utf8_lossy(&output.stdout));
    Ok((snapshot, expected))
}

fn record(place: &Place, snapshots: &[(Snapshot, String)]) -> Result<()> {
    let worker = Worker::start(&place.url, &place.scratch.join("worker"), &["--settle", "1"])?;
    for (snapshot, expected) in snapshots {
        let prepared = worker.prepare(&snapshot.function, "auto")?;
        let backend = uffd(&prepared)?;
        let mut guest = place.lab.restore(snapshot, &backend)?;
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
    place: &Place,
    ways: &[Way],
    snapshot: &Snapshot,
    expected: &str,
) -> Result<Vec<Measured>> {
    let mut rounds = vec![Vec::new(); ways.len()];
    for _ in 0..ROUNDS {
        for (way, measured) in ways.iter().zip(&mut rounds) {
            measured.push(match way {
                Way::PlainCold => plain(&place.lab, snapshot, expected, true)?,
                Way::PlainWarm => {
                    plain(&place.lab, snapshot, expected, false)?;
                    plain(&place.lab, snapshot, expected, false)?
                }
                _ => ours(place, snapshot, expected, *way)?,
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

/// Makes sure that every byte comes from the store, and from its disk.
fn forget(place: &Place) -> Result<()> {
    if let Some(store) = &place.local {
        return reap_tests::lab::evict_tree(store);
    }
    let cache = place.scratch.join("worker/cache");
    Ok(std::fs::remove_dir_all(cache)?)
}

fn ours(place: &Place, snapshot: &Snapshot, expected: &str, way: Way) -> Result<Measured> {
    let directory = place.scratch.join("worker");
    if way == Way::PrefetchCached {
        reap_tests::lab::evict_tree(&directory.join("cache"))?;
    } else {
        forget(place)?;
    }
    // A new daemon has nothing in memory.
    let worker = Worker::start(&place.url, &directory, &[])?;
    let prefetches = matches!(way, Way::PrefetchCold | Way::PrefetchCached);
    let mode = if prefetches { "prefetch" } else { "demand" };
    let prepared = worker.prepare(&snapshot.function, mode)?;
    let memory = prepared["memory"].as_str().context("a memory path")?;
    let by_file = way == Way::MountCold;
    let backend = if by_file { Backend::File(memory.into()) } else { uffd(&prepared)? };
    let mut guest = place.lab.restore(snapshot, &backend)?;
    let before = major_faults(&guest)?;
    let answer_ms = answer(&mut guest, expected)?;
    let faults = match by_file {
        true => major_faults(&guest)? - before,
        false => served_faults(&worker.newest_restore()?),
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

fn print_table(ways: &[Way], rows: &[(String, Vec<Measured>)]) {
    println!("\nresume to first answer, ms (faults that had to be served), median of {ROUNDS}\n");
    print!("{:<14}", "function");
    ways.iter().for_each(|way| print!("{:>26}", way.title()));
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
