//! A packer's lease: tells collectors that the transaction's packs are not garbage yet.

use std::time::Duration;

use tokio::task::JoinHandle;

use crate::format::{keys, record};
use crate::store::Store;
use crate::{Error, SnapshotId};

/// Rewritten this often; part of the protocol.
const RENEWAL: Duration = Duration::from_secs(30);

/// A lease that is renewed until it is dropped or ended.
pub(super) struct Lease {
    store: Store,
    txn: SnapshotId,
    renewal: JoinHandle<()>,
}

impl Lease {
    /// Takes a lease; it is in the store when this returns.
    pub(super) async fn take(store: &Store, txn: SnapshotId) -> Result<Self, Error> {
        write(store, txn).await?;
        let renewing = store.clone();
        let renewal = tokio::spawn(async move {
            loop {
                tokio::time::sleep(RENEWAL).await;
                if let Err(error) = write(&renewing, txn).await {
                    // The commit decides: a collector that gave us up has left an abort there.
                    tracing::warn!("lease {txn} is not renewed: {error}");
                }
            }
        });
        Ok(Self { store: store.clone(), txn, renewal })
    }

    /// Gives it up. A lease that stays goes stale, and a collector clears it away.
    pub(super) async fn release(mut self) {
        self.renewal.abort();
        // Not before the renewal is over: it could write the lease again.
        let renewal = (&mut self.renewal).await;
        debug_assert!(renewal.is_err(), "the renewal never ends by itself");
        delete(&self.store, self.txn).await;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // A packer that ends without releasing leaves its lease to go stale.
        self.renewal.abort();
    }
}

pub(super) async fn delete(store: &Store, txn: SnapshotId) {
    if let Err(error) = store.objects().delete(&keys::lease(txn)).await {
        tracing::warn!("lease {txn} is not deleted: {error}");
    }
}

async fn write(store: &Store, txn: SnapshotId) -> Result<(), Error> {
    let marker = record::seal(&store.marker(txn, txn));
    store.objects().overwrite(&keys::lease(txn), marker).await
}
