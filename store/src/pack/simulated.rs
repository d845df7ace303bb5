//! A packing for the simulator: the production [`Transaction`] over a store in memory, with small packs
//! in place of the builder's.

use std::collections::BTreeMap;
use std::time::Duration;

use super::transaction::Transaction;
use super::upload::small_pack;
use super::{Filled, Packed, Request, machine};
use crate::format::keys::PackId;
use crate::format::manifest::{Facts, Manifest, PackedFrame, Run};
use crate::format::record::{PackRef, Statistics};
use crate::store::Store;
use crate::{Error, File, FileKind, PAGE_SIZE};

/// Every pack that was made, by id: what a footer would tell.
pub(crate) type Packs = parking_lot::Mutex<BTreeMap<PackId, (PackRef, PackedFrame)>>;

/// Packs, for as long as `work`, one own page and one page of every pack of the parents that may be referred to.
pub(crate) async fn pack(
    store: &Store,
    request: &Request,
    content: &[u8; PAGE_SIZE],
    work: Duration,
    made: &Packs,
) -> Result<Packed, Error> {
    let mut transaction = Transaction::new(store, request)?;
    while let Some(step) = transaction.next() {
        if step == machine::Request::Store {
            tokio::time::sleep(work).await;
            let filled = fill(&transaction, store, content, made).await;
            transaction.stored(filled).await;
        } else {
            transaction.carry_out(step).await;
        }
    }
    transaction.end()
}

async fn fill(
    transaction: &Transaction<'_>,
    store: &Store,
    content: &[u8; PAGE_SIZE],
    made: &Packs,
) -> Result<Filled, Error> {
    let id = PackId { txn: transaction.id(), number: 0 };
    let (own, frame, object) = small_pack(id, content)?;
    store.objects().create(&id.key(), &object).await?;
    made.lock().insert(id, (own.clone(), frame));
    let (mut packs, mut frames) = (vec![own], vec![frame]);
    let parents = transaction.parents().iter().flat_map(|commit| &commit.packs);
    for pack in parents.filter(|pack| transaction.may_refer_to(&pack.pack)) {
        if !packs.contains(pack)
            && let Some((reference, frame)) = made.lock().get(&pack.pack)
        {
            let number = u32::try_from(packs.len()).unwrap_or(u32::MAX);
            packs.push(reference.clone());
            frames.push(PackedFrame { pack: number, ..*frame });
        }
    }
    let pages = u32::try_from(frames.len()).unwrap_or(u32::MAX);
    let runs = (0..pages).map(|at| Run { first_page: at, pages: 1, frame: at, position: 0 });
    let size = u64::from(pages) * PAGE_SIZE as u64;
    let file = File { name: "memory".into(), kind: FileKind::Memory, size };
    let statistics = Statistics {
        pages: pages.into(),
        unique_pages: 1,
        duplicate_pages: u64::from(pages) - 1,
        ..Statistics::default()
    };
    let manifest = Manifest {
        snapshot: transaction.id(),
        facts: Facts::default(),
        packs: packs.iter().map(|pack| (pack.pack, pack.bytes)).collect(),
        frames,
        files: vec![(file, runs.collect())],
    };
    Ok(Filled { manifest, statistics, packs, parents: Vec::new() })
}
