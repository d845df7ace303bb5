//! What a prepared snapshot keeps in the node's cache while it is prepared: the frames of its working set,
//! and all of it where it is warmed.

use std::sync::Arc;

use parking_lot::Mutex;
use reap_store::{Error, Kept, Name, Node, Snapshot, WorkingSet};

/// Dropping it lets the frames go like any others.
#[derive(Default)]
pub(super) struct KeptFrames {
    working_set: Mutex<WorkingSetFrames>,
    _whole: Option<Kept>,
}

#[derive(Default)]
enum WorkingSetFrames {
    #[default]
    None,
    Kept(#[expect(dead_code, reason = "held for its pins")] Arc<Kept>),
    /// Why not.
    Refused(String),
}

impl KeptFrames {
    /// Pins all frames of the snapshot, and brings them before it returns.
    pub(super) async fn warm(name: &Name, snapshot: &Arc<Snapshot>) -> Result<Self, Error> {
        let whole = Kept::snapshot(snapshot)?;
        let filled = whole.fill().await?;
        tracing::info!(
            "{name} is in the cache: {} frames, {} bytes, of which {} came from the store",
            filled.frames,
            filled.bytes,
            filled.brought_bytes
        );
        Ok(Self { working_set: Mutex::default(), _whole: Some(whole) })
    }

    /// Pins the frames of a working set in place of an earlier one's, and brings them, which nobody waits
    /// for. Where they cannot be kept the set is used without, and [`Self::warning`] says so.
    pub(super) fn keep(&self, node: &Node, set: &Arc<WorkingSet>) {
        // The earlier one first: both might be too much.
        *self.working_set.lock() = WorkingSetFrames::None;
        *self.working_set.lock() = match Kept::working_set(set).map(Arc::new) {
            Ok(kept) => {
                node.spawn(fill(kept.clone()));
                WorkingSetFrames::Kept(kept)
            }
            Err(error) => {
                tracing::warn!("{error}");
                WorkingSetFrames::Refused(error.to_string())
            }
        };
    }

    /// Why the working set is not kept, if it is not.
    pub(super) fn warning(&self) -> Option<String> {
        match &*self.working_set.lock() {
            WorkingSetFrames::Refused(why) => Some(why.clone()),
            WorkingSetFrames::None | WorkingSetFrames::Kept(_) => None,
        }
    }
}

async fn fill(kept: Arc<Kept>) {
    if let Err(error) = kept.fill().await {
        tracing::warn!("not all of a working set is in the cache: {error}");
    }
}
