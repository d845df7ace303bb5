//! The pages of the parents: which of them a new snapshot may refer to, and where they lie.
//!
//! A page table says where a page might be; only the pack's verified footer says that it is there.

use std::collections::{HashMap, HashSet};

use futures::{StreamExt, TryStreamExt};

use super::index::{Index, PackPages, Table};
use super::transaction::Transaction;
use crate::format::frame::FrameEntry;
use crate::format::keys::PackId;
use crate::format::record::{Commit, PackRef};
use crate::{Error, ErrorKind, Hash, SnapshotId};

/// Footers that are fetched at the same time.
const PARALLEL_FOOTERS: usize = 8;
/// Most packs of all parents: a commit record names every pack, and is at most 4 MiB long.
const MOST_PACKS: usize = 16_384;

/// A page that a pack of a parent holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    /// Number of the pack in [`Parents::pack`].
    pub(super) pack: u32,
    pub(super) entry: FrameEntry,
    pub(super) position: u32,
}

/// Where the page before was found: the next one is often beside it.
#[derive(Clone, Copy)]
pub(super) struct Beside {
    pack: u32,
    page: u32,
}

struct ParentPack {
    reference: PackRef,
    /// Missing where its footer is not to be had: then only its frames can be referred to.
    pages: Option<PackPages>,
}

struct Parent {
    id: SnapshotId,
    table: Option<Table>,
    /// For each pack of its commit record the number in `Parents::packs`, unless it is avoided.
    packs: Vec<Option<u32>>,
}

/// See the module.
#[derive(Default)]
pub(super) struct Parents {
    parents: Vec<Parent>,
    packs: Vec<ParentPack>,
    by_id: HashMap<PackId, u32>,
}

impl Parents {
    /// Step 4 of the protocol: the pages of the parents, in packs that may be referred to.
    pub(super) async fn load(transaction: &Transaction<'_>) -> Result<Self, Error> {
        let mut parents = Self::default();
        let Some(index) = transaction.index() else { return Ok(parents) };
        parents.load_packs(transaction, index).await?;
        for commit in transaction.parents() {
            parents.add(index, commit);
        }
        index.prune();
        Ok(parents)
    }

    async fn load_packs(
        &mut self,
        transaction: &Transaction<'_>,
        index: &Index,
    ) -> Result<(), Error> {
        let store = transaction.store();
        let mut seen = HashSet::new();
        let wanted: Vec<PackRef> = transaction
            .parents()
            .iter()
            .flat_map(|commit| &commit.packs)
            .filter(|pack| transaction.may_refer_to(&pack.pack) && seen.insert(pack.pack))
            .take(MOST_PACKS)
            .cloned()
            .collect();
        let loaded: Vec<ParentPack> = futures::stream::iter(wanted)
            .map(|reference| async move {
                match index.pack(store, &reference).await {
                    Ok(pages) => Ok(Some(ParentPack { reference, pages: Some(pages) })),
                    Err(error) if error.kind() == ErrorKind::Local => {
                        tracing::warn!("{error}: its pages are stored again");
                        Ok(Some(ParentPack { reference, pages: None }))
                    }
                    // Nothing may refer to a pack that is not as it was committed.
                    Err(error)
                        if matches!(error.kind(), ErrorKind::Damaged | ErrorKind::NotFound) =>
                    {
                        tracing::warn!("{error}: its pages are stored again");
                        Ok(None)
                    }
                    Err(error) => Err(error),
                }
            })
            .buffered(PARALLEL_FOOTERS)
            .try_filter_map(|pack| async move { Ok(pack) })
            .try_collect()
            .await?;
        let ids = loaded.iter().map(|pack| pack.reference.pack).zip(0..);
        self.by_id = ids.collect();
        self.packs = loaded;
        Ok(())
    }

    fn add(&mut self, index: &Index, commit: &Commit) {
        let packs: Vec<_> =
            commit.packs.iter().map(|pack| self.by_id.get(&pack.pack).copied()).collect();
        let pages: Vec<_> = (0..)
            .zip(&packs)
            .filter_map(|(number, pack)| {
                Some((number, self.packs[(*pack)? as usize].pages.as_ref()?))
            })
            .collect();
        let whole = pages.len() == commit.packs.len();
        let table = match index.table(commit.snapshot, &pages, whole) {
            Ok(table) => Some(table),
            Err(error) => {
                tracing::warn!("{error}: pages of {} are stored again", commit.snapshot);
                None
            }
        };
        self.parents.push(Parent { id: commit.snapshot, table, packs });
    }

    /// Where `page_id` lies, preferably right after the page before, which makes long runs.
    pub(super) fn find_page(&self, page_id: &Hash, before: &mut Option<Beside>) -> Option<Known> {
        let next = before.map(|beside| Beside { page: beside.page + 1, ..beside });
        let found = next.filter(|at| self.is(page_id, *at)).or_else(|| self.look_up(page_id));
        if found.is_some() {
            *before = found;
        }
        let at = found?;
        let (entry, position) = self.packs[at.pack as usize].pages.as_ref()?.place(at.page)?;
        Some(Known { pack: at.pack, entry, position })
    }

    fn look_up(&self, page_id: &Hash) -> Option<Beside> {
        self.parents.iter().find_map(|parent| {
            let mut hints = parent.table.as_ref()?.hints(page_id);
            hints.find_map(|hint| {
                let pack = parent.packs.get(hint.pack as usize).copied().flatten()?;
                let at = Beside { pack, page: hint.page };
                self.is(page_id, at).then_some(at)
            })
        })
    }

    fn is(&self, page_id: &Hash, at: Beside) -> bool {
        let pages = self.packs[at.pack as usize].pages.as_ref();
        pages.and_then(|pages| pages.page_id(at.page)).as_ref() == Some(page_id)
    }

    /// A frame that a manifest of this store refers to, if the new snapshot may refer to it too.
    pub(super) fn frame(&self, pack: PackId, entry: FrameEntry, position: u32) -> Option<Known> {
        let pack = *self.by_id.get(&pack)?;
        Some(Known { pack, entry, position })
    }

    /// A pack by its number.
    pub(super) fn pack(&self, number: u32) -> &PackRef {
        &self.packs[number as usize].reference
    }

    /// The parents that have a pack among `used`.
    pub(super) fn of(&self, used: &HashSet<u32>) -> Vec<SnapshotId> {
        let uses = |parent: &&Parent| parent.packs.iter().flatten().any(|pack| used.contains(pack));
        self.parents.iter().filter(uses).map(|parent| parent.id).collect()
    }
}
