//! Checking what a store consists of, as deeply as is asked for, and saying what is wrong and what was
//! not looked at.
//!
//! Nothing is changed, with one exception that the collection protocol asks for: whoever finds an object of
//! a live snapshot missing halts collection.

#[cfg(test)]
mod damage;
mod packs;
mod records;
mod sample;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::collect;
use crate::format::keys::{self, PackId};
use crate::store::Store;
use crate::{Error, ErrorKind, SnapshotId};

pub(crate) use packs::{decode_pack, decode_working_set};
use sample::Sample;
pub use sample::Share;

/// How deeply to look. Each level includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Records, manifests, names and the headers of working sets, and that they belong together. A few
    /// requests a snapshot.
    Structure,
    /// Also that every pack is there and as long as is recorded, by listing them.
    Sizes,
    /// Also reads, decodes and compares a random share of the frames.
    Sample,
    /// Reads, decodes and compares every byte.
    Everything,
}

/// What to look at.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How deeply.
    pub level: Level,
    /// Also what belongs to no snapshot of the list: names, removals, the collector's records.
    pub whole_store: bool,
    /// How much [`Level::Sample`] reads.
    pub share: Share,
    /// The same seed picks the same frames.
    pub seed: u64,
}

impl Options {
    /// Every byte of some snapshots.
    pub fn everything() -> Self {
        Self { level: Level::Everything, whole_store: false, share: Share::Percent(1.0), seed: 0 }
    }
}

/// What a verification read and found.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// How deeply it looked.
    pub level: Level,
    /// Snapshots that were looked at.
    pub snapshots: u64,
    /// Small records: commits, names, removals, the collector's.
    pub records: u64,
    /// Packs that are listed with the length that is recorded; at [`Level::Everything`] those read, hashed
    /// and decoded.
    pub packs: u64,
    /// Frames decoded and compared with their hashes, in packs and in working sets.
    pub frames: u64,
    /// Distinct frames in packs that the snapshots refer to; not counted at [`Level::Everything`].
    pub frames_referred: u64,
    /// Working sets that are usable, as far as was looked.
    pub working_sets: u64,
    /// Bytes read of packs, and at [`Level::Everything`] of working sets.
    pub bytes: u64,
    /// What picked the frames.
    pub seed: Option<u64>,
    /// A line for each snapshot, name or pack that cannot be used as it was written.
    pub problems: Vec<String>,
    /// A line for what is damaged and costs nothing but speed, such as a working set, or a record that is
    /// for people.
    pub warnings: Vec<String>,
    /// What this level does not see.
    pub not_looked_at: Vec<&'static str>,
}

/// How far it is: bytes of packs that were read, and that will be.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Read.
    pub done_bytes: u64,
    /// To be read.
    pub total_bytes: u64,
}

/// Looks at `snapshots`, each pack once. Errors only when the store cannot be asked.
pub async fn verify(
    store: &Store,
    snapshots: &[SnapshotId],
    options: &Options,
    progress: &mut (dyn FnMut(Progress) + Send),
) -> Result<Report, Error> {
    let mut findings = Findings { store, report: Report::new(options), needed: BTreeMap::new() };
    let mut sample = Sample::new(options);
    if options.whole_store {
        findings.check_other_records().await?;
    }
    findings.check_snapshots(snapshots, options.level, &mut sample).await?;
    if options.level >= Level::Sizes {
        findings.check_sizes(options.level).await?;
    }
    match options.level {
        Level::Sample => findings.check_sample(sample, progress).await?,
        Level::Everything => findings.check_packs(snapshots, progress).await?,
        Level::Structure | Level::Sizes => findings.report.frames_referred = sample.seen(),
    }
    Ok(findings.report)
}

impl Report {
    fn new(options: &Options) -> Self {
        let level = options.level;
        let unseen = [
            (level < Level::Sizes, "whether packs are there"),
            (level < Level::Sample, "what is in packs"),
            (level == Level::Sample, "the frames that were not picked, the ends of packs"),
            (level < Level::Everything, "the frames of working sets"),
            (!options.whole_store, "other snapshots, and names"),
            (true, "removed snapshots, and what unfinished packers wrote"),
        ];
        Self {
            level,
            snapshots: 0,
            records: 0,
            packs: 0,
            frames: 0,
            frames_referred: 0,
            working_sets: 0,
            bytes: 0,
            seed: (level == Level::Sample).then_some(options.seed),
            problems: Vec::new(),
            warnings: Vec::new(),
            not_looked_at: unseen.iter().filter(|(is, _)| *is).map(|(_, what)| *what).collect(),
        }
    }
}

/// A pack that snapshots need.
struct Needed {
    bytes: u64,
    /// Which.
    snapshots: Vec<SnapshotId>,
    /// It was found missing, too short or too long.
    is_lost: bool,
}

/// A verification at work.
struct Findings<'a> {
    store: &'a Store,
    report: Report,
    needed: BTreeMap<PackId, Needed>,
}

impl Findings<'_> {
    fn problem(&mut self, snapshot: SnapshotId, what: impl std::fmt::Display) {
        self.report.problems.push(format!("snapshot {snapshot}: {what}"));
    }

    /// The same of a pack, for every snapshot that needs it.
    fn pack_problem(&mut self, pack: PackId, error: &Error) {
        let snapshots = self.needed.get(&pack).map(|needed| needed.snapshots.clone());
        snapshots.unwrap_or_default().into_iter().for_each(|id| self.problem(id, error));
    }

    /// A pack is not as long as is recorded, or has a frame that is not as it was; or it is gone.
    async fn pack_finding(&mut self, pack: PackId, error: &Error) -> Result<(), Error> {
        if error.kind() != ErrorKind::NotFound {
            self.pack_problem(pack, error);
            return Ok(());
        }
        let snapshots = self.needed.get(&pack).map(|needed| needed.snapshots.clone());
        for id in snapshots.unwrap_or_default() {
            self.missing(id, &pack.key(), error).await?;
        }
        Ok(())
    }

    /// An object that `snapshot` needs is not there. It may have been removed since it was listed; else
    /// nothing must be collected any more.
    async fn missing(
        &mut self,
        snapshot: SnapshotId,
        key: &str,
        error: &Error,
    ) -> Result<(), Error> {
        if self.store.is_removed(snapshot).await? {
            self.report.warnings.push(format!("snapshot {snapshot}: was removed meanwhile"));
            return Ok(());
        }
        collect::halt(self.store.objects(), key).await;
        self.problem(snapshot, format!("{error}; collection is halted ({})", keys::HALT));
        Ok(())
    }
}

/// Whether an error says something of the snapshot, rather than of the way to the store.
pub(crate) fn is_finding(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Damaged)
}
