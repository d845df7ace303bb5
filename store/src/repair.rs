//! Bringing back what is missing or damaged, from another store or from nodes' caches.
//!
//! Objects are never overwritten, and no name is used twice for different bytes. So there are two ways:
//!
//! - an object that is *missing* is created again, with the very bytes that it had: the hash in its commit
//!   record says which;
//! - a snapshot that refers to an object that is *damaged*, or of which only frames are left elsewhere, is
//!   written once more by a new transaction, from good frames; its names move, and the old one is removed,
//!   as repacking does.
//!
//! Collection is halted while that goes on, and stays so: a person looks before anything is deleted again.

mod apply;
mod plan;
mod spares;
#[cfg(test)]
mod tests;

use std::ops::ControlFlow;
use std::path::PathBuf;

use serde::Serialize;
use tokio::runtime::Runtime;

use crate::pack::Progress;
use crate::repack::Repacked;
use crate::store::Store;
use crate::{Error, Node, SnapshotId};
use plan::Plan;
pub(crate) use spares::Spares;

/// Where to look for what is not to be had in the store.
#[derive(Clone, Default)]
pub struct Sources {
    /// Another store: one that has the same objects, as a replica has, or one that has frames of the same
    /// pages, as `copy` makes them.
    pub from: Option<Store>,
    /// Directories of nodes' caches, each of a node that does not run.
    pub caches: Vec<PathBuf>,
}

/// What is wrong, what can be done about it, and what was done.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Repaired {
    /// Snapshots that were looked at.
    pub snapshots: u64,
    /// Missing objects that are, or can be, created again as they were.
    pub objects: Vec<RestoredObject>,
    /// Snapshots that can be written once more; see `replaced` for those that were.
    pub rewrites: Vec<RewrittenSnapshot>,
    /// Damaged working sets that are, or can be, published again.
    pub working_sets: u64,
    /// What is not to be had. The snapshots that need it are left as they are.
    pub lost: Vec<Loss>,
    /// Damage that costs speed only and that nothing was found for.
    pub warnings: Vec<String>,
    /// Whether anything was changed.
    pub applied: bool,
    /// What became of `rewrites`.
    pub replaced: Vec<Repacked>,
}

/// A missing object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RestoredObject {
    /// Its key.
    pub key: String,
    /// Its length.
    pub bytes: u64,
}

/// A snapshot that needs a new transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RewrittenSnapshot {
    /// As it is called now.
    pub snapshot: SnapshotId,
    /// Why: the damaged or missing objects.
    pub objects: Vec<String>,
    /// Frames that come from elsewhere.
    pub frames: u64,
}

/// Something that no source has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Loss {
    /// Who needs it.
    pub snapshot: SnapshotId,
    /// The object.
    pub object: String,
    /// What of it, and what is wrong.
    pub what: String,
}

impl Repaired {
    /// Whether nothing is wrong that repairing is about.
    pub fn is_clean(&self) -> bool {
        let whole = self.objects.is_empty() && self.rewrites.is_empty();
        whole && self.working_sets == 0 && self.lost.is_empty()
    }
}

/// Reads every pack of `ids`, which `node` reads, and finds out what can be brought back; does so unless
/// `dry_run`. Call it outside the runtime.
///
/// Errors: [`Refused`](crate::ErrorKind::Refused) where collection cannot be halted or is about to delete what
/// is to be brought back; whatever writing may come to. What was done until then stays and is whole.
pub fn repair(
    node: &Node,
    runtime: &Runtime,
    ids: &[SnapshotId],
    sources: &Sources,
    dry_run: bool,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Repaired, Error> {
    let mut spares = Spares::open(node.store(), sources)?;
    let plan = runtime.block_on(Plan::make(node.store(), &mut spares, ids))?;
    let mut repaired = plan.report(ids.len());
    if !dry_run && !plan.is_empty() {
        repaired.applied = true;
        repaired.replaced = plan.carry_out(node, runtime, spares, progress)?;
    }
    Ok(repaired)
}
