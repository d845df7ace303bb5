//! `reap-pack copy`.

use anyhow::Result;
use reap_store::{Error, Name, Store};

use super::arguments::IndexDirectory;
use super::{Context, reporter, watch_signals};
use crate::output::{Progress, size};

impl Context<'_> {
    pub(super) fn copy(
        &self,
        snapshot: &str,
        to: &str,
        name: Option<&str>,
        index: &IndexDirectory,
    ) -> Result<()> {
        let store = self.store()?;
        let id = self.find_live(&store, snapshot)?;
        let commit = self.runtime.block_on(store.commit(id))?;
        let name: Name = name.unwrap_or(&commit.name).parse()?;
        let target = self.runtime.block_on(Store::open(to))?;
        if target.id() == store.id() {
            let text =
                "is the store that the snapshot is in: 'reap-pack tag' gives it one more name";
            return Err(Error::refused(to, text).into());
        }
        let interrupted = watch_signals(self.runtime)?;
        let mut progress = Progress::new("copying", self.json);
        let copied = self.with_node(index.path(), |node| {
            let mut report = reporter(&mut progress, &interrupted);
            let index = index.path();
            let copied =
                reap_store::copy::copy(node, id, &target, self.runtime, &name, index, &mut report);
            Ok(copied?)
        });
        progress.end();
        let copied = copied?;
        let statistics = copied.packed.statistics;
        let text = format!(
            "{name} is {} in {to}: {} sent, {} pages were there, {} working sets",
            copied.packed.id,
            size(statistics.pack_bytes + copied.packed.manifest_bytes),
            statistics.parent_pages,
            copied.working_sets,
        );
        self.print(&serde_json::to_value(&copied)?, &text)
    }
}
