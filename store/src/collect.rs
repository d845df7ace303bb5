//! Collection: deletes what no snapshot needs, while packers pack and readers read.
//!
//! [`machine`] decides and does no I/O; `run.rs` carries out what it asks for; `crate::probe` finds out whether
//! the store can be trusted with it. The protocol is in `docs/FORMAT.md`.

mod machine;
#[cfg(test)]
mod model;
mod run;
mod tidy;

use std::time::Duration;

use serde::Serialize;

use crate::format::{keys, record};
use crate::objects::Objects;
use crate::store::Store;
use crate::{Error, ErrorKind, SnapshotId};

/// How to collect.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Find out what would go, write and delete nothing.
    pub dry_run: bool,
    /// Also where so much would go that it looks like a mistake.
    pub confirmed: bool,
    /// A packer that did not renew its lease for so long is gone, by the store's clock. If it is not, its
    /// pack fails and can be started again; nothing is lost.
    pub lease_timeout: Duration,
}

/// A packer renews its lease every 30 s: one that missed ten renewals is gone.
pub const LEASE_TIMEOUT: Duration = Duration::from_secs(300);

/// What a run did or, dry, would do.
#[derive(Clone, Debug, Serialize)]
pub struct Collected {
    /// The run.
    pub run: SnapshotId,
    /// Snapshots that exist or are served from.
    pub live_snapshots: u64,
    /// Bytes of all packs before the run.
    pub pack_bytes: u64,
    /// What went, or would go.
    pub garbage: Vec<GarbageObject>,
    /// Whether it is gone.
    pub deleted: bool,
}

/// An object that nobody needs.
#[derive(Clone, Debug, Serialize)]
pub struct GarbageObject {
    /// Its key.
    pub key: String,
    /// Its length.
    pub bytes: u64,
    /// Why nobody needs it.
    pub reason: &'static str,
}

impl Collected {
    /// Bytes of all garbage.
    pub fn garbage_bytes(&self) -> u64 {
        self.garbage.iter().map(|object| object.bytes).sum()
    }
}

/// Stops all collection of this store until a person looks: an object is gone that a live snapshot refers to.
pub(crate) async fn halt(objects: &Objects, missing: &str) {
    tracing::error!("{missing} is gone: nothing more is collected until {} is deleted", keys::HALT);
    let halt = record::Halt { missing: missing.to_owned(), written_unix_ms: record::now_unix_ms() };
    match objects.create(keys::HALT, &[record::seal(&halt).into()]).await {
        Err(error) if error.kind() != ErrorKind::Exists => {
            tracing::error!("collection cannot be halted: {error}");
        }
        _ => {}
    }
}

/// Deletes what no live snapshot, pinned snapshot or packer at work needs.
///
/// Any number of these may run anywhere, and be killed anywhere. An error before the first deletion means
/// that nothing was deleted: of kind [`Refused`](crate::ErrorKind::Refused) where the store, a listing or
/// the amount calls for a person, [`Damaged`](crate::ErrorKind::Damaged) where an object is missing or wrong.
pub async fn collect(store: &Store, options: Options) -> Result<Collected, Error> {
    run::run(store, options).await
}

/// A whole run of the collector over listings of these keys, in which every transaction was given up; how
/// many it would delete.
#[cfg(feature = "fuzzing")]
pub(crate) fn fuzz_listings(keys: &[(String, u64)]) -> Result<usize, String> {
    use machine::{Answer, Collector, Fate, Request};
    let mut collector = Collector::new();
    while let Some(request) = collector.next() {
        let aborted = |txns: std::collections::BTreeSet<SnapshotId>| {
            Answer::Fates(txns.into_iter().map(|txn| (txn, Fate::Aborted)).collect())
        };
        let answer = match request {
            Request::List(kind) => {
                let under = |(key, _): &&(String, u64)| key.split('/').next() == Some(kind);
                Answer::Listed(keys.iter().filter(under).cloned().collect())
            }
            Request::Fates(txns) | Request::Settle { txns, .. } => aborted(txns),
            Request::OwnCondemned => Answer::There(true),
            Request::Condemn(_) | Request::Delete(_) | Request::Release => Answer::Done,
        };
        collector.take(answer)?;
    }
    Ok(collector.deleted().len())
}
