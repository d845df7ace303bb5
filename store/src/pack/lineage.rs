//! Which snapshots a new one may refer to: the packer's steps 2 and 3 of the collection protocol.
//!
//! Everything here is called with the lease in the store, and tells what it reads now;
//! [`Packer`](super::machine::Packer) decides.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;

use futures::{StreamExt, TryStreamExt};

use super::Request;
use super::index::{Index, Kinship};
use crate::format::keys::PackId;
use crate::format::record::{Commit, Condemned};
use crate::store::{Store, read_record};
use crate::{Error, ErrorKind, SnapshotId};

/// Snapshots with the same value of this label are taken for relatives.
pub const BASE_LABEL: &str = "base";
/// Most parents that are chosen without being asked for. Each costs a look per new page, and flat
/// manifests let the newest ones speak for their own parents.
const CHOSEN_PARENTS: usize = 4;
/// Records that are read at the same time.
const PARALLEL_READS: usize = 32;
/// How often the condemned lists are read again when one vanishes meanwhile.
const CONDEMNED_TRIES: usize = 8;

/// Whose pages a new snapshot may refer to instead of storing them again.
#[derive(Clone, Debug, Default)]
pub struct Lineage {
    /// These snapshots. One that is removed or was never committed fails the pack.
    pub parents: Vec<SnapshotId>,
    /// And the newest ones that share the name or the `base` label.
    pub automatic: bool,
    /// Where this node remembers packs between runs; nowhere if `None`.
    pub index: Option<PathBuf>,
    /// Packs that nothing may refer to any more.
    pub avoided: HashSet<PackId>,
}

/// Everything that some collector may be about to delete.
pub(crate) async fn condemned(store: &Store) -> Result<BTreeSet<PackId>, Error> {
    'again: for _ in 0..CONDEMNED_TRIES {
        let mut packs = BTreeSet::new();
        for object in store.objects().list("gc/condemned/").await? {
            match read_record::<Condemned>(store.objects(), &object.key).await {
                Ok(condemned) => packs.extend(condemned.packs),
                // Its run has ended since the listing; another may have begun.
                Err(error) if error.kind() == ErrorKind::NotFound => continue 'again,
                Err(error) => return Err(error),
            }
        }
        return Ok(packs);
    }
    Err(Error::refused("gc/condemned", "collectors come and go all the time: try again"))
}

/// The commit records of the parents for `request`, in the order in which they are asked for a page.
pub(super) async fn choose(
    store: &Store,
    request: &Request,
    index: &Index,
) -> Result<Vec<Commit>, Error> {
    let mut parents = Vec::new();
    for id in &request.lineage.parents {
        let commit = store.commit(*id).await?;
        if store.is_removed(*id).await? {
            return Err(Error::not_found(id, "the snapshot was removed"));
        }
        parents.push(commit);
    }
    if !request.lineage.automatic {
        return Ok(parents);
    }
    for id in relatives(store, request, index).await? {
        if parents.len() >= CHOSEN_PARENTS.max(request.lineage.parents.len()) {
            break;
        }
        if parents.iter().any(|parent| parent.snapshot == id) {
            continue;
        }
        match store.commit(id).await {
            Ok(commit) if !store.is_removed(id).await? => parents.push(commit),
            Ok(_) => {}
            // A snapshot that was given up, or whose name outlived it.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(parents)
}

/// Snapshots that share the name or the `base` label, what the name stands for first, then newest
/// first. A hint: the caller looks at each again.
async fn relatives(
    store: &Store,
    request: &Request,
    index: &Index,
) -> Result<Vec<SnapshotId>, Error> {
    let mut found = match store.resolve(&request.name).await {
        Ok(id) => vec![id],
        Err(error) if error.kind() == ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error),
    };
    let base = request.labels.get(BASE_LABEL);
    let known = kinships(store, index).await?;
    let mut kin: Vec<_> = known
        .iter()
        .filter(|(_, kinship)| {
            kinship.name == request.name.as_str()
                || (base.is_some() && kinship.base.as_ref() == base)
        })
        .collect();
    kin.sort_by_key(|(_, kinship)| Reverse(kinship.created_unix_ms));
    found.extend(kin.into_iter().map(|(id, _)| *id));
    Ok(found)
}

/// What the commit records of all snapshots say of themselves. Commit records never change, so
/// each is read once on a node.
async fn kinships(store: &Store, index: &Index) -> Result<BTreeMap<SnapshotId, Kinship>, Error> {
    let ids = store.ids().await?;
    let mut remembered = index.kinships();
    let before = remembered.len();
    let mut known = BTreeMap::new();
    let mut unknown = Vec::new();
    for id in ids {
        match remembered.remove(&id.to_string()) {
            Some(kinship) => {
                known.insert(id, kinship);
            }
            None => unknown.push(id),
        }
    }
    let changed = !unknown.is_empty() || known.len() != before;
    let read: Vec<_> = futures::stream::iter(unknown)
        .map(|id| async move {
            match store.commit(id).await {
                Ok(commit) => Ok(Some((id, Kinship::of(&commit)))),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(error),
            }
        })
        .buffer_unordered(PARALLEL_READS)
        .try_collect()
        .await?;
    known.extend(read.into_iter().flatten());
    if changed {
        let texts = known.iter().map(|(id, kinship)| (id.to_string(), kinship.clone()));
        if let Err(error) = index.remember(&texts.collect()) {
            tracing::warn!("not remembered: {error}");
        }
    }
    Ok(known)
}
