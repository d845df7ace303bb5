//! `reap-pack repair`.

use std::path::PathBuf;

use anyhow::Result;
use reap_store::repair::{Repaired, Sources, repair};
use reap_store::{Error, Store};

use super::arguments::IndexDirectory;
use super::{Context, reporter, watch_signals};
use crate::output::{Progress, size};

impl Context<'_> {
    /// `snapshot`: that one; all if there is none.
    pub(super) fn repair(
        &self,
        snapshot: Option<&str>,
        from: Option<&str>,
        caches: &[PathBuf],
        dry_run: bool,
    ) -> Result<()> {
        let store = self.store()?;
        let ids = match snapshot {
            Some(snapshot) => vec![self.find_live(&store, snapshot)?],
            None => self.runtime.block_on(store.ids())?,
        };
        let from = from.map(|from| self.runtime.block_on(Store::open(from))).transpose()?;
        let sources = Sources { from, caches: caches.to_vec() };
        let interrupted = watch_signals(self.runtime)?;
        let mut progress = Progress::new("repairing", self.json);
        let repaired = self.with_node(IndexDirectory::usual(), |node| {
            let mut report = reporter(&mut progress, &interrupted);
            Ok(repair(node, self.runtime, &ids, &sources, dry_run, &mut report)?)
        });
        progress.end();
        let repaired = repaired?;
        self.print(&serde_json::to_value(&repaired)?, &text_of(&repaired))?;
        match repaired.lost.len() {
            0 => Ok(()),
            count => {
                let text = format!(
                    "{count} objects are not to be had, listed above: their snapshots are as they were"
                );
                Err(Error::damaged(self.url, text).into())
            }
        }
    }
}

fn text_of(repaired: &Repaired) -> String {
    let mut text = String::new();
    let (again, anew) = match repaired.applied {
        true => ("brought back", "written once more"),
        false => ("can be brought back", "can be written once more"),
    };
    for object in &repaired.objects {
        text.push_str(&format!("{}: {again}, {}\n", object.key, size(object.bytes)));
    }
    for one in &repaired.rewrites {
        let (objects, frames) = (one.objects.join(", "), one.frames);
        text.push_str(&format!(
            "snapshot {}: {anew} without {objects}; {frames} frames of theirs are good\n",
            one.snapshot
        ));
    }
    for one in &repaired.replaced {
        let names: Vec<String> = one.names.iter().map(ToString::to_string).collect();
        let names = if names.is_empty() { "no name".to_owned() } else { names.join(" ") };
        text.push_str(&format!("{} is {} now ({names})\n", one.replaced, one.packed.id));
    }
    if repaired.working_sets > 0 {
        text.push_str(&format!("{} working sets: {again}\n", repaired.working_sets));
    }
    for warning in &repaired.warnings {
        text.push_str(&format!("warning, costs speed only: {warning}\n"));
    }
    for loss in &repaired.lost {
        text.push_str(&format!(
            "lost: snapshot {}: {}: {}\n",
            loss.snapshot, loss.object, loss.what
        ));
    }
    let count = repaired.snapshots;
    if repaired.is_clean() {
        text.push_str(&format!("{count} snapshots: nothing is missing or damaged"));
    } else if repaired.applied {
        let next = "run 'reap-pack verify --all', then delete gc/HALT so that collection goes on";
        text.push_str(&format!("{count} snapshots; {next}"));
    } else {
        text.push_str(&format!("{count} snapshots; nothing was changed"));
    }
    text
}
