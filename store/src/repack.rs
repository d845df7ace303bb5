//! Repacking: a snapshot whose packs are mostly dead moves what it needs of them into new packs, so
//! that collection can take the old ones.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::runtime::Runtime;

use crate::format::keys::PackId;
use crate::pack::{Lineage, Packed, Progress};
use crate::repair::Spares;
use crate::rewrite::Rewrite;
use crate::usage::Usage;
use crate::{Error, ErrorKind, Name, Node, Snapshot, SnapshotId};

/// How many snapshots that were repacked just now are parents of the next: relatives share pages.
pub(crate) const EARLIER_PARENTS: usize = 4;

/// What came of one snapshot.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Repacked {
    /// The snapshot that was replaced and is removed.
    pub replaced: SnapshotId,
    /// Names that stand for the new one now.
    pub names: Vec<Name>,
    /// Working sets that were carried over.
    pub working_sets: u64,
    /// Packs that it does not need any more.
    pub packs_left: u64,
    /// The new snapshot.
    #[serde(flatten)]
    pub packed: Packed,
}

/// Rewrites those of `ids` that refer to packs of which less than `threshold` (0 to 1) is in use.
/// Each gets a new id; its names move to it, unless they have moved elsewhere meanwhile, and the old
/// one is removed. What is interrupted leaves both, or the old one alone. Call it outside the runtime.
pub fn repack(
    node: &Node,
    runtime: &Runtime,
    usage: &Usage,
    ids: &[SnapshotId],
    threshold: f64,
    index: Option<&PathBuf>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Vec<Repacked>, Error> {
    let dying = usage.packs_below(threshold);
    let mut repacked: Vec<Repacked> = Vec::new();
    for id in ids {
        let earlier = repacked.iter().rev().take(EARLIER_PARENTS);
        let parents: Vec<_> = earlier.map(|one| one.packed.id).chain([*id]).collect();
        let lineage =
            Lineage { parents, automatic: false, index: index.cloned(), avoided: dying.clone() };
        match repack_one(node, runtime, *id, lineage, &dying, progress) {
            Ok(one) => repacked.extend(one),
            // Somebody removed it meanwhile, which does as well.
            Err(error) if error.kind() == ErrorKind::NotFound && is_removed(node, *id)? => {}
            Err(error) => return Err(error),
        }
    }
    Ok(repacked)
}

fn is_removed(node: &Node, id: SnapshotId) -> Result<bool, Error> {
    node.block_on(node.store().is_removed(id))
}

fn repack_one(
    node: &Node,
    runtime: &Runtime,
    id: SnapshotId,
    lineage: Lineage,
    dying: &HashSet<PackId>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Repacked>, Error> {
    let store = node.store();
    let commit = runtime.block_on(store.commit(id))?;
    let left = commit.packs.iter().filter(|pack| dying.contains(&pack.pack)).count();
    if left == 0 {
        return Ok(None);
    }
    let snapshot = node.block_on(node.open_id(id))?;
    replace(node, runtime, &snapshot, lineage, None, left as u64, progress).map(Some)
}

/// Writes a snapshot once more, moves its names, and removes it; the new one leaves `packs_left` packs
/// behind.
pub(crate) fn replace(
    node: &Node,
    runtime: &Runtime,
    snapshot: &Arc<Snapshot>,
    lineage: Lineage,
    spares: Option<Arc<Spares>>,
    packs_left: u64,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Repacked, Error> {
    let (store, id) = (node.store(), snapshot.id());
    let name: Name = snapshot.commit().name.parse()?;
    let rewrite =
        Rewrite { snapshot, node, target: store, runtime, name, lineage, replaces: true, spares };
    let (packed, working_sets) = rewrite.run(progress)?;
    let mut names = Vec::new();
    for named in runtime.block_on(store.names())? {
        if named.snapshot == id && runtime.block_on(store.move_name(&named.name, id, packed.id))? {
            names.push(named.name);
        }
    }
    // Last: until here the old one is what its names stand for, or nothing has changed.
    runtime.block_on(store.remove(id, node.id()))?;
    Ok(Repacked { replaced: id, names, working_sets, packs_left, packed })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;

    #[test]
    fn a_name_is_moved_only_from_where_it_was() {
        let runtime = Runtime::new().expect("runtime");
        let directory = tempfile::tempdir().expect("directory");
        let url = format!("file://{}/store", directory.path().display());
        let name: Name = "f".parse().expect("a name");
        let [old, new, newer] = [1, 2, 3].map(|byte| SnapshotId::from_bytes([byte; 16]));
        runtime.block_on(async {
            let store = Store::init(&url).await.expect("made");
            assert!(!store.move_name(&name, old, new).await.expect("asked"), "no such name");
            store.tag(&name, old).await.expect("tagged");
            assert!(store.move_name(&name, old, new).await.expect("asked"));
            store.tag(&name, newer).await.expect("tagged");
            assert!(!store.move_name(&name, new, old).await.expect("asked"), "it went elsewhere");
            assert_eq!(store.resolve(&name).await.expect("resolved"), newer);
        });
    }
}
