//! What has happened in a run; one in which too little happened proves nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use anyhow::{Result, ensure};
use reap_store::SnapshotId;
use reap_store::format::keys::PackId;

use super::processes::Ended;
use crate::proxy::{Entry, Operation};

/// Counts of events.
#[derive(Clone, Debug, Default)]
pub struct Events {
    /// Packers that said that they were done.
    pub packed: u64,
    /// Removals that said so.
    pub removed: u64,
    /// Collections that said so, and those that deleted something.
    pub collections: u64,
    /// See above.
    pub collections_that_deleted: u64,
    /// Reads that said so, all of them right.
    pub exported: u64,
    /// See above.
    pub verified: u64,
    /// See above.
    pub read_through_mount: u64,
    /// Verifications that met a bit that was wrong on the way, and found none when asked straight.
    pub false_alarms: u64,
    /// Commands that ended with an error, by what it says.
    pub failed: u64,
    failures: BTreeMap<String, u64>,
    /// Processes that were killed, of any kind.
    pub killed: BTreeMap<String, u64>,
    /// And of these, daemons with a mount.
    pub readers_killed: u64,
    /// Processes that were stopped and went on.
    pub stopped: BTreeMap<String, u64>,
    /// Requests, and what the proxy did to them.
    pub requests: u64,
    /// See above.
    pub faults: BTreeMap<&'static str, u64>,
    /// Commit records whose packer was not told that they were written.
    pub commits_in_doubt: u64,
    /// PUTs that came once more and brought an object back, or wrote it anew.
    pub revived: u64,
    /// Transactions that collectors ended.
    pub aborted: u64,
    /// References of live snapshots to packs of snapshots that had been removed.
    pub shared_with_removed: u64,
    seen_shared: BTreeSet<(SnapshotId, PackId)>,
    /// Pins of readers that were killed.
    pub pins_left: u64,
}

impl Events {
    pub(super) fn take_process(&mut self, ended: &Ended) {
        let command = || ended.what.split(' ').next().unwrap_or_default().to_owned();
        if ended.output.is_none() {
            *self.killed.entry(command()).or_default() += 1;
        }
        if ended.was_stopped {
            *self.stopped.entry(command()).or_default() += 1;
        }
    }

    pub(super) fn take_requests(&mut self, entries: &[Entry]) {
        for entry in entries {
            self.requests += u64::from(!entry.is_duplicate);
            let is_put = entry.operation == Operation::Put;
            if entry.is_duplicate {
                self.revived += u64::from(is_put && entry.status == Some(200));
                continue;
            }
            let Some(fault) = entry.fault else { continue };
            *self.faults.entry(fault).or_default() += 1;
            let is_commit = is_put && entry.key.contains("/snap/");
            self.commits_in_doubt += u64::from(is_commit && fault.starts_with("answer-"));
        }
    }

    pub(super) fn take_bucket(&mut self, shared: &BTreeSet<(SnapshotId, PackId)>) {
        self.seen_shared.extend(shared);
        self.shared_with_removed = self.seen_shared.len() as u64;
    }

    /// Counts an error by its words, without the ids in it.
    pub(super) fn note_failure(&mut self, said: &str) {
        let is_word = |word: &&str| !word.chars().any(|letter| letter.is_ascii_digit());
        let line = said.lines().last().unwrap_or_default();
        let words: Vec<_> = line.split_whitespace().filter(is_word).take(12).collect();
        *self.failures.entry(words.join(" ")).or_default() += 1;
    }

    /// The errors that commands ended with, and how often.
    pub fn failures(&self) -> impl Iterator<Item = (&str, u64)> {
        self.failures.iter().map(|(said, count)| (said.as_str(), *count))
    }

    /// An error that names what did not happen.
    pub(super) fn require(&self, rounds: u32) -> Result<()> {
        let count = |map: &BTreeMap<String, u64>, command: &str| map.get(command).copied();
        let fault = |name: &str| self.faults.get(name).copied();
        let mut wanted = vec![
            ("snapshots that were packed", Some(self.packed)),
            ("removals", Some(self.removed)),
            ("collections", Some(self.collections)),
            ("collections that deleted something", Some(self.collections_that_deleted)),
            ("exports", Some(self.exported)),
            ("reads through a mount", Some(self.read_through_mount)),
            ("killed packers", count(&self.killed, "pack")),
            ("stopped packers", count(&self.stopped, "pack")),
            ("transactions that collectors ended", Some(self.aborted)),
            ("references to packs of removed snapshots", Some(self.shared_with_removed)),
            ("duplicates that wrote", Some(self.revived)),
        ];
        let faults =
            ["refused", "reset", "answer-lost", "answer-failed", "truncated", "duplicated"];
        wanted.extend(faults.map(|name| (name, fault(name))));
        if rounds >= 50 {
            wanted.extend([
                ("commits in doubt", Some(self.commits_in_doubt)),
                ("killed collectors", count(&self.killed, "gc")),
                ("stopped collectors", count(&self.stopped, "gc")),
                ("killed readers", count(&self.killed, "export")),
                ("killed daemons", Some(self.readers_killed)),
                ("killed removals", count(&self.killed, "rm")),
                ("verifications", Some(self.verified)),
            ]);
            let rare = ["flipped", "hung", "answer-hung"];
            wanted.extend(rare.map(|name| (name, fault(name))));
        }
        let missing: Vec<_> = wanted.iter().filter(|(_, count)| count.unwrap_or(0) == 0).collect();
        ensure!(missing.is_empty(), "the run proves little, these never happened: {missing:?}");
        Ok(())
    }
}

impl fmt::Display for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} packed, {} removed, {} collections ({} deleted), {} exported, {} verified ({} false alarms), {} read through the mount, {} failed; \
             killed {:?}, {} of them daemons more; stopped {:?}; {} requests, faults {:?}; {} commits in doubt, {} duplicates wrote, \
             {} aborted, {} references to packs of removed snapshots, {} pins left",
            self.packed,
            self.removed,
            self.collections,
            self.collections_that_deleted,
            self.exported,
            self.verified,
            self.false_alarms,
            self.read_through_mount,
            self.failed,
            self.killed,
            self.readers_killed,
            self.stopped,
            self.requests,
            self.faults,
            self.commits_in_doubt,
            self.revived,
            self.aborted,
            self.shared_with_removed,
            self.pins_left,
        )
    }
}
