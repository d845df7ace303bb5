//! `reap-pack ws`: looking at working sets, and taking them out of use.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use reap_store::{Error, Node, Profile, Snapshot, SnapshotId, WorkingSet, WorkingSetRun};
use serde_json::{Value, json};

use super::arguments::{IndexDirectory, Which};
use super::{Context, WorkingSets, picture};
use crate::output::{size, time};

impl Context<'_> {
    pub(super) fn ws(&self, command: &WorkingSets) -> Result<()> {
        match command {
            WorkingSets::Ls { snapshot } => self.list_working_sets(snapshot),
            WorkingSets::Show { which, html: None, .. } => self.show_working_set(which),
            WorkingSets::Show { which, html: Some(file), timeline } => {
                self.picture_of_working_set(which, file, timeline.as_deref())
            }
            WorkingSets::Rm { snapshot, profile } => self.remove_working_set(snapshot, profile),
            WorkingSets::Export { which, file } => self.export_working_set(which, file),
        }
    }

    fn list_working_sets(&self, name: &str) -> Result<()> {
        let store = self.store()?;
        let id = self.find_live(&store, name)?;
        let rows =
            self.with_node(IndexDirectory::usual(), |node| Ok(node.block_on(list(node, id))?))?;
        let mut text = String::new();
        for row in &rows {
            let _ = writeln!(text, "{}", line(row));
        }
        self.print(&Value::Array(rows), &text)
    }

    fn with_set<T>(
        &self,
        which: &Which,
        read: impl FnOnce(&Arc<WorkingSet>) -> Result<T>,
    ) -> Result<T> {
        let store = self.store()?;
        let id = self.find_live(&store, &which.snapshot)?;
        self.with_node(IndexDirectory::usual(), |node| read(&node.block_on(find(node, id, which))?))
    }

    fn show_working_set(&self, which: &Which) -> Result<()> {
        let value = self.with_set(which, |set| {
            let mut value = describe(set);
            value["weights"] = weights(set);
            value["files"] = per_file(set);
            Ok(value)
        })?;
        let mut text = line(&value);
        text.push_str("\npages by how often restores touch them:");
        for (share, pages) in value["weights"].as_object().into_iter().flatten() {
            let _ = write!(text, " {share}: {pages}");
        }
        for (file, pages) in value["files"].as_object().into_iter().flatten() {
            let _ = write!(text, "\n{file}: {pages} pages");
        }
        self.print(&value, &text)
    }

    fn picture_of_working_set(
        &self,
        which: &Which,
        file: &Path,
        timeline: Option<&Path>,
    ) -> Result<()> {
        let timeline = timeline.map(picture::Timeline::read).transpose()?;
        let (value, html) = self.with_set(which, |set| {
            let id = set.snapshot().id();
            if timeline.as_ref().is_some_and(|timeline| !timeline.is_of(id)) {
                let text = "the timeline is of a restore of another snapshot";
                return Err(Error::invalid(&which.snapshot, text).into());
            }
            Ok((describe(set), picture::html(&which.snapshot, set, timeline.as_ref())))
        })?;
        std::fs::write(file, html).map_err(|error| Error::local(file.display(), error))?;
        self.print(&value, &format!("{}\n{}", line(&value), file.display()))
    }

    fn remove_working_set(&self, name: &str, profile: &str) -> Result<()> {
        let profile: Profile = profile.parse()?;
        let store = self.store()?;
        let id = self.find_live(&store, name)?;
        let sequence = self.with_node(IndexDirectory::usual(), |node| {
            let removed = node.block_on(async {
                let snapshot = node.open_id(id).await?;
                node.remove_working_set(&snapshot, &profile).await
            });
            Ok(removed?)
        })?;
        let Some(sequence) = sequence else {
            return Err(Error::not_found(name, "has no working set for this profile").into());
        };
        let value = json!({ "snapshot": id, "profile": profile.as_str(), "sequence": sequence });
        self.print(
            &value,
            &format!("{name} has no working set any more, says working set {sequence}"),
        )
    }

    fn export_working_set(&self, which: &Which, file: &Path) -> Result<()> {
        let (id, sequence, touches) =
            self.with_set(which, |set| Ok((set.snapshot().id(), set.sequence(), touches(set))))?;
        let mut text = format!("# snapshot {id}, working set {sequence}: page, microseconds\n");
        for (at_us, page) in &touches {
            let _ = writeln!(text, "{page} {at_us}");
        }
        std::fs::write(file, text).map_err(|error| Error::local(file.display(), error))?;
        let value = json!({"snapshot": id, "sequence": sequence, "pages": touches.len()});
        self.print(&value, &format!("{} pages in {}", touches.len(), file.display()))
    }
}

/// All sets of a snapshot, newest first, usable or not.
pub(super) async fn list(node: &Node, id: SnapshotId) -> Result<Vec<Value>, Error> {
    let snapshot = node.open_id(id).await?;
    let mut rows = Vec::new();
    for listed in node.store().working_sets(id).await? {
        rows.push(match node.open_working_set(&snapshot, listed).await {
            Ok(set) => describe(&set),
            Err(error) => json!({
                "sequence": listed.sequence,
                "stored_bytes": listed.stored_bytes,
                "damaged": error.to_string(),
            }),
        });
    }
    Ok(rows)
}

/// One set for scripts.
fn describe(set: &WorkingSet) -> Value {
    json!({
        "sequence": set.sequence(),
        "profile": set.profile().as_str(),
        "restores": set.restores(),
        "data_pages": set.data_pages(),
        "zero_pages": set.zero_pages(),
        "stored_bytes": set.stored_bytes(),
        "created": time(set.created_unix_ms()),
    })
}

/// One set, as [`describe`] says it, for people.
pub(super) fn line(set: &Value) -> String {
    let text = |at: &Value| at.as_str().unwrap_or_default().to_owned();
    let number = |at: &Value| at.as_u64().unwrap_or_default();
    let sequence = &set["sequence"];
    if let Some(why) = set.get("damaged") {
        return format!("working set {sequence}: not usable: {}", text(why));
    }
    let profile = match text(&set["profile"]).as_str() {
        "" => String::new(),
        profile => format!(" ({profile})"),
    };
    if number(&set["data_pages"]) + number(&set["zero_pages"]) == 0 {
        return format!("working set {sequence}{profile}: removed {}", text(&set["created"]));
    }
    format!(
        "working set {sequence}{profile}: {} pages and {} zero pages in {}, learned from {} restores, {}",
        set["data_pages"],
        set["zero_pages"],
        size(number(&set["stored_bytes"])),
        set["restores"],
        text(&set["created"])
    )
}

async fn find(node: &Node, id: SnapshotId, which: &Which) -> Result<Arc<WorkingSet>, Error> {
    let snapshot = node.open_id(id).await?;
    let none = |what: String| Error::not_found(id, what);
    let Some(sequence) = which.sequence else {
        let newest = node.working_set_of(&snapshot, &which.profile.parse()?).await?;
        return newest.ok_or_else(|| none("has no usable working set: restore it once".to_owned()));
    };
    let listed = node.store().working_sets(id).await?;
    let listed = listed.into_iter().find(|listed| listed.sequence == sequence);
    let listed = listed.ok_or_else(|| none(format!("has no working set {sequence}")))?;
    node.open_working_set(&snapshot, listed).await
}

/// How many pages are touched by what part of restores.
fn weights(set: &WorkingSet) -> Value {
    let mut counts = [("always", 0), ("mostly", 0), ("at times", 0), ("never yet", 0)];
    for run in set.all_runs() {
        let kind = match f32::from(run.weight) / f32::from(reap_store::WEIGHT_ONE) {
            weight if weight >= 0.95 => 0,
            weight if weight >= 0.5 => 1,
            weight if weight > 0.0 => 2,
            // Taken because most around them were touched.
            _ => 3,
        };
        counts[kind].1 += u64::from(run.pages);
    }
    counts.into_iter().map(|(name, pages)| (name.to_owned(), json!(pages))).collect()
}

/// How many pages are of which file.
fn per_file(set: &WorkingSet) -> Value {
    let files = Snapshot::files(set.snapshot());
    let pages = |number: usize| {
        let of_file = set.all_runs().filter(|run| run.file as usize == number);
        of_file.map(|run| u64::from(run.pages)).sum::<u64>()
    };
    let counted = files.iter().enumerate().map(|(number, file)| (file.name.clone(), pages(number)));
    counted.filter(|(_, pages)| *pages > 0).map(|(name, pages)| (name, json!(pages))).collect()
}

/// Pages of guest memory that were touched, by the time of their run's first touch, microseconds; memory is file 0.
fn touches(set: &WorkingSet) -> Vec<(u32, u64)> {
    let pages = |run: &WorkingSetRun| {
        let at_us = run.first_touch_us;
        (run.first_page..run.first_page + u64::from(run.pages)).map(move |page| (at_us, page))
    };
    let mut touches: Vec<_> =
        set.all_runs().filter(|run| run.file == 0 && run.was_touched()).flat_map(pages).collect();
    touches.sort_by_key(|(at_us, _)| *at_us);
    touches
}
