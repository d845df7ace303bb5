//! `reap-pack stats`.

use std::collections::BTreeMap;

use anyhow::Result;
use reap_store::SnapshotId;
use reap_store::usage::usage;
use serde_json::json;

use super::Context;
use crate::output::size;

impl Context<'_> {
    pub(super) fn stats(&self) -> Result<()> {
        let store = self.store()?;
        let usage = self.runtime.block_on(usage(&store))?;
        let mut names: BTreeMap<SnapshotId, Vec<String>> = BTreeMap::new();
        for named in self.runtime.block_on(store.names())? {
            names.entry(named.snapshot).or_default().push(named.name.to_string());
        }
        let mut value = serde_json::to_value(&usage)?;
        let mut text = String::new();
        for (number, one) in usage.snapshots.iter().enumerate() {
            let names = names.get(&one.snapshot).cloned().unwrap_or_default();
            text.push_str(&format!(
                "{}  {}: raw {}, not zero {}, unique {}, stored {}, of that its own {}, manifest {}, working sets {}\n",
                one.snapshot,
                if names.is_empty() { "(no name)".to_owned() } else { names.join(" ") },
                size(one.raw_bytes),
                size(one.data_bytes),
                size(one.unique_bytes),
                size(one.stored_bytes),
                size(one.exclusive_bytes),
                size(one.manifest_bytes),
                size(one.working_set_bytes),
            ));
            value["snapshots"][number]["names"] = json!(names);
        }
        for (owner, bytes) in &usage.garbage {
            text.push_str(&format!("{owner}  (removed or given up): garbage {}\n", size(*bytes)));
        }
        text.push_str(&format!(
            "{} snapshots: raw {}, unique {}, stored {}; garbage {}, dead in packs that are in use {}, unfinished {}",
            usage.snapshots.len(),
            size(usage.raw_bytes),
            size(usage.unique_bytes),
            size(usage.stored_bytes),
            size(usage.garbage_bytes),
            size(usage.dead_bytes),
            size(usage.unfinished_bytes),
        ));
        value["packs"] = json!(usage.packs.len());
        self.print(&value, &text)
    }
}
