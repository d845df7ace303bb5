//! What packers on this node leave for its cache: their packs, as they were uploaded.
//!
//! The cache's directory is its owner's alone, which need not run. So a packer writes to
//! `incoming/<txn>.part/`, holding a lock there, and renames that to `incoming/<txn>/` when its snapshot
//! exists; the owner appends the frames to its segments, now or when it starts. What a killed packer left
//! is deleted. The bytes are verified where they are used, like all that the cache holds.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;

use super::{FRAMES, Limits, read_at};
use crate::format::frame::FrameEntry;
use crate::format::keys::PackId;
use crate::format::pack::{self, TRAILER_BYTES};
use crate::{Error, SnapshotId};

const INCOMING: &str = "incoming";
const PART: &str = ".part";
const LOCK: &str = "lock";
/// Says to packers how large the cache may be.
const LIMITS: &str = "limits";
const MAX_LIMITS_BYTES: u64 = 4096;
/// Packers leave at most this part of the cache's bytes, because the owner need not run.
const LARGEST_PART: u64 = 4;
/// Longest pack that is taken over. Packers close theirs at half of it.
const MAX_PACK_BYTES: u64 = 64 << 20;
/// A directory without an owner is deleted only when it is so old: a packer makes it and then takes its lock.
const ABANDONED_AFTER: Duration = Duration::from_secs(60);

/// A packer that leaves its packs. Dropping it deletes them.
pub(crate) struct Leaving {
    incoming: PathBuf,
    txn: SnapshotId,
    limits: Limits,
    left_bytes: u64,
    /// There is no more room, or the disk failed.
    stopped: bool,
    /// Held for its lock.
    _lock: File,
}

impl Leaving {
    /// `cache_dir` is what the node's reader was started with.
    pub(crate) fn begin(cache_dir: &Path, txn: SnapshotId) -> Result<Self, Error> {
        let frames = cache_dir.join(FRAMES);
        let limits = read_limits(&frames.join(LIMITS)).ok_or_else(|| {
            let text = "is no cache of a remote store: give the directory that reapd was started with as --cache, after its first start";
            Error::invalid(cache_dir.display(), text)
        })?;
        let incoming = frames.join(INCOMING);
        let part = part(&incoming, txn);
        let local = |error| Error::local(part.display(), error);
        std::fs::create_dir_all(&part).map_err(local)?;
        let lock = File::create(part.join(LOCK)).map_err(local)?;
        lock.lock().map_err(local)?;
        Ok(Self { incoming, txn, limits, left_bytes: 0, stopped: false, _lock: lock })
    }

    /// Leaves a pack, if there is room. Packing goes on without the cache where there is none.
    pub(crate) fn leave(&mut self, id: PackId, bytes: u64, chunks: &[Bytes]) {
        if self.stopped {
            return;
        }
        let room = self.limits.bytes / LARGEST_PART;
        let free = super::free(&self.incoming);
        if bytes_below(&self.incoming) + bytes > room
            || free < self.limits.free_floor.saturating_add(bytes)
        {
            tracing::info!(
                "{}: no more room for the packs of {}",
                self.incoming.display(),
                self.txn
            );
            self.stopped = true;
            return;
        }
        let path = part(&self.incoming, self.txn).join(id.to_string());
        let written = File::create_new(&path)
            .and_then(|mut file| chunks.iter().try_for_each(|chunk| file.write_all(chunk)));
        match written {
            Ok(()) => self.left_bytes += bytes,
            Err(error) => {
                tracing::warn!("{}: not left for the cache: {error}", path.display());
                std::fs::remove_file(&path).unwrap_or_default();
                self.stopped = true;
            }
        }
    }

    /// The snapshot exists: hands the packs over. Answers with their bytes.
    pub(crate) fn hand_over(self) -> u64 {
        let (part, whole) =
            (part(&self.incoming, self.txn), self.incoming.join(self.txn.to_string()));
        match std::fs::rename(&part, &whole) {
            Ok(()) => self.left_bytes,
            Err(error) => {
                tracing::warn!("{}: not left for the cache: {error}", part.display());
                0
            }
        }
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        // Not there any more when it was handed over.
        std::fs::remove_dir_all(part(&self.incoming, self.txn)).unwrap_or_default();
    }
}

fn part(incoming: &Path, txn: SnapshotId) -> PathBuf {
    incoming.join(format!("{txn}{PART}"))
}

fn read_limits(path: &Path) -> Option<Limits> {
    (std::fs::metadata(path).ok()?.len() <= MAX_LIMITS_BYTES).then_some(())?;
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Makes the place where packers leave packs for the cache in `frames`.
pub(super) fn prepare(frames: &Path, limits: Limits) -> std::io::Result<()> {
    std::fs::create_dir_all(frames.join(INCOMING))?;
    let new = frames.join("limits.new");
    std::fs::write(&new, serde_json::to_vec(&limits)?)?;
    std::fs::rename(new, frames.join(LIMITS))
}

/// A pack that was left.
pub(super) struct LeftPack {
    pub(super) id: PackId,
    path: PathBuf,
}

impl LeftPack {
    /// Its file and the frames in it.
    pub(super) fn open(&self) -> Result<(File, Vec<FrameEntry>), String> {
        let text = |error: std::io::Error| error.to_string();
        let file = File::open(&self.path).map_err(text)?;
        let bytes = file.metadata().map_err(text)?.len();
        let trailer_at = bytes.checked_sub(TRAILER_BYTES as u64).ok_or("it is too short")?;
        if bytes > MAX_PACK_BYTES {
            return Err("it is too long".into());
        }
        let mut trailer = [0; TRAILER_BYTES];
        file.read_exact_at(&mut trailer, trailer_at).map_err(text)?;
        let footer = pack::footer_range(&trailer, bytes).map_err(|error| error.to_string())?;
        let too_long = |_| "it is too long";
        let from = u32::try_from(footer.start).map_err(too_long)?;
        let length = u32::try_from(bytes - footer.start).map_err(too_long)?;
        let bytes = read_at(&file, from, length).map_err(text)?;
        let footer = pack::read_footer(self.id, footer.start, &bytes);
        Ok((file, footer.map_err(|error| error.to_string())?.frames))
    }

    /// Deletes it, with its directory after the last.
    pub(super) fn delete(&self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!("{}: {error}", self.path.display());
        }
    }
}

/// Looks at what was left in `frames`: all bytes there, and the next pack to take over. Deletes what has no
/// owner any more.
pub(super) fn look(frames: &Path) -> (u64, Option<LeftPack>) {
    let incoming = frames.join(INCOMING);
    let mut next = None;
    for (name, directory) in entries(&incoming) {
        let (txn, is_part) = match name.strip_suffix(PART) {
            Some(txn) => (txn, true),
            None => (&*name, false),
        };
        if txn.parse::<SnapshotId>().is_err() {
            continue;
        }
        let packs = || entries(&directory).into_iter();
        let pack = packs().find_map(|(name, path)| Some(LeftPack { id: name.parse().ok()?, path }));
        let is_done = if is_part { is_abandoned(&directory) } else { pack.is_none() };
        if is_done {
            std::fs::remove_dir_all(&directory).unwrap_or_default();
        } else if !is_part && next.is_none() {
            next = pack;
        }
    }
    (bytes_below(&incoming), next)
}

fn is_abandoned(part: &Path) -> bool {
    let made = std::fs::metadata(part).and_then(|part| part.modified());
    let old = made.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > ABANDONED_AFTER));
    let lock = File::open(part.join(LOCK));
    // Its packer holds the lock until it ends, however it ends.
    old && lock.map_or(true, |lock| lock.try_lock().is_ok())
}

fn bytes_below(incoming: &Path) -> u64 {
    let files = entries(incoming).into_iter().flat_map(|(_, directory)| entries(&directory));
    files.filter_map(|(_, path)| Some(std::fs::metadata(path).ok()?.len())).sum()
}

/// Names and paths of what a directory holds; nothing where it cannot be read.
fn entries(directory: &Path) -> Vec<(String, PathBuf)> {
    let found = std::fs::read_dir(directory).into_iter().flatten().flatten();
    found.map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TXN: SnapshotId = SnapshotId::from_bytes([5; 16]);

    fn cache(limit: u64) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("temporary directory");
        prepare(&directory.path().join(FRAMES), Limits { bytes: limit, free_floor: 0 })
            .expect("made");
        directory
    }

    fn leave(leaving: &mut Leaving, number: u32, bytes: usize) {
        let chunk = Bytes::from(vec![1; bytes]);
        leaving.leave(PackId { txn: TXN, number }, bytes as u64, &[chunk]);
    }

    #[test]
    fn packs_are_handed_over_whole_or_not_at_all() {
        let cache = cache(1 << 20);
        let frames = cache.path().join(FRAMES);
        let mut leaving = Leaving::begin(cache.path(), TXN).expect("begins");
        leave(&mut leaving, 0, 1000);
        let (bytes, next) = look(&frames);
        assert!(bytes == 1000 && next.is_none(), "its packer is at work");
        drop(leaving);
        assert_eq!(look(&frames).0, 0, "the packing failed");

        let mut leaving = Leaving::begin(cache.path(), TXN).expect("begins");
        leave(&mut leaving, 0, 1000);
        assert_eq!(leaving.hand_over(), 1000);
        let (bytes, next) = look(&frames);
        let next = next.expect("a pack");
        assert_eq!((bytes, next.id), (1000, PackId { txn: TXN, number: 0 }));
        assert!(next.open().is_err(), "it is no pack");
        next.delete();
        assert!(look(&frames).1.is_none());
        assert_eq!(
            entries(&frames.join(INCOMING)),
            vec![],
            "the directory goes with its last pack"
        );
    }

    #[test]
    fn packers_leave_no_more_than_their_part() {
        let cache = cache(100_000);
        let mut leaving = Leaving::begin(cache.path(), TXN).expect("begins");
        leave(&mut leaving, 0, 20_000);
        leave(&mut leaving, 1, 6_000);
        leave(&mut leaving, 2, 1);
        assert_eq!(leaving.hand_over(), 20_000);
    }

    #[test]
    fn what_a_killed_packer_left_goes_and_a_slow_one_keeps_it() {
        let cache = cache(1 << 20);
        let frames = cache.path().join(FRAMES);
        let mut leaving = Leaving::begin(cache.path(), TXN).expect("begins");
        leave(&mut leaving, 0, 1000);
        let directory = part(&leaving.incoming, TXN);
        let hour_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
        File::open(&directory).expect("opens").set_modified(hour_ago).expect("is set");
        assert_eq!(look(&frames).0, 1000, "its packer lives");
        // As a kill does: the lock goes, the files stay.
        leaving._lock.unlock().expect("unlocked");
        std::mem::forget(leaving);
        assert_eq!(look(&frames).0, 0);
        assert!(!directory.exists());
    }

    #[test]
    fn a_directory_that_is_no_cache_is_refused() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let refused = Leaving::begin(directory.path(), TXN).err().expect("is refused");
        assert_eq!(refused.kind(), crate::ErrorKind::Invalid);
        assert!(!directory.path().join(FRAMES).exists(), "and nothing is made there");
    }
}
