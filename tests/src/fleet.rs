//! A fleet on one bucket: packers, collectors, readers and removals as real processes, on a real S3 server
//! behind the proxy, with faults on the way and signals that kill and stop processes at seeded times.
//!
//! After each round a fresh process exports everything that was acknowledged and not removed; the bucket
//! is searched for what live snapshots name; and at the end, with faults off, two collections must leave
//! exactly that. [`events`] says what must have happened for a run to count.

mod bucket;
mod content;
mod events;
mod processes;
mod readers;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use reap_store::SnapshotId;
use serde_json::Value;

use crate::proxy::{Draws, Plan, Proxy, Rates};
use bucket::Bucket;
use content::Content;
pub use events::Events;
use processes::{Chaos, Ended, Programs, Started};
use readers::MountReader;

const PACKERS: usize = 8;
const COLLECTORS: usize = 2;
/// Readers that are commands; one more reads through a mount.
const READERS: usize = 3;
/// So many snapshots are left alone by removals.
const KEPT: usize = 12;
/// A packer that takes longer than this is given up by a collector that wants to go on.
const LEASE_TIMEOUT: &str = "2";
/// Faults of one round; what comes late is over after the longest of these times.
const LATEST: Duration = Duration::from_secs(4);

/// How to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The store's URL; the environment says where the server is.
    pub url: String,
    /// Its server.
    pub server: SocketAddr,
    /// How many rounds.
    pub rounds: u32,
    /// Decides what chance would, as far as it is ours: the processes still race.
    pub seed: u64,
    /// Where to keep files; emptied by the caller.
    pub directory: PathBuf,
}

fn faults() -> Rates {
    Rates {
        before_effect: 0.05,
        after_effect: 0.02,
        hang: 0.002,
        hang_for: Duration::from_millis(500)..Duration::from_secs(3),
        truncated: 0.01,
        wrong: 0.005,
        duplicate: 0.03,
        duplicate_after: Duration::from_millis(100)..LATEST,
    }
}

/// Runs the fleet; an error is a violation, a process that hangs, or a run in which too little happened.
pub fn run(options: &Options) -> Result<Events> {
    let quiet = Plan { seed: options.seed, ..Plan::default() };
    let proxy = Proxy::start(options.server, quiet.clone())?;
    let bucket = Bucket::connect(&options.url)?;
    let programs = Programs::new(&options.url, proxy.address(), &options.directory)?;
    programs.quietly(&["init"])?;
    let reader = MountReader::new(&programs, &options.directory.join("mount-reader"));
    let mut fleet = Fleet {
        options,
        proxy,
        bucket,
        programs,
        reader,
        draws: Draws::new(options.seed, 0),
        acknowledged: BTreeMap::new(),
        events: Events::default(),
    };
    for round in 0..options.rounds {
        fleet.proxy.follow(Plan { rates: faults(), ..quiet.clone() });
        let outcome = fleet.round(round);
        fleet.proxy.follow(quiet.clone());
        fleet.events.take_requests(&fleet.proxy.take_ended());
        outcome.and_then(|()| fleet.check()).with_context(|| format!("round {round}"))?;
        eprintln!("round {round}: {}", fleet.events);
    }
    fleet.end()?;
    fleet.events.require(options.rounds)?;
    Ok(fleet.events)
}

struct Fleet<'a> {
    options: &'a Options,
    proxy: Proxy,
    bucket: Bucket,
    programs: Programs,
    reader: MountReader,
    draws: Draws,
    /// Snapshots whose packer said so and that nobody has removed or tried to.
    acknowledged: BTreeMap<SnapshotId, Content>,
    events: Events,
}

/// What a process was started for.
enum Task {
    Pack(Content),
    Collect,
    Export(SnapshotId, PathBuf),
    Verify(SnapshotId),
    Remove,
}

impl Fleet<'_> {
    /// Everybody works, and whoever survives ends by himself. None is left, however it goes.
    fn round(&mut self, round: u32) -> Result<()> {
        let mut started = Vec::new();
        let mut outcome = self.start_all(round, &mut started);
        for (process, task) in started {
            let taken = process.wait().and_then(|ended| {
                self.events.take_process(&ended);
                self.take(ended, task)
            });
            outcome = outcome.and(taken);
        }
        outcome
    }

    fn start_all(&mut self, round: u32, started: &mut Vec<(Started, Task)>) -> Result<()> {
        let live = self.bucket.live()?;
        let victims = self.choose_victims(live.keys().copied().collect());
        let readable: Vec<_> = self.acknowledged.keys().copied().collect();
        for packer in 0..PACKERS {
            started.push(self.start_packer(round, packer)?);
        }
        for victim in victims {
            let id = victim.to_string();
            started.push((self.start(&["rm", &id, "--force"], None)?, Task::Remove));
        }
        for _ in 0..COLLECTORS {
            let arguments = ["gc", "--yes", "--lease-timeout", LEASE_TIMEOUT];
            let delay = self.draws.between(&(Duration::ZERO..Duration::from_millis(600)));
            started.push((self.start(&arguments, Some(delay))?, Task::Collect));
        }
        for reader in 0..READERS.min(readable.len()) {
            let id = readable[self.draws.below(readable.len())];
            started.push(self.start_reader(round, reader, id)?);
        }
        self.read_through_mount(&readable)
    }

    fn start(&mut self, arguments: &[&str], delay: Option<Duration>) -> Result<Started> {
        let chaos = Chaos::draw(&mut self.draws, delay.unwrap_or_default());
        self.programs.start(arguments, 0, chaos)
    }

    fn start_packer(&mut self, round: u32, packer: usize) -> Result<(Started, Task)> {
        let content = Content::draw(&mut self.draws, packer % 4, round);
        let file = self.programs.directory().join(format!("memory-{packer}"));
        content.write(&file)?;
        let (name, file) = (format!("f{}", packer % 4), file.display().to_string());
        let mut arguments =
            vec!["pack", "--name", name.as_str(), "--memory", file.as_str(), "--label", "base=one"];
        // One that was removed, or is about to be, some of the time.
        let parents: Vec<_> = self.acknowledged.keys().rev().take(KEPT).collect();
        let parent = parents.get(self.draws.below(3 * KEPT)).map(|id| id.to_string());
        if let Some(parent) = &parent {
            arguments.extend(["--parent", parent.as_str()]);
        }
        let chaos = Chaos::draw(&mut self.draws, Duration::ZERO);
        let process = self.programs.start(&arguments, packer / 2, chaos)?;
        Ok((process, Task::Pack(content)))
    }

    fn start_reader(
        &mut self,
        round: u32,
        reader: usize,
        id: SnapshotId,
    ) -> Result<(Started, Task)> {
        let text = id.to_string();
        if reader == 0 {
            return Ok((self.start(&["verify", &text], None)?, Task::Verify(id)));
        }
        let to = self.programs.directory().join(format!("export-{round}-{reader}"));
        let process = self.start(&["export", &text, &to.display().to_string()], None)?;
        Ok((process, Task::Export(id, to)))
    }

    /// Chooses removals among what is live; from now on nobody may rely on these, whatever becomes of the
    /// removal.
    fn choose_victims(&mut self, live: Vec<SnapshotId>) -> Vec<SnapshotId> {
        let surplus = live.len().saturating_sub(KEPT);
        let mut left = live;
        let mut victims = Vec::new();
        for _ in 0..surplus {
            let victim = left.swap_remove(self.draws.below(left.len()));
            self.acknowledged.remove(&victim);
            victims.push(victim);
        }
        victims
    }

    fn read_through_mount(&mut self, readable: &[SnapshotId]) -> Result<()> {
        if readable.is_empty() {
            return Ok(());
        }
        let id = readable[self.draws.below(readable.len())];
        let Some(content) = self.acknowledged.get(&id) else { return Ok(()) };
        let kill = self.draws.below(5) == 0;
        self.reader.read(id, content, kill, &mut self.events)
    }

    /// What a process's end says. Nobody may fail with anything but an error that has a reason.
    fn take(&mut self, ended: Ended, task: Task) -> Result<()> {
        let Some(output) = &ended.output else { return Ok(()) };
        let code = output.status.code();
        let said = || format!("{}: {}", ended.what, ended.said());
        match (ended.succeeded(), task) {
            (true, Task::Pack(content)) => {
                let packed: Value = serde_json::from_slice(ended.printed())?;
                let id = packed["id"].as_str().context("an id")?.parse()?;
                self.events.packed += 1;
                self.acknowledged.insert(id, content);
            }
            (true, Task::Collect) => {
                let collected: Value = serde_json::from_slice(ended.printed())?;
                self.events.collections += 1;
                self.events.collections_that_deleted += u64::from(collected["deleted"] == true);
            }
            (true, Task::Export(id, to)) => {
                if let Some(content) = self.acknowledged.get(&id) {
                    content.require_equal(&to.join("memory")).with_context(said)?;
                    self.events.exported += 1;
                }
            }
            (true, Task::Verify(_)) => self.events.verified += 1,
            (true, Task::Remove) => self.events.removed += 1,
            // What was damaged was so on the way, twice, or the store has lost something.
            (false, Task::Export(id, _) | Task::Verify(id)) if code == Some(4) => {
                self.programs.quietly(&["verify", &id.to_string()]).with_context(said)?;
                self.events.false_alarms += 1;
            }
            // Nobody has removed it: damage or absence would be the store's fault.
            (false, Task::Export(..) | Task::Verify(..)) => {
                ensure!(code == Some(5), "a reader of a live snapshot: {}", said());
                self.events.failed += 1;
            }
            (false, _) => {
                ensure!(code.is_some_and(|code| (2..=6).contains(&code)), "{}", said());
                self.events.failed += 1;
                self.events.note_failure(&ended.said());
            }
        }
        Ok(())
    }

    /// What must hold after every round, asked past the proxy.
    fn check(&mut self) -> Result<()> {
        let live = self.bucket.live()?;
        self.bucket.require_nothing_dangling(&live)?;
        self.events.take_bucket(&self.bucket.shares_with_removed(&live)?);
        for (id, content) in &self.acknowledged {
            ensure!(live.contains_key(id), "{id} was acknowledged and is not there");
            let to = self.programs.directory().join("fresh");
            let (text, path) = (id.to_string(), to.display().to_string());
            self.programs.quietly(&["export", &text, &path]).context("acknowledged")?;
            content.require_equal(&to.join("memory")).with_context(|| format!("{id}"))?;
            std::fs::remove_dir_all(&to)?;
        }
        for entry in std::fs::read_dir(self.programs.directory())? {
            let path = entry?.path();
            if path.display().to_string().contains("export-") {
                std::fs::remove_dir_all(path)?;
            }
        }
        Ok(())
    }

    /// The storm is over: two collections leave what live snapshots refer to.
    fn end(&mut self) -> Result<()> {
        // Duplicates that are still on their way.
        std::thread::sleep(LATEST + Duration::from_secs(1));
        self.reader.stop()?;
        // Readers that were killed come back under new identities; an operator takes their pins away.
        self.events.pins_left = self.bucket.remove_pins()?;
        std::thread::sleep(Duration::from_secs(1));
        for _ in 0..2 {
            self.programs.quietly(&["gc", "--yes", "--lease-timeout", "0"])?;
        }
        let live = self.bucket.live()?;
        self.bucket.require_nothing_dangling(&live)?;
        self.bucket.require_nothing_else(&live)?;
        self.events.aborted = self.bucket.aborted()?;
        self.check()?;
        if self.acknowledged.is_empty() {
            bail!("nothing is left to be lost: {}", self.options.url);
        }
        Ok(())
    }
}
