//! Every bit of every object of small stores flipped, and every object cut at every length: all of it is
//! noticed, and no wrong byte is ever read. The stores are the golden ones, with one more object of each
//! kind that they have not.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use object_store::ObjectStoreExt;
use object_store::memory::InMemory;
use tokio::runtime::Runtime;

use super::{Level, Options, Report, verify};
use crate::fetch::Fetcher;
use crate::format::frame::{self, FrameEntry};
use crate::format::keys;
use crate::format::record::{self, Abort, Condemned, Decision, Halt, Marker, StoreRecord};
use crate::format::working_set;
use crate::objects::Objects;
use crate::store::{Store, read_record};
use crate::workers::Workers;
use crate::{Error, FrameIndex, Snapshot, SnapshotId, Urgency};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data");

/// A store in memory, and whatever reads it.
struct Specimen {
    memory: Arc<InMemory>,
    store: Store,
    fetcher: Fetcher,
    good: BTreeMap<String, Bytes>,
    /// For each pack the snapshot that refers to the fewest others, and its frames in the pack, decoded.
    packs: BTreeMap<String, (SnapshotId, BTreeMap<FrameIndex, Vec<u8>>)>,
    runtime: Runtime,
}

/// What came of damage.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Noticed,
    /// No level of verification says anything.
    Unnoticed,
    /// Nor need it: the same bytes come out. A few bits of a zstd frame mean nothing, and the frames of a
    /// working set of version 1 are hashed decoded. Packs have such bits too, but are hashed whole.
    Harmless,
}

impl Specimen {
    fn new(golden: &Path) -> Self {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_time().build().expect("runtime");
        let memory = Arc::new(InMemory::new());
        let store = Store::over(Objects::over(memory.clone()));
        let workers = Workers::new(1).expect("threads");
        // Nothing is remembered: each read comes from the store.
        let fetcher =
            Fetcher::new(store.objects().clone(), runtime.handle().clone(), workers, None, 0, 0);
        let mut good = BTreeMap::new();
        read_files(golden, golden, &mut good);
        good.extend(more_objects());
        let mut specimen = Self { memory, store, fetcher, good, packs: BTreeMap::new(), runtime };
        for (key, object) in specimen.good.clone() {
            specimen.put(&key, object);
        }
        specimen.find_packs();
        specimen
    }

    fn find_packs(&mut self) {
        let ids = self.runtime.block_on(self.store.ids()).expect("listed");
        // The transaction that was given up has none.
        let commits =
            ids.iter().filter_map(|id| self.runtime.block_on(self.store.commit(*id)).ok());
        let mut commits: Vec<_> = commits.collect();
        commits.sort_by_key(|commit| commit.packs.len());
        for commit in commits {
            for pack in commit.packs {
                let key = pack.pack.key();
                if !self.packs.contains_key(&key) {
                    let frames = self.read(commit.snapshot, &key, usize::MAX);
                    let frames = frames.expect("is good").into_iter();
                    let frames = frames.map(|(index, frame)| (index, frame.expect("is good")));
                    let frames = frames.collect();
                    self.packs.insert(key, (commit.snapshot, frames));
                }
            }
        }
    }

    fn put(&self, key: &str, object: Bytes) {
        let path = object_store::path::Path::from(key);
        self.runtime.block_on(self.memory.put(&path, object.into())).expect("memory takes it");
    }

    /// The frames of a snapshot in the first bytes of one pack, through the fetch path.
    fn read(
        &self,
        id: SnapshotId,
        pack: &str,
        pack_bytes: usize,
    ) -> Result<BTreeMap<FrameIndex, Result<Vec<u8>, Error>>, Error> {
        self.runtime.block_on(async {
            let (commit, manifest) = self.store.read_snapshot(id).await?;
            let snapshot = Arc::new(Snapshot::new(self.fetcher.clone(), commit, manifest));
            let mut wanted: Vec<_> = (0..snapshot.frame_count()).map(FrameIndex).collect();
            let in_pack = |frame: &FrameIndex| {
                let place = snapshot.packed_frame(*frame);
                place.is_some_and(|(packed, entry)| {
                    packed.key() == pack && entry.offset < pack_bytes as u64
                })
            };
            wanted.retain(in_pack);
            let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
            snapshot.fetch(&wanted, Urgency::Demand, move |index, frame| {
                sender.send((index, frame)).unwrap_or_default();
            });
            let mut frames = BTreeMap::new();
            while let Some((index, frame)) = receiver.recv().await {
                let bytes = frame.map(|frame| frame.pages(0, frame.page_count()).to_vec());
                frames.insert(index, bytes);
            }
            Ok(frames)
        })
    }

    /// Puts damaged bytes in an object's place, and looks at the store as everybody does.
    fn damage(&self, key: &str, bytes: Vec<u8>) -> Outcome {
        let bytes = Bytes::from(bytes);
        let length = bytes.len();
        self.put(key, bytes.clone());
        let verified = self.runtime.block_on(self.verify(key));
        // Only packs hold bytes of guests: what the others say is compared by hashes before it is used.
        // A range that is not there at all is answered by every kind of store with an error.
        if let Some((id, good)) = self.packs.get(key) {
            let read = self.read(*id, key, length).expect("its records are good");
            assert!(read.len() == good.len() || length < self.good[key].len());
            for (index, read) in read {
                assert!(read.map_or(true, |bytes| bytes == good[&index]), "{key}: wrong bytes");
            }
        }
        self.put(key, self.good[key].clone());
        match verified {
            Err(error) => {
                assert!(super::is_finding(&error), "{key}: {error:?}");
                Outcome::Noticed
            }
            Ok(report) if report.problems.len() + report.warnings.len() > 0 => Outcome::Noticed,
            Ok(_) if key.starts_with("ws/") && is_same(&self.good[key], &bytes) => {
                Outcome::Harmless
            }
            Ok(_) => Outcome::Unnoticed,
        }
    }

    /// As deeply as this object needs: what is in packs is seen by reading them, all else but frames of
    /// working sets without.
    async fn verify(&self, key: &str) -> Result<Report, Error> {
        read_record::<StoreRecord>(self.store.objects(), keys::FORMAT).await?;
        let ids = match self.packs.get(key) {
            Some((id, _)) => vec![*id],
            None => self.store.ids().await?,
        };
        let level = match key.split('/').next() {
            Some("pack" | "ws") => Level::Everything,
            _ => Level::Structure,
        };
        let whole_store = !self.packs.contains_key(key);
        let options = Options { level, whole_store, ..Options::everything() };
        verify(&self.store, &ids, &options, &mut |_| {}).await
    }
}

/// Whether a working set of version 1 has the same header, and the same pages come out of its frames.
fn is_same(good: &[u8], bytes: &[u8]) -> bool {
    let end = working_set::header_end(good).expect("a good header");
    let end = usize::try_from(end).expect("a short header");
    let header = working_set::decode(&good[..end], good.len() as u64).expect("a good header");
    let pages = |object: &[u8], entry: &FrameEntry| {
        let from = usize::try_from(entry.offset).expect("a short object");
        frame::decode(entry, &object[from..from + entry.stored_bytes as usize]).expect("decodes")
    };
    let same = |frame: &working_set::WorkingSetFrame| {
        pages(good, &frame.entry) == pages(bytes, &frame.entry)
    };
    good[7] == 1
        && good.len() == bytes.len()
        && good[..end] == bytes[..end]
        && header.frames.iter().all(same)
}

fn read_files(root: &Path, directory: &Path, files: &mut BTreeMap<String, Bytes>) {
    for entry in std::fs::read_dir(directory).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            read_files(root, &path, files);
        } else {
            let key = path.strip_prefix(root).expect("below").to_str().expect("text");
            files.insert(key.to_owned(), std::fs::read(&path).expect("read").into());
        }
    }
}

/// Of each kind that a store at rest has not.
fn more_objects() -> Vec<(String, Bytes)> {
    let [snapshot, node, nonce, run] = [1, 2, 3, 4].map(|byte| SnapshotId::from_bytes([byte; 16]));
    let marker = Marker { snapshot, node, nonce, written_unix_ms: 5 };
    let abort = Abort { snapshot, nonce, run, reason: "its lease was not renewed".into() };
    let packs = vec![keys::PackId { txn: snapshot, number: 0 }];
    let halt = Halt { missing: packs[0].key(), written_unix_ms: 5 };
    let sealed = [
        (keys::lease(snapshot), record::seal(&marker)),
        (keys::pin(node, nonce, snapshot), record::seal(&marker)),
        (keys::snap(snapshot), record::seal(&Decision::Abort(abort))),
        (format!("gc/condemned/{run}"), record::seal(&Condemned { run, packs })),
        (keys::HALT.to_owned(), record::seal(&halt)),
    ];
    sealed.map(|(key, bytes)| (key, bytes.into())).into()
}

/// Bytes of an object that one thread takes at once.
const PIECE_BYTES: usize = 128;

/// Every flipped bit of some bytes of an object, and cuts before each of them.
fn damages(object: &[u8], bytes: Range<usize>) -> impl Iterator<Item = (String, Vec<u8>)> + '_ {
    let flips = (bytes.start * 8..bytes.end * 8).map(|bit| {
        let mut bytes = object.to_vec();
        bytes[bit / 8] ^= 1 << (bit % 8);
        (format!("bit {bit}"), bytes)
    });
    let cuts = bytes.map(|length| (format!("cut to {length}"), object[..length].to_vec()));
    flips.chain(cuts)
}

#[test]
fn every_flipped_bit_and_every_cut_of_every_object_is_noticed() {
    for version in std::fs::read_dir(GOLDEN).expect("golden stores") {
        let golden = version.expect("an entry").path().join("store");
        if golden.is_dir() {
            damage_all_of(&golden);
        }
    }
}

fn damage_all_of(golden: &Path) {
    let pieces: Vec<(String, Range<usize>)> = Specimen::new(golden)
        .good
        .into_iter()
        .flat_map(|(key, object)| {
            let starts = (0..object.len()).step_by(PIECE_BYTES);
            starts.map(move |at| (key.clone(), at..(at + PIECE_BYTES).min(object.len())))
        })
        .collect();
    let (next, count, harmless) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    let work = || {
        let specimen = Specimen::new(golden);
        while let Some((key, bytes)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let good = specimen.good[key].clone();
            for (what, bytes) in damages(&good, bytes.clone()) {
                match specimen.damage(key, bytes) {
                    Outcome::Noticed => count.fetch_add(1, Ordering::Relaxed),
                    Outcome::Harmless => harmless.fetch_add(1, Ordering::Relaxed),
                    Outcome::Unnoticed => panic!("{key}: {what}: nobody notices"),
                };
            }
        }
    };
    std::thread::scope(|scope| {
        for thread in [scope.spawn(work), scope.spawn(work)] {
            thread.join().expect("nothing panics");
        }
    });
    let (count, harmless) = (count.into_inner(), harmless.into_inner());
    assert!(count > 50_000, "{}: the store is too small", golden.display());
    assert!(harmless < count / 200, "{harmless} flipped bits mean nothing: more than zstd has");
}

/// The checker notices nothing where there is nothing.
#[test]
fn whole_stores_have_neither_problems_nor_warnings() {
    let specimen = Specimen::new(&Path::new(GOLDEN).join("v1/store"));
    assert_eq!(specimen.packs.len(), 2);
    for (key, good) in &specimen.good {
        let unnoticed = if key.starts_with("ws/") { Outcome::Harmless } else { Outcome::Unnoticed };
        assert_eq!(specimen.damage(key, good.to_vec()), unnoticed, "{key}");
    }
}
