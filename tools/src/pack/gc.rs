//! `reap-pack gc`: what nobody needs any more goes.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::Result;
use reap_store::collect::{Collected, Options, collect};
use serde_json::json;

use super::Context;
use crate::output::size;

impl Context<'_> {
    pub(super) fn gc(&self, options: Options) -> Result<()> {
        let store = self.store()?;
        let collected = self.runtime.block_on(collect(&store, options))?;
        let mut value = serde_json::to_value(&collected)?;
        value["garbage_bytes"] = json!(collected.garbage_bytes());
        self.print(&value, &lines(&collected, options.dry_run))
    }
}

fn lines(collected: &Collected, dry_run: bool) -> String {
    let mut reasons: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for object in &collected.garbage {
        let (count, bytes) = reasons.entry(object.reason).or_default();
        *count += 1;
        *bytes += object.bytes;
    }
    let mut text = String::new();
    for (reason, (count, bytes)) in reasons {
        let _ = writeln!(text, "{count} objects, {}: {reason}", size(bytes));
    }
    let (objects, bytes) = (collected.garbage.len(), size(collected.garbage_bytes()));
    let live = collected.live_snapshots;
    let what = match (dry_run, collected.deleted) {
        (true, _) => "would be deleted",
        (false, true) => "deleted",
        (false, false) => "deleted: there was nothing to do",
    };
    let _ = write!(text, "{objects} objects, {bytes} {what}; {live} snapshots are live");
    text
}
