//! `reap-pack ws`: looking at working sets.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use reap_store::{Error, Node, SnapshotId, WorkingSet, WorkingSetRun};
use serde_json::json;

use super::arguments::IndexDirectory;
use super::{Context, WorkingSets};

impl Context<'_> {
    pub(super) fn ws(&self, command: &WorkingSets) -> Result<()> {
        let WorkingSets::Export { snapshot, sequence, file } = command;
        self.export_working_set(snapshot, *sequence, file)
    }

    fn export_working_set(&self, name: &str, sequence: Option<u64>, file: &Path) -> Result<()> {
        let store = self.store()?;
        let id = self.find_live(&store, name)?;
        let readers = IndexDirectory::usual();
        let set = self.with_node(readers, |node| Ok(node.block_on(find(node, id, sequence))?))?;
        let touches = touches(&set);
        let mut text =
            format!("# snapshot {id}, working set {}: page, microseconds\n", set.sequence());
        for (at_us, page) in &touches {
            let _ = writeln!(text, "{page} {at_us}");
        }
        std::fs::write(file, text).map_err(|error| Error::local(file.display(), error))?;
        let value = json!({"snapshot": id, "sequence": set.sequence(), "pages": touches.len()});
        self.print(&value, &format!("{} pages in {}", touches.len(), file.display()))
    }
}

async fn find(
    node: &Node,
    id: SnapshotId,
    sequence: Option<u64>,
) -> Result<Arc<WorkingSet>, Error> {
    let snapshot = node.open_id(id).await?;
    let none = |what: String| Error::not_found(id, what);
    let Some(sequence) = sequence else {
        let newest = node.working_set(&snapshot).await?;
        return newest.ok_or_else(|| none("has no usable working set: restore it once".to_owned()));
    };
    let listed = node.store().working_sets(id).await?;
    let listed = listed.into_iter().find(|listed| listed.sequence == sequence);
    let listed = listed.ok_or_else(|| none(format!("has no working set {sequence}")))?;
    node.open_working_set(&snapshot, listed).await
}

/// Pages of guest memory by the time of their run's first touch, microseconds; memory is file 0.
fn touches(set: &WorkingSet) -> Vec<(u32, u64)> {
    let pages = |run: &WorkingSetRun| {
        let at_us = run.first_touch_us;
        (run.first_page..run.first_page + u64::from(run.pages)).map(move |page| (at_us, page))
    };
    let data = (0..set.frame_count()).flat_map(|frame| set.runs(frame));
    let runs = data.chain(set.zero_runs()).filter(|run| run.file == 0);
    let mut touches: Vec<_> = runs.flat_map(pages).collect();
    touches.sort_by_key(|(at_us, _)| *at_us);
    touches
}
