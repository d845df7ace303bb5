//! A snapshot of one store into another: only pages that the other lacks are written there.

use std::ops::ControlFlow;
use std::path::PathBuf;

use tokio::runtime::Runtime;

use crate::pack::{Lineage, Packed, Progress};
use crate::rewrite::Rewrite;
use crate::store::Store;
use crate::{Error, Name, Node, SnapshotId};

/// What came of it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Copied {
    /// The snapshot in the other store.
    #[serde(flatten)]
    pub packed: Packed,
    /// Working sets that went along.
    pub working_sets: u64,
}

/// Copies snapshot `id`, which `node` reads, to `target` as `name`. Pages that snapshots of the same
/// name or `base` label have there are referred to. Call it outside the runtime.
pub fn copy(
    node: &Node,
    id: SnapshotId,
    target: &Store,
    runtime: &Runtime,
    name: &Name,
    index: Option<PathBuf>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Copied, Error> {
    let snapshot = node.block_on(node.open_id(id))?;
    let lineage = Lineage { automatic: true, index, ..Lineage::default() };
    let name = name.clone();
    let rewrite = Rewrite {
        snapshot: &snapshot,
        node,
        target,
        runtime,
        name,
        lineage,
        replaces: false,
        spares: None,
    };
    let (packed, working_sets) = rewrite.run(progress)?;
    Ok(Copied { packed, working_sets })
}
