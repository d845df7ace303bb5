//! `reap-pack`, killed by SIGKILL at every system call that changes the store, one after the other.
//!
//! Each point has a copy of a small prepared store to itself. What must hold after the kill, after the
//! command was given again and after collection, is in `check.rs`.

#[path = "killed/check.rs"]
mod check;
#[path = "killed/scenario.rs"]
mod scenario;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail, ensure};
use reap_tests::tracer::{self, End, KillAt, Traced};
use reap_tests::worker::reap_pack_command;

use check::{After, Contents, Oracle};
use scenario::{SCENARIOS, Scenario};

/// Points at the same time.
const PARALLEL: usize = 2;

/// Where a command is killed, and where it is killed again when it is given once more.
#[derive(Clone, Copy, Debug)]
struct Point {
    first: KillAt,
    second: Option<KillAt>,
}

/// What became of a scenario's points.
#[derive(Debug, Default)]
struct Counted {
    killed: AtomicUsize,
    twice: AtomicUsize,
    /// The program took fewer calls this time.
    missed: AtomicUsize,
}

/// A scenario's store as it was before the command, and what the command makes of it.
struct Prepared {
    scenario: &'static Scenario,
    directory: tempfile::TempDir,
    oracle: Oracle,
    calls: usize,
}

/// Memory, where there is some: each point writes a store.
fn scratch() -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.or_else(|_| tempfile::tempdir()).context("a directory")
}

fn url(place: &Path, store: &str) -> String {
    format!("file://{}/{store}", place.display())
}

/// Runs the scenario's command in `place`.
fn run(scenario: &Scenario, place: &Path, kill_at: Option<KillAt>) -> Result<(Traced, String)> {
    let arguments = (scenario.arguments)(place);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let said = tempfile::tempfile()?;
    let mut command = reap_pack_command(&url(place, "store"), &arguments)?;
    command.env("REAP_INDEX", place.join("index"));
    command.stdout(Stdio::null()).stderr(said.try_clone()?);
    let traced = tracer::run(&mut command, place, kill_at)?;
    let mut text = String::new();
    std::io::Seek::rewind(&mut &said)?;
    std::io::Read::read_to_string(&mut &said, &mut text)?;
    Ok((traced, text))
}

impl Prepared {
    fn new(scenario: &'static Scenario) -> Result<Self> {
        let directory = scratch()?;
        let before = directory.path().join("before");
        std::fs::create_dir(&before)?;
        (scenario.prepare)(&before)?;
        let after = directory.path().join("after");
        copy_tree(&before, &after)?;
        let contents = Contents::read(&before)?;
        let (traced, said) = run(scenario, &after, None)?;
        ensure!(traced.end == End::Exited(0), "{}: {:?}: {said}", scenario.name, traced.end);
        let oracle = Oracle { before: contents, after: Contents::read(&after)? };
        check::check(&after, &oracle, After::Success)?;
        check::check_nothing_is_left(&after)?;
        Ok(Self { scenario, directory, oracle, calls: traced.calls.len() })
    }

    fn try_point(&self, point: Point, counted: &Counted) -> Result<()> {
        let place = tempfile::tempdir_in(self.directory.path())?;
        let place = place.path().join("point");
        copy_tree(&self.directory.path().join("before"), &place)?;
        let mut kills = 0;
        for kill_at in [Some(point.first), point.second].into_iter().flatten() {
            let (traced, said) = run(self.scenario, &place, Some(kill_at))?;
            match traced.end {
                End::Killed => kills += 1,
                End::Exited(code) => self.expect_success(code, &said)?,
            }
            check::check(&place, &self.oracle, After::Kill)?;
        }
        let count = |counter: &AtomicUsize| counter.fetch_add(1, Ordering::Relaxed);
        match kills {
            0 => count(&counted.missed),
            1 => count(&counted.killed),
            _ => count(&counted.killed) + count(&counted.twice),
        };
        let (traced, said) = run(self.scenario, &place, None)?;
        match traced.end {
            End::Exited(code) => self.expect_success(code, &said)?,
            End::Killed => bail!("killed by nobody"),
        }
        check::check(&place, &self.oracle, After::Success)?;
        check::check_nothing_is_left(&place)
    }

    /// What was done already may be refused when it is asked for once more.
    fn expect_success(&self, code: i32, said: &str) -> Result<()> {
        let done = self.scenario.done_already;
        ensure!(code == 0 || Some(code) == done, "exit code {code}: {said}");
        Ok(())
    }

    /// Every point of the command, and for `twice` so many where the command is killed again.
    fn points(&self, twice: usize) -> Vec<Point> {
        let each = (0..self.calls).flat_map(|call| [KillAt::Before(call), KillAt::After(call)]);
        let mut points: Vec<_> = each.map(|first| Point { first, second: None }).collect();
        // Evenly over all pairs.
        let pairs = self.calls * self.calls;
        let twice = twice.min(pairs);
        for pair in (0..twice).map(|number| number * pairs / twice) {
            let second = Some(KillAt::Before(pair % self.calls));
            points.push(Point { first: KillAt::After(pair / self.calls), second });
        }
        points
    }

    /// Tries one in `one_in` of the points.
    fn try_points(&self, one_in: usize, twice: usize) -> Result<Counted> {
        let counted = Counted::default();
        let points: Vec<_> = self.points(twice).into_iter().step_by(one_in).collect();
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            while let Some(point) = points.get(next.fetch_add(1, Ordering::Relaxed)) {
                let tried = self.try_point(*point, &counted);
                tried.with_context(|| format!("{}, killed {point:?}", self.scenario.name))?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..PARALLEL).map(|_| scope.spawn(work)).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or_else(|_| bail!("a thread panicked")))
        })?;
        Ok(counted)
    }
}

/// Files are small: they are copied, not linked. Holes stay holes.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_tree(&entry.path(), &target)?;
        } else if entry.metadata()?.blocks() * 512 < entry.metadata()?.len() {
            let copied = Command::new("cp").arg(entry.path()).arg(target).status()?;
            ensure!(copied.success(), "cp ended with {copied}");
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Prints what was done, and fails where less was than `least`.
fn kill_everywhere(one_in: usize, twice: usize, least: usize) -> Result<()> {
    let mut all = 0;
    for scenario in SCENARIOS {
        let began = std::time::Instant::now();
        let prepared = Prepared::new(scenario).context(scenario.name)?;
        let counted = prepared.try_points(one_in, twice)?;
        let killed = counted.killed.into_inner();
        println!(
            "{:<28} {:>4} calls, {:>4} points killed, {:>3} of them twice, {} not reached, {:.0?}",
            scenario.name,
            prepared.calls,
            killed,
            counted.twice.into_inner(),
            counted.missed.into_inner(),
            began.elapsed()
        );
        ensure!(killed > 0, "{}: nothing was killed", scenario.name);
        all += killed;
    }
    println!("{all} kill points, nothing lost");
    ensure!(all >= least, "{all} points are fewer than {least}: this shows too little");
    Ok(())
}

#[test]
fn commands_killed_at_system_calls_lose_nothing_and_leave_nothing() -> Result<()> {
    kill_everywhere(6, 30, 150)
}

/// For `make kill-points`.
#[cfg(feature = "soak")]
#[test]
fn commands_killed_at_every_system_call_lose_nothing_and_leave_nothing() -> Result<()> {
    kill_everywhere(1, 150, 2000)
}

/// The checker sees what a packer would leave that wrote its records in another order, and litter.
#[test]
fn the_checker_sees_a_wrong_order_and_litter() -> Result<()> {
    let scenario =
        SCENARIOS.iter().find(|one| one.name == "pack by a parent").context("a scenario")?;
    let prepared = Prepared::new(scenario)?;
    let whole = prepared.directory.path().join("after");
    let new = prepared.oracle.after.new_snapshot(&prepared.oracle.before)?;
    let damaged = |change: &dyn Fn(&Path) -> Result<()>| -> Result<std::path::PathBuf> {
        let place = tempfile::tempdir_in(prepared.directory.path())?.keep();
        copy_tree(&whole, &place)?;
        change(&place)?;
        Ok(place)
    };
    // Its commit record, or its name, came before what it refers to.
    for early in [format!("pack/{new}-0000"), format!("manifest/{new}"), format!("snap/{new}")] {
        let place = damaged(&|place| Ok(std::fs::remove_file(place.join("store").join(&early))?))?;
        let seen = check::check(&place, &prepared.oracle, After::Kill);
        ensure!(seen.is_err(), "{early} is gone, and nothing is wrong?");
    }
    let place = damaged(&|place| Ok(std::fs::remove_dir_all(place.join("store/ref"))?))?;
    ensure!(check::check(&place, &prepared.oracle, After::Success).is_err(), "the name is gone");
    // A packer that is gone, and is not known by a lease.
    for litter in ["tomb/x#1", "lease/00#7", "pin/a/b/c"] {
        let place = damaged(&|place| {
            let path = place.join("store").join(litter);
            std::fs::create_dir_all(path.parent().context("a directory")?)?;
            Ok(std::fs::write(path, "")?)
        })?;
        let left = check::litter(&place.join("store"))?;
        ensure!(!left.is_empty(), "{litter} is not seen");
    }
    Ok(())
}
