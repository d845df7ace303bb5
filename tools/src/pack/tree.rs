//! `reap-pack ls --tree`: every snapshot under the first of its parents that still exists.

use std::collections::{BTreeMap, HashSet};

use anyhow::Result;
use reap_store::format::record::Commit;
use reap_store::{ErrorKind, SnapshotId};
use serde_json::{Value, json};

use super::Context;
use crate::output::{size, time};

/// A snapshot in the tree.
struct Node {
    commit: Commit,
    names: Vec<String>,
}

impl Context<'_> {
    pub(super) fn tree(&self) -> Result<()> {
        let store = self.store()?;
        let mut nodes = BTreeMap::new();
        for id in self.runtime.block_on(store.ids())? {
            match self.runtime.block_on(store.commit(id)) {
                Ok(commit) => nodes.insert(id, Node { commit, names: Vec::new() }),
                // A transaction that was given up.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error.into()),
            };
        }
        for named in self.runtime.block_on(store.names())? {
            if let Some(node) = nodes.get_mut(&named.snapshot) {
                node.names.push(named.name.to_string());
            }
        }
        let mut children: BTreeMap<Option<SnapshotId>, Vec<SnapshotId>> = BTreeMap::new();
        for (id, node) in &nodes {
            let parent = node.commit.parents.iter().find(|parent| nodes.contains_key(parent));
            children.entry(parent.copied()).or_default().push(*id);
        }
        for siblings in children.values_mut() {
            siblings.sort_by_key(|id| (nodes[id].commit.created_unix_ms, *id));
        }
        let mut tree = Tree { nodes: &nodes, children: &children, seen: HashSet::new() };
        let mut text = String::new();
        let value = tree.below(None, 0, &mut text);
        self.print(&value, &text)
    }
}

struct Tree<'a> {
    nodes: &'a BTreeMap<SnapshotId, Node>,
    children: &'a BTreeMap<Option<SnapshotId>, Vec<SnapshotId>>,
    seen: HashSet<SnapshotId>,
}

impl Tree<'_> {
    fn below(&mut self, parent: Option<SnapshotId>, depth: usize, text: &mut String) -> Value {
        let mut rows = Vec::new();
        for id in self.children.get(&parent).into_iter().flatten() {
            if !self.seen.insert(*id) {
                continue;
            }
            let Node { commit, names } = &self.nodes[id];
            let own = commit.packs.iter().filter(|pack| pack.pack.txn == *id).count();
            text.push_str(&format!(
                "{}{}  {}  {}  {} in {} own and {} parents' packs\n",
                "  ".repeat(depth),
                if names.is_empty() { "(no name)".to_owned() } else { names.join(" ") },
                id,
                time(commit.created_unix_ms),
                size(commit.statistics.pack_bytes),
                own,
                commit.packs.len() - own,
            ));
            rows.push(json!({
                "snapshot": id,
                "names": names,
                "created": time(commit.created_unix_ms),
                "parents": commit.parents,
                "own_packs": own,
                "parent_packs": commit.packs.len() - own,
                "pack_bytes": commit.statistics.pack_bytes,
                "children": self.below(Some(*id), depth + 1, text),
            }));
        }
        Value::Array(rows)
    }
}
