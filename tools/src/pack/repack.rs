//! `reap-pack repack`.

use anyhow::Result;
use reap_store::repack::repack;
use reap_store::usage::usage;

use super::arguments::IndexDirectory;
use super::{Context, reporter, watch_signals};
use crate::output::{Progress, size};

impl Context<'_> {
    /// `snapshot`: that one; all if there is none.
    pub(super) fn repack(
        &self,
        snapshot: Option<&str>,
        threshold_percent: u8,
        index: &IndexDirectory,
    ) -> Result<()> {
        let store = self.store()?;
        let usage = self.runtime.block_on(usage(&store))?;
        let ids = match snapshot {
            Some(snapshot) => vec![self.find_live(&store, snapshot)?],
            None => usage.snapshots.iter().map(|one| one.snapshot).collect(),
        };
        let interrupted = watch_signals(self.runtime)?;
        let mut progress = Progress::new("repacking", self.json);
        let threshold = f64::from(threshold_percent) / 100.0;
        let index = index.path();
        let repacked = self.with_node(index.clone(), |node| {
            let mut report = reporter(&mut progress, &interrupted);
            let (runtime, index) = (self.runtime, index.as_ref());
            let repacked = repack(node, runtime, &usage, &ids, threshold, index, &mut report);
            Ok(repacked?)
        });
        progress.end();
        let repacked = repacked?;
        let mut text = String::new();
        for one in &repacked {
            text.push_str(&format!(
                "{} is {} now: {} written, {} packs left behind, {} working sets kept\n",
                one.replaced,
                one.packed.id,
                size(one.packed.statistics.pack_bytes),
                one.packs_left,
                one.working_sets,
            ));
        }
        text.push_str(&format!("{} of {} snapshots repacked", repacked.len(), ids.len()));
        self.print(&serde_json::to_value(&repacked)?, &text)
    }
}
