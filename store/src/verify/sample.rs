//! A random share of the frames: which, and reading them.

use std::collections::{BTreeMap, HashSet};

use futures::StreamExt;
use serde::Serialize;

use super::{Findings, Level, Options, Progress, is_finding};
use crate::Error;
use crate::format::frame::{self, FrameEntry};
use crate::format::keys::PackId;
use crate::format::manifest::Manifest;

/// Frames that are read at the same time.
const PARALLEL_FRAMES: usize = 16;

/// How much of the packs to read.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Share {
    /// Each frame with this probability, in percent.
    Percent(f64),
    /// As many frames as have this many stored bytes.
    Bytes(u64),
}

/// Frames are ranked by a hash of seed and place, so that a frame that many snapshots refer to is one
/// frame, and its rank needs no memory. The lowest ranks are read.
pub(super) struct Sample {
    seed: u64,
    picks: bool,
    /// Ranks from here on are not picked.
    below: u64,
    most_bytes: u64,
    bytes: u64,
    picked: BTreeMap<(u64, PackId, u64), FrameEntry>,
    seen: HashSet<u64>,
}

impl Sample {
    pub(super) fn new(options: &Options) -> Self {
        let (below, most_bytes) = match options.share {
            // Saturates at all of them.
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "a share of all ranks, which saturates at none and at all"
            )]
            Share::Percent(percent) => ((percent / 100.0 * u64::MAX as f64) as u64, u64::MAX),
            Share::Bytes(bytes) => (u64::MAX, bytes),
        };
        Self {
            seed: options.seed,
            picks: options.level == Level::Sample,
            below,
            most_bytes,
            bytes: 0,
            picked: BTreeMap::new(),
            seen: HashSet::new(),
        }
    }

    /// Distinct frames so far.
    pub(super) fn seen(&self) -> u64 {
        self.seen.len() as u64
    }

    /// Picks among the frames of a snapshot.
    pub(super) fn offer(&mut self, manifest: &Manifest) {
        for packed in &manifest.frames {
            let (pack, _) = manifest.packs[packed.pack as usize];
            let rank = self.rank(pack, packed.entry.offset);
            if self.seen.insert(rank) && self.picks && rank < self.below {
                self.picked.insert((rank, pack, packed.entry.offset), packed.entry);
                self.bytes += u64::from(packed.entry.stored_bytes);
                self.shed();
            }
        }
    }

    fn shed(&mut self) {
        while self.bytes > self.most_bytes && self.picked.len() > 1 {
            if let Some((_, entry)) = self.picked.pop_last() {
                self.bytes -= u64::from(entry.stored_bytes);
            }
        }
    }

    fn rank(&self, pack: PackId, offset: u64) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.seed.to_le_bytes()).update(pack.txn.as_bytes());
        hasher.update(&pack.number.to_le_bytes()).update(&offset.to_le_bytes());
        let hash = hasher.finalize();
        hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

impl Findings<'_> {
    /// Reads the frames that were picked.
    pub(super) async fn check_sample(
        &mut self,
        sample: Sample,
        progress: &mut (dyn FnMut(Progress) + Send),
    ) -> Result<(), Error> {
        self.report.frames_referred = sample.seen();
        let mut at = Progress { done_bytes: 0, total_bytes: sample.bytes };
        let store = self.store;
        let readable = |pack: &PackId| !self.needed.get(pack).is_some_and(|one| one.is_lost);
        let picked: Vec<_> = sample
            .picked
            .into_iter()
            .map(|((_, pack, _), entry)| (pack, entry))
            .filter(|(pack, _)| readable(pack))
            .collect();
        let mut read = futures::stream::iter(picked)
            .map(|(pack, entry)| async move {
                let range = entry.offset..entry.end();
                let stored = store.objects().get_range(&pack.key(), range).await;
                let decoded = match stored {
                    Ok(stored) => decode(pack, entry, stored).await?,
                    Err(error) => Err(error),
                };
                Ok::<_, Error>((pack, entry, decoded))
            })
            .buffer_unordered(PARALLEL_FRAMES);
        while let Some(read) = read.next().await {
            let (pack, entry, decoded) = read?;
            at.done_bytes += u64::from(entry.stored_bytes);
            progress(at);
            match decoded {
                Ok(()) => {
                    self.report.frames += 1;
                    self.report.bytes += u64::from(entry.stored_bytes);
                }
                Err(error) if is_finding(&error) => self.pack_finding(pack, &error).await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Whether these are the bytes of the frame.
async fn decode(
    pack: PackId,
    entry: FrameEntry,
    stored: bytes::Bytes,
) -> Result<Result<(), Error>, Error> {
    let decoded = tokio::task::spawn_blocking(move || frame::decode(&entry, &stored)).await;
    let decoded = decoded.map_err(|error| Error::local(pack.key(), error))?;
    let object = || format!("{} at {}", pack.key(), entry.offset);
    Ok(decoded.map(|_| ()).map_err(|why| Error::damaged(object(), why)))
}
