//! `reap-pack ls` and `reap-pack show`.

use anyhow::Result;
use reap_store::format::record::Commit;
use reap_store::{Node, SnapshotId};
use serde_json::{Value, json};

use super::arguments::IndexDirectory;
use super::{Context, ws};
use crate::output::{size, time};

impl Context<'_> {
    pub(super) fn ls(&self) -> Result<()> {
        let store = self.store()?;
        let mut rows = Vec::new();
        let mut text = String::new();
        for named in self.runtime.block_on(store.names())? {
            let commit = self.runtime.block_on(store.commit(named.snapshot))?;
            let file_bytes: u64 = commit.files.iter().map(|file| file.bytes).sum();
            let pack_bytes = commit.statistics.pack_bytes;
            text.push_str(&format!(
                "{}  {}  {}  {} in {}\n",
                named.name,
                named.snapshot,
                time(commit.created_unix_ms),
                size(file_bytes),
                size(pack_bytes)
            ));
            rows.push(json!({
                "name": named.name,
                "snapshot": named.snapshot,
                "created": time(commit.created_unix_ms),
                "file_bytes": file_bytes,
                "pack_bytes": pack_bytes,
                "labels": commit.labels,
            }));
        }
        self.print(&Value::Array(rows), &text)
    }

    pub(super) fn show(&self, snapshot: &str) -> Result<()> {
        let store = self.store()?;
        let id = self.find_live(&store, snapshot)?;
        let mut value =
            self.with_node(IndexDirectory::usual(), |node| node.block_on(describe(node, id)))?;
        let names: Vec<String> = self
            .runtime
            .block_on(store.names())?
            .into_iter()
            .filter(|named| named.snapshot == id)
            .map(|named| named.name.to_string())
            .collect();
        value["names"] = json!(names);
        let text = lines(&value);
        self.print(&value, &text)
    }
}

async fn describe(node: &Node, id: SnapshotId) -> Result<Value> {
    let snapshot = node.open_id(id).await?;
    let commit = snapshot.commit();
    let working_sets = ws::list(node, id).await?;
    let files: Vec<Value> = snapshot
        .files()
        .iter()
        .enumerate()
        .map(|(number, file)| {
            json!({
                "name": file.name,
                "kind": file.kind,
                "bytes": file.size,
                "pages": file.page_count(),
                "data_pages": snapshot.data_pages(number),
            })
        })
        .collect();
    Ok(json!({
        "snapshot": id,
        "packed_as": commit.name,
        "created": time(commit.created_unix_ms),
        "labels": commit.labels,
        "files": files,
        "pages": {
            "all": commit.statistics.pages,
            "zero": commit.statistics.zero_pages,
            "unique": commit.statistics.unique_pages,
            "duplicate": commit.statistics.duplicate_pages,
            "in_parents": commit.statistics.parent_pages,
        },
        "file_bytes": file_bytes(commit),
        "pack_bytes": commit.statistics.pack_bytes,
        "manifest_bytes": commit.manifest_bytes,
        "ratio": ratio(file_bytes(commit), commit.statistics.pack_bytes + commit.manifest_bytes),
        "compression_ratio":
            ratio(commit.statistics.unique_pages * 4096, commit.statistics.pack_bytes),
        "packs": commit.packs,
        "own_packs": commit.packs.iter().filter(|pack| pack.pack.txn == id).count(),
        "parents": commit.parents,
        "facts": snapshot.facts(),
        "working_sets": working_sets,
    }))
}

fn file_bytes(commit: &Commit) -> u64 {
    commit.files.iter().map(|file| file.bytes).sum()
}

/// `raw` to `stored`, two digits after the point.
fn ratio(raw: u64, stored: u64) -> f64 {
    (raw as f64 / stored.max(1) as f64 * 100.0).round() / 100.0
}

/// The same for people.
fn lines(value: &Value) -> String {
    let bytes = |at: &Value| size(at.as_u64().unwrap_or_default());
    let text = |at: &Value| at.as_str().unwrap_or_default().to_owned();
    let list = |at: &Value| at.as_array().cloned().unwrap_or_default();
    let mut out =
        format!("snapshot {}, packed {}\n", text(&value["snapshot"]), text(&value["created"]));
    let names: Vec<String> = list(&value["names"]).iter().map(text).collect();
    out.push_str(&format!("names: {}\n", names.join(" ")));
    for (key, label) in value["labels"].as_object().into_iter().flatten() {
        out.push_str(&format!("label {key}={}\n", text(label)));
    }
    for file in list(&value["files"]) {
        out.push_str(&format!(
            "{} ({}): {}, {} of {} pages are not zero\n",
            text(&file["name"]),
            text(&file["kind"]),
            bytes(&file["bytes"]),
            file["data_pages"],
            file["pages"]
        ));
    }
    let pages = &value["pages"];
    out.push_str(&format!(
        "pages: {} in all, {} zero, {} unique, {} duplicate, {} of them in parents\n",
        pages["all"], pages["zero"], pages["unique"], pages["duplicate"], pages["in_parents"]
    ));
    out.push_str(&format!(
        "stored: {} in {} own packs (of {} that it refers to) and a manifest of {}; {} : 1 over all, {} : 1 by compression\n",
        bytes(&value["pack_bytes"]),
        value["own_packs"],
        list(&value["packs"]).len(),
        bytes(&value["manifest_bytes"]),
        value["ratio"],
        value["compression_ratio"]
    ));
    let host = &value["facts"]["host"];
    out.push_str(&format!(
        "packed on: {}, {} family {} model {}, Linux {}\n",
        text(&host["architecture"]),
        text(&host["cpu_vendor"]),
        text(&host["cpu_family"]),
        text(&host["cpu_model"]),
        text(&host["kernel"])
    ));
    for set in list(&value["working_sets"]) {
        out.push_str(&format!("{}\n", ws::line(&set)));
    }
    out
}
