//! Carrying out a plan: collection is halted first, then missing objects come back, then snapshots are
//! written once more.

use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Runtime;

use super::Spares;
use super::plan::{Missing, Plan, Rewritten};
use crate::collect;
use crate::format::keys::{self, PackId};
use crate::pack::{Lineage, Progress, condemned};
use crate::repack::{EARLIER_PARENTS, Repacked, replace};
use crate::store::Store;
use crate::{Error, ErrorKind, Node, SnapshotId};

impl Plan {
    pub(super) fn carry_out(
        self,
        node: &Node,
        runtime: &Runtime,
        spares: Spares,
        progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
    ) -> Result<Vec<Repacked>, Error> {
        let store = node.store();
        runtime.block_on(self.hold_collection(store))?;
        for missing in &self.objects {
            runtime.block_on(create_again(store, &spares, missing))?;
        }
        for (id, object) in &self.working_sets {
            let new = |sequence| (keys::working_set(*id, sequence), vec![object.clone()]);
            runtime.block_on(store.create_next(&keys::working_sets(*id), new))?;
        }
        let spares = Arc::new(spares);
        let mut replaced: Vec<Repacked> = Vec::new();
        for rewritten in self.rewrites {
            // Relatives share pages; the old one has good packs that stay.
            let own = rewritten.has_record.then_some(rewritten.id);
            let earlier = replaced.iter().rev().take(EARLIER_PARENTS);
            let parents = earlier.map(|one| one.packed.id).chain(own).collect();
            let avoided = self.bad_packs.clone();
            let lineage = Lineage { parents, automatic: false, index: None, avoided };
            match write_again(node, runtime, rewritten, lineage, &spares, progress) {
                Ok(one) => replaced.push(one),
                // Somebody removed it meanwhile, which does as well.
                Err(Failure::Removed) => {}
                Err(Failure::Error(error)) => return Err(error),
            }
        }
        Ok(replaced)
    }

    /// Nothing may be deleted while names that were gone come back, nor until a person has looked; and
    /// nothing comes back that a run which is past that question may still delete.
    async fn hold_collection(&self, store: &Store) -> Result<(), Error> {
        let first = self.objects.first().map(|one| one.key.clone());
        let first = first.or_else(|| self.rewrites.first().map(|one| keys::manifest(one.id)));
        if !store.objects().exists(keys::HALT).await? {
            collect::halt(store.objects(), &first.unwrap_or_default()).await;
        }
        if !store.objects().exists(keys::HALT).await? {
            let text = "collection cannot be halted, so nothing may be brought back";
            return Err(Error::refused(keys::HALT, text));
        }
        let condemned = condemned(store).await?;
        let pack = |one: &Missing| one.key.strip_prefix("pack/")?.parse::<PackId>().ok();
        match self.objects.iter().filter_map(pack).find(|pack| condemned.contains(pack)) {
            Some(pack) => {
                let text =
                    "a collection is about to delete it: wait until it has ended, then try again";
                Err(Error::refused(pack.key(), text))
            }
            None => Ok(()),
        }
    }
}

/// The very bytes under the very name, which is no change: whoever missed them finds them again.
async fn create_again(store: &Store, spares: &Spares, missing: &Missing) -> Result<(), Error> {
    let mut is_needed = false;
    for id in &missing.snapshots {
        is_needed |= !store.is_removed(*id).await?;
    }
    if !is_needed {
        return Ok(());
    }
    let object = spares.object(&missing.key, missing.bytes, missing.hash).await?;
    let gone = || Error::not_found(&missing.key, "the other store had it, and has it no more");
    let object: Bytes = object.ok_or_else(gone)?;
    store.objects().create(&missing.key, &[object]).await
}

enum Failure {
    Removed,
    Error(Error),
}

fn write_again(
    node: &Node,
    runtime: &Runtime,
    rewritten: Rewritten,
    lineage: Lineage,
    spares: &Arc<Spares>,
    progress: &mut dyn FnMut(Progress) -> ControlFlow<()>,
) -> Result<Repacked, Failure> {
    let id: SnapshotId = rewritten.id;
    let bad = rewritten.commit.packs.iter().filter(|pack| lineage.avoided.contains(&pack.pack));
    let packs_left = bad.count() as u64;
    let (commit, manifest) = (rewritten.commit, rewritten.manifest);
    let opened = node.block_on(node.open_as(id, async move { Ok((commit, manifest)) }));
    let spares = Some(spares.clone());
    let replaced = opened.and_then(|snapshot| {
        replace(node, runtime, &snapshot, lineage, spares, packs_left, progress)
    });
    replaced.map_err(|error| match error.kind() {
        ErrorKind::NotFound => match node.block_on(node.store().is_removed(id)) {
            Ok(true) => Failure::Removed,
            _ => Failure::Error(error),
        },
        _ => Failure::Error(error),
    })
}
