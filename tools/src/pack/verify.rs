//! `reap-pack verify`.

use anyhow::Result;
use reap_store::Error;
use reap_store::verify::{Level, Options, Report, Share, verify};

use super::Context;
use super::arguments::Verify;
use crate::output::{Progress, size};

impl Context<'_> {
    pub(super) fn verify(&self, arguments: &Verify) -> Result<()> {
        let store = self.store()?;
        let ids = match &arguments.snapshot {
            Some(snapshot) if !arguments.all => vec![self.find_live(&store, snapshot)?],
            _ => self.runtime.block_on(store.ids())?,
        };
        let options = Options {
            level: arguments.level.into(),
            whole_store: arguments.all,
            share: arguments.sample,
            seed: arguments.seed.unwrap_or_else(random_seed),
        };
        let mut progress = Progress::new("verifying", self.json);
        let mut show = |at: reap_store::verify::Progress| {
            progress.at(at.done_bytes, at.total_bytes);
        };
        let report = self.runtime.block_on(verify(&store, &ids, &options, &mut show));
        progress.end();
        let report = report?;
        self.print(&serde_json::to_value(&report)?, &text_of(&report))?;
        match report.problems.len() {
            0 => Ok(()),
            count => {
                let remedy = "'reap-pack repair' says what can be brought back";
                let text = format!("{count} problems, listed above: {remedy}");
                Err(Error::damaged(self.url, text).into())
            }
        }
    }
}

/// 48 bits: what JSON readers keep whole.
fn random_seed() -> u64 {
    let id = reap_store::SnapshotId::random();
    id.as_bytes()[..6].iter().fold(0, |seed, byte| seed << 8 | u64::from(*byte))
}

fn text_of(report: &Report) -> String {
    let mut text = String::new();
    for problem in &report.problems {
        text.push_str(&format!("damaged: {problem}\n"));
    }
    for warning in &report.warnings {
        text.push_str(&format!("warning, costs no data: {warning}\n"));
    }
    text.push_str(&format!(
        "{} snapshots, {} records, {} packs, {} working sets, {} frames, {} read: {} problems\n",
        report.snapshots,
        report.records,
        report.packs,
        report.working_sets,
        report.frames,
        size(report.bytes),
        report.problems.len()
    ));
    if let Some(seed) = report.seed {
        let (frames, all) = (report.frames, report.frames_referred);
        text.push_str(&format!("read {frames} of {all} frames, picked by --seed {seed}\n"));
    }
    text.push_str(&format!("not looked at: {}", report.not_looked_at.join("; ")));
    text
}

/// How deeply to look.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum LevelArgument {
    /// Records, manifests, names and headers of working sets: a few requests a snapshot, no pack is touched
    Structure,
    /// And that every pack is there, as long as is recorded: one listing, no pack is read
    Sizes,
    /// And that a random share of the frames can be read and is right
    Sample,
    /// Every byte is read, decoded and compared
    Everything,
}

impl From<LevelArgument> for Level {
    fn from(level: LevelArgument) -> Self {
        match level {
            LevelArgument::Structure => Self::Structure,
            LevelArgument::Sizes => Self::Sizes,
            LevelArgument::Sample => Self::Sample,
            LevelArgument::Everything => Self::Everything,
        }
    }
}

/// A share as people write it: `5%`, or `10GiB`.
pub(super) fn parse_share(text: &str) -> Result<Share, String> {
    let Some(percent) = text.strip_suffix('%') else {
        return crate::output::parse_size(text).map(Share::Bytes);
    };
    match percent.trim().parse::<f64>() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(Share::Percent(percent)),
        _ => Err("write a share from 0% to 100%, or a size such as 10GiB".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_percentage_or_a_size() {
        assert_eq!(parse_share("2.5%"), Ok(Share::Percent(2.5)));
        assert_eq!(parse_share("10GiB"), Ok(Share::Bytes(10 << 30)));
        for bad in ["", "%", "101%", "-1%", "NaN%", "x"] {
            assert!(parse_share(bad).is_err(), "{bad}");
        }
    }
}
