//! Working sets that learn: from other inputs, from change, on several nodes at once, by profile.

use std::collections::BTreeSet;

use super::*;
use reap_tests::worker::program;

/// Pages of the memory file that pretend VMs start from.
const PAGES: usize = 2048;

impl Fixture {
    /// A store with the snapshot `f`, and its memory file.
    pub(super) fn with_snapshot() -> Result<(Self, String)> {
        let fixture = Self::new()?;
        let memory = fixture.memory_file("memory", (PAGES * 4096) >> 20)?;
        reap_pack_json(&fixture.url, &["pack", "--name", "f", "--memory", &memory])?;
        Ok((fixture, memory))
    }

    /// The pages of guest memory in the working set that a restore gets.
    fn set_pages(&self, profile: &str) -> Result<BTreeSet<u64>> {
        let file = tempfile::NamedTempFile::new_in(self.directory.path())?;
        let path = file.path().display().to_string();
        reap_pack_json(&self.url, &["ws", "export", "f", &path, "--profile", profile])?;
        let text = fs::read_to_string(path)?;
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| Ok(line.split(' ').next().context("a page")?.parse()?)).collect()
    }

    pub(super) fn write_trace(
        &self,
        name: &str,
        pages: impl Iterator<Item = u64>,
    ) -> Result<String> {
        let text: String = pages.map(|page| format!("{page}\n")).collect();
        let path = self.path(name);
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    }
}

/// A start of a pretend VMM, in a process of its own, which checks every byte it touches; answers with
/// what the daemon says of it when it is over.
pub(super) fn start(
    worker: &Worker,
    memory: &str,
    trace: &str,
    socket: &str,
) -> Result<serde_json::Value> {
    let arguments = ["touch", memory, trace, "socket", socket];
    let output = Command::new(program("reap-bench")?).args(arguments).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    worker.wait_for_restore(|restore| !restore["end"].is_null())
}

pub(super) fn socket(prepared: &serde_json::Value) -> Result<String> {
    Ok(prepared["uffd"].as_str().context("a socket")?.to_owned())
}

fn missed(restore: &serde_json::Value) -> u64 {
    let count = |key: &str| restore[key].as_u64().unwrap_or_default();
    count("missed_pages") + count("missed_zero_pages")
}

#[test]
fn a_set_takes_up_what_is_touched_and_lets_go_of_what_is_not() -> Result<()> {
    let (fixture, memory) = Fixture::with_snapshot()?;
    let before = fixture.write_trace("before", (0..300).rev())?;
    let after = fixture.write_trace("after", 200..500)?;
    let worker = fixture.worker(&[])?;
    let socket = socket(&worker.prepare("f", "auto")?)?;
    start(&worker, &memory, &before, &socket)?;
    worker.wait_for_working_set("f")?;
    ensure!(fixture.set_pages("")? == (0..300).collect(), "what was recorded");

    let first = start(&worker, &memory, &after, &socket)?;
    ensure!(first["mode"] == "prefetch" && missed(&first) == 200, "{first}");
    worker.wait_for_published("f", 2)?;
    ensure!(fixture.set_pages("")? == (0..500).collect(), "what was missed is merged");

    let wanted: BTreeSet<u64> = (200..500).collect();
    let (mut starts, mut samples, mut faults) = (0, 0, 0);
    while fixture.set_pages("")? != wanted {
        starts += 1;
        ensure!(starts < 100, "the set still has {:?}", fixture.set_pages("")?);
        let restore = start(&worker, &memory, &after, &socket)?;
        match restore["mode"].as_str() {
            Some("sample") => {
                samples += 1;
                ensure!(restore["fit"]["estimated"] == false, "{restore}");
                ensure!(restore["hit_pages"].as_u64() > Some(190), "{restore}");
            }
            _ => faults += missed(&restore),
        }
    }
    ensure!(faults == 0, "{faults} misses after the set had taken up the change");
    ensure!(samples >= 5 && samples * 3 <= starts, "{samples} samples in {starts} starts");
    let listed = reap_pack_json(&fixture.url, &["ws", "ls", "f"])?;
    let sets = listed.as_array().context("sets")?.len();
    ensure!(sets <= 5, "{sets} sets were published in {starts} starts: not one a start");
    worker.stop()
}

#[test]
fn two_nodes_that_learn_at_once_lose_nothing_of_each_other() -> Result<()> {
    let (fixture, memory) = Fixture::with_snapshot()?;
    let nodes = ["one", "two"].map(|name| Worker::start(&fixture.url, &fixture.path(name), &[]));
    let nodes = nodes.into_iter().collect::<Result<Vec<_>>>()?;
    let sockets = nodes.iter().map(|node| socket(&node.prepare("f", "auto")?));
    let sockets = sockets.collect::<Result<Vec<_>>>()?;
    for round in 0..4u64 {
        let traces = (0..2u64).map(|node| {
            let first = 1000 * node;
            fixture.write_trace(&format!("trace-{node}"), first..first + 150 * (round + 1))
        });
        let traces = traces.collect::<Result<Vec<_>>>()?;
        std::thread::scope(|scope| {
            let starts: Vec<_> = nodes
                .iter()
                .zip(sockets.iter().zip(&traces))
                .map(|(node, (socket, trace))| scope.spawn(|| start(node, &memory, trace, socket)))
                .collect();
            for start in starts {
                start.join().map_err(|_| anyhow::anyhow!("a start panicked"))??;
            }
            Ok::<_, anyhow::Error>(())
        })?;
        for node in &nodes {
            node.wait_for_published("f", round + 1)?;
        }
        let touched: BTreeSet<u64> =
            (0..2).flat_map(|node| 1000 * node..1000 * node + 150 * (round + 1)).collect();
        let lost: Vec<_> = touched.difference(&fixture.set_pages("")?).copied().collect();
        ensure!(lost.is_empty(), "round {round}: {lost:?} are lost");
    }
    let listed = reap_pack_json(&fixture.url, &["ws", "ls", "f"])?;
    let sequences: Vec<u64> = listed
        .as_array()
        .context("sets")?
        .iter()
        .filter_map(|set| set["sequence"].as_u64())
        .collect();
    let highest = sequences.len() as u64;
    ensure!(sequences == (1..=highest).rev().collect::<Vec<_>>(), "a gap: {sequences:?}");
    nodes.into_iter().try_for_each(Worker::stop)
}

#[test]
fn profiles_have_sets_of_their_own_and_a_removed_one_is_recorded_anew() -> Result<()> {
    let (fixture, memory) = Fixture::with_snapshot()?;
    let small = fixture.write_trace("small", 0..100)?;
    let large = fixture.write_trace("large", 500..900)?;
    let worker = fixture.worker(&[])?;
    let profile = ["f", "--mode", "auto", "--profile", "large"];
    let usual_socket = socket(&worker.prepare("f", "auto")?)?;
    let large_socket = socket(&worker.ask("prepare", &profile)?)?;
    ensure!(large_socket.ends_with("uffd/f,large.sock"), "{large_socket}");
    start(&worker, &memory, &small, &usual_socket)?;
    worker.wait_for_published("f", 1)?;
    start(&worker, &memory, &large, &large_socket)?;
    worker.wait_for_published("f,large", 1)?;
    ensure!(fixture.set_pages("")? == (0..100).collect(), "the usual one");
    ensure!(fixture.set_pages("large")? == (500..900).collect(), "the other");
    let restore = start(&worker, &memory, &large, &large_socket)?;
    ensure!(restore["mode"] == "prefetch" && missed(&restore) == 0, "{restore}");

    let removed = reap_pack_json(&fixture.url, &["ws", "rm", "f", "--profile", "large"])?;
    ensure!(removed["sequence"] == 3, "no sequence is used twice: {removed}");
    let again = reap_pack(&fixture.url, &["ws", "rm", "f", "--profile", "large"])?;
    ensure!(again.status.code() == Some(3), "there is none any more");
    ensure!(fixture.set_pages("large").is_err() && fixture.set_pages("")?.len() == 100, "only it");
    let refused = worker.ask("prepare", &["f", "--mode", "prefetch", "--profile", "large"]);
    ensure!(refused.is_err(), "there is none to prefetch");
    worker.ask("prepare", &profile)?;
    let restore = start(&worker, &memory, &large, &large_socket)?;
    ensure!(restore["mode"] == "record", "{restore}");
    worker.wait_for_published("f,large", 1)?;
    ensure!(fixture.set_pages("large")? == (500..900).collect(), "recorded anew");
    worker.ask("release", &["f", "--profile", "large"])?;
    ensure!(!Path::new(&large_socket).exists() && Path::new(&usual_socket).exists(), "sockets");

    // The pictures hold all of it, and nothing from elsewhere.
    let id = restore["id"].to_string();
    let timeline = worker.ask("status", &["--timeline", &id])?;
    let (json, html) = (fixture.path("timeline.json"), fixture.path("set.html"));
    fs::write(&json, timeline.to_string())?;
    let text = |path: &Path| path.display().to_string();
    let arguments = ["ws", "show", "f", "--html", &text(&html), "--timeline", &text(&json)];
    reap_pack_json(&fixture.url, &arguments)?;
    let html = fs::read_to_string(html)?;
    ensure!(html.matches("<svg").count() == 2 && html.contains("not in the set (400)"), "{html}");
    ensure!(!html.contains("http") && !html.contains("<script"), "it stands alone");
    worker.stop()
}

/// Inputs of a real guest that its recording has not seen; what is faulted in after the prefetch.
fn other_inputs(function: &str) -> Result<()> {
    let fixture = Fixture::new()?;
    let lab = Lab::open()?;
    let mut guest = lab.boot(function, 256, &fixture.path("guest"))?;
    let inputs = ["recorded", "another", "a third and longer one", "x"];
    let before = inputs.map(|input| guest.request(input).map(|answer| answer.line));
    let before = before.into_iter().collect::<Result<Vec<_>>>()?;
    let snapshot = guest.snapshot(&fixture.path("guest"))?;
    let memory = snapshot.memory.display().to_string();
    reap_pack_json(&fixture.url, &["pack", "--name", "f", "--memory", &memory])?;
    let worker = fixture.worker(&["--settle", "1"])?;
    let socket = socket(&worker.prepare("f", "auto")?)?;
    let backend = Backend::Uffd { socket: socket.into() };
    for (number, (input, expected)) in inputs.iter().zip(&before).enumerate() {
        let mut guest = lab.restore(&snapshot, &backend)?;
        ensure!(&guest.request(input)?.line == expected, "another answer to {input}");
        drop(guest);
        let restore = worker.wait_for_restore(|restore| !restore["end"].is_null())?;
        if number == 0 {
            worker.wait_for_working_set("f")?;
            continue;
        }
        ensure!(restore["mode"] == "prefetch", "{restore}");
        let planned: u64 = ["planned_pages", "planned_zero_pages"]
            .iter()
            .filter_map(|key| restore[key].as_u64())
            .sum();
        let residual = missed(&restore) + restore["late_pages"].as_u64().context("late")?;
        let share = residual as f64 / planned as f64 * 100.0;
        eprintln!("{function} {input:?}: {residual} of {planned} pages fault: {share:.1} %");
        ensure!(residual * 20 <= planned, "more than 5 % of the pages fault: {restore}");
    }
    worker.stop()
}

#[test]
fn a_guest_with_other_inputs_finds_its_pages() -> Result<()> {
    other_inputs("json_serdes")
}

/// For `make soak`: a minute.
#[cfg(feature = "soak")]
#[test]
fn every_function_finds_its_pages_with_other_inputs() -> Result<()> {
    reap_tests::lab::FUNCTIONS.into_iter().try_for_each(other_inputs)
}
