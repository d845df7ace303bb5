//! What a node keeps in its disk cache: frames that are pinned there, and brought there ahead of need.

use std::sync::Arc;

use crate::fetch::disk::{DiskCache, PinnedFrames};
use crate::fetch::{Fetcher, FrameSpec};
use crate::{Error, Snapshot, WorkingSet};

/// Stored bytes that are asked for at once: a few long requests, and less than the cache's writer may be
/// behind.
const BATCH_BYTES: u64 = 32 << 20;
/// How often frames are brought that the cache did not keep: its writer is everybody's, and drops what it
/// cannot take.
const TRIES: usize = 3;

/// Frames that stay in the disk cache while this lives. A local store is read in place: then there is
/// nothing to keep, and every call succeeds at once.
pub struct Kept {
    fetcher: Fetcher,
    what: What,
    _pinned: Option<PinnedFrames>,
}

enum What {
    WorkingSet(Arc<WorkingSet>),
    Snapshot(Arc<Snapshot>),
}

/// What [`Kept::fill`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Filled {
    /// Frames that are kept.
    pub frames: u64,
    /// Their stored bytes.
    pub bytes: u64,
    /// Of these, what had to be asked of the store.
    pub brought_bytes: u64,
}

impl Kept {
    /// Pins all frames of a working set.
    ///
    /// [`Refused`](crate::ErrorKind::Refused) where all pins together would be over half of the cache.
    pub fn working_set(set: &Arc<WorkingSet>) -> Result<Self, Error> {
        let fetcher = set.snapshot().fetcher().clone();
        Self::new(fetcher, What::WorkingSet(set.clone()))
    }

    /// Pins all frames of a snapshot; errors as for [`Kept::working_set`].
    pub fn snapshot(snapshot: &Arc<Snapshot>) -> Result<Self, Error> {
        Self::new(snapshot.fetcher().clone(), What::Snapshot(snapshot.clone()))
    }

    fn new(fetcher: Fetcher, what: What) -> Result<Self, Error> {
        let pin = |disk: &DiskCache| disk.pin(&what.name(), what.specs());
        let pinned = fetcher.disk().map(pin).transpose()?;
        Ok(Self { fetcher, what, _pinned: pinned })
    }

    /// Brings what is not in the cache yet, at the lower urgency, each frame verified. Fails where a frame
    /// cannot be had, or there is no room for it.
    pub async fn fill(&self) -> Result<Filled, Error> {
        let mut filled = Filled::default();
        let Some(disk) = self.fetcher.disk() else { return Ok(filled) };
        for spec in self.what.specs() {
            filled.frames += 1;
            filled.bytes += u64::from(spec.entry.stored_bytes);
        }
        for _ in 0..TRIES {
            let (_, missing) = disk.plan(self.what.specs());
            if missing.is_empty() {
                return Ok(filled);
            }
            for batch in batches(&missing) {
                filled.brought_bytes += self.bring(batch).await?;
                self.wait_for_writer().await?;
            }
        }
        let (_, missing) = disk.plan(self.what.specs());
        match missing.len() {
            0 => Ok(filled),
            count => {
                let text = format!(
                    "{count} of its frames found no room in the cache: its disk is full, or at --cache-free-floor"
                );
                Err(Error::refused(self.what.name(), text))
            }
        }
    }

    /// Answers with the stored bytes that it asked for.
    async fn bring(&self, frames: &[FrameSpec]) -> Result<u64, Error> {
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        let wanted = frames.iter().enumerate().map(|(number, spec)| (*spec, number));
        // A snapshot that is prepared is soon restored: its set is wanted now.
        let soon = matches!(self.what, What::WorkingSet(_));
        self.fetcher.fill(
            wanted,
            soon,
            &(Arc::new(move |_, frame: Result<_, Error>| {
                // A receiver that is gone has had its error.
                sender.send(frame.map(|_| ())).unwrap_or_default();
            }) as _),
        );
        while let Some(came) = receiver.recv().await {
            came?;
        }
        Ok(frames.iter().map(|spec| u64::from(spec.entry.stored_bytes)).sum())
    }

    async fn wait_for_writer(&self) -> Result<(), Error> {
        let fetcher = self.fetcher.clone();
        let waited = tokio::task::spawn_blocking(move || fetcher.disk().map(DiskCache::wait)).await;
        waited.map(|_| ()).map_err(|error| Error::local("waiting for the cache", error))
    }
}

impl What {
    fn name(&self) -> String {
        match self {
            Self::WorkingSet(set) => {
                format!("working set {} of {}", set.sequence(), set.snapshot().id())
            }
            Self::Snapshot(snapshot) => snapshot.id().to_string(),
        }
    }

    fn specs(&self) -> Vec<FrameSpec> {
        match self {
            Self::WorkingSet(set) => set.specs().collect(),
            Self::Snapshot(snapshot) => snapshot.all_specs().to_vec(),
        }
    }
}

/// `frames` in slices of [`BATCH_BYTES`].
fn batches(mut frames: &[FrameSpec]) -> impl Iterator<Item = &[FrameSpec]> {
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let count = frames.iter().take_while(|spec| {
            bytes += u64::from(spec.entry.stored_bytes);
            bytes <= BATCH_BYTES
        });
        let (batch, rest) = frames.split_at(count.count().max(1).min(frames.len()));
        frames = rest;
        (!batch.is_empty()).then_some(batch)
    })
}
