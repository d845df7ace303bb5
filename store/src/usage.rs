//! What a store holds and what of it is in use: counted from manifests and listings.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::format::frame::FRAME_ENTRY_BYTES;
use crate::format::keys::{self, PackId};
use crate::format::manifest::Manifest;
use crate::format::pack;
use crate::format::record::Commit;
use crate::store::Store;
use crate::{Error, PAGE_SIZE, SnapshotId};

/// What one snapshot takes.
#[derive(Clone, Debug, serde::Serialize)]
pub struct SnapshotUsage {
    /// Which.
    pub snapshot: SnapshotId,
    /// The name it was packed under.
    pub packed_as: String,
    /// Bytes of its files.
    pub raw_bytes: u64,
    /// Bytes of its pages that are not zero.
    pub data_bytes: u64,
    /// Bytes of the distinct pages in the frames that it refers to, decoded.
    pub unique_bytes: u64,
    /// Stored bytes of the frames that it refers to, in its own packs and in others.
    pub stored_bytes: u64,
    /// Of those, what no other snapshot refers to: what removing it would free in the end.
    pub exclusive_bytes: u64,
    /// Bytes of its manifest.
    pub manifest_bytes: u64,
    /// Bytes of its working sets.
    pub working_set_bytes: u64,
}

/// A pack, and how much of it snapshots refer to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackUsage {
    /// Bytes of the object.
    pub bytes: u64,
    /// Bytes of the frames that some snapshot refers to, of their part of the footer, and of what
    /// every pack has: all of a pack that is wholly in use.
    pub live_bytes: u64,
}

/// What a store holds.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Usage {
    /// The snapshots that exist.
    pub snapshots: Vec<SnapshotUsage>,
    /// Bytes of all their files.
    pub raw_bytes: u64,
    /// Bytes of the distinct pages in all frames in use, decoded.
    pub unique_bytes: u64,
    /// Bytes of all objects.
    pub stored_bytes: u64,
    /// Bytes of packs, manifests and working sets that no snapshot refers to and no packer is
    /// writing: collection frees them.
    pub garbage_bytes: u64,
    /// The same, by the transaction that wrote them: removed snapshots, and packers that were given up.
    pub garbage: BTreeMap<SnapshotId, u64>,
    /// Bytes in packs that are in use, but not these bytes: repacking frees them.
    pub dead_bytes: u64,
    /// Packs of transactions that are not decided and have a lease.
    pub unfinished_bytes: u64,
    /// The packs that snapshots refer to.
    #[serde(skip)]
    pub packs: BTreeMap<PackId, PackUsage>,
}

impl Usage {
    /// Packs of which less than `threshold` (0 to 1) is in use.
    pub fn packs_below(&self, threshold: f64) -> HashSet<PackId> {
        let below = |pack: &PackUsage| (pack.live_bytes as f64) < threshold * pack.bytes as f64;
        self.packs.iter().filter(|(_, pack)| below(pack)).map(|(id, _)| *id).collect()
    }
}

/// A frame in use.
struct LiveFrame {
    stored_bytes: u64,
    decoded_bytes: u64,
    /// The snapshot that alone refers to it, by number.
    owner: Option<usize>,
}

/// Counts by reading every manifest; memory is some 50 bytes a frame in use.
pub async fn usage(store: &Store) -> Result<Usage, Error> {
    // Listed before the snapshots: what is committed meanwhile is in use, and not garbage.
    let objects = store.objects().list("").await?;
    let mut usage = Usage::default();
    let mut frames: HashMap<(PackId, u64), LiveFrame> = HashMap::new();
    for id in store.ids().await? {
        let (commit, manifest) = match store.read_snapshot(id).await {
            // A transaction that was given up.
            Err(error) if error.kind() == crate::ErrorKind::NotFound => continue,
            read => read?,
        };
        add_snapshot(&mut usage, &mut frames, &commit, &manifest);
    }
    for ((pack, _), frame) in &frames {
        usage.unique_bytes += frame.decoded_bytes;
        if let Some(owner) = frame.owner {
            usage.snapshots[owner].exclusive_bytes += frame.stored_bytes;
        }
        if let Some(pack) = usage.packs.get_mut(pack) {
            let page_ids = frame.decoded_bytes / PAGE_SIZE as u64 * 32;
            pack.live_bytes += frame.stored_bytes + FRAME_ENTRY_BYTES as u64 + page_ids;
        }
    }
    usage.dead_bytes =
        usage.packs.values().map(|pack| pack.bytes - pack.live_bytes.min(pack.bytes)).sum();
    add_objects(&mut usage, &objects);
    Ok(usage)
}

fn add_snapshot(
    usage: &mut Usage,
    frames: &mut HashMap<(PackId, u64), LiveFrame>,
    commit: &Commit,
    manifest: &Manifest,
) {
    let number = usage.snapshots.len();
    let (mut stored_bytes, mut unique_bytes) = (0, 0);
    for frame in &manifest.frames {
        let pack = manifest.packs[frame.pack as usize].0;
        stored_bytes += u64::from(frame.entry.stored_bytes);
        unique_bytes += frame.entry.decoded_bytes() as u64;
        frames
            .entry((pack, frame.entry.offset))
            .and_modify(|live| live.owner = live.owner.filter(|owner| *owner == number))
            .or_insert(LiveFrame {
                stored_bytes: u64::from(frame.entry.stored_bytes),
                decoded_bytes: frame.entry.decoded_bytes() as u64,
                owner: Some(number),
            });
    }
    for pack in &commit.packs {
        usage
            .packs
            .insert(pack.pack, PackUsage { bytes: pack.bytes, live_bytes: pack::EMPTY_BYTES });
    }
    let raw_bytes = commit.files.iter().map(|file| file.bytes).sum();
    let data_pages = commit.statistics.pages - commit.statistics.zero_pages;
    usage.raw_bytes += raw_bytes;
    usage.snapshots.push(SnapshotUsage {
        snapshot: commit.snapshot,
        packed_as: commit.name.clone(),
        raw_bytes,
        data_bytes: data_pages * PAGE_SIZE as u64,
        unique_bytes,
        stored_bytes,
        exclusive_bytes: 0,
        manifest_bytes: commit.manifest_bytes,
        working_set_bytes: 0,
    });
}

/// Sorts all objects into used, garbage and unfinished.
fn add_objects(usage: &mut Usage, objects: &[crate::objects::ListedObject]) {
    let leased: HashSet<SnapshotId> = objects
        .iter()
        .filter(|object| object.key.starts_with("lease/"))
        .filter_map(|object| keys::id_of(&object.key))
        .collect();
    let numbers: HashMap<SnapshotId, usize> =
        usage.snapshots.iter().enumerate().map(|(number, one)| (one.snapshot, number)).collect();
    for object in objects {
        usage.stored_bytes += object.bytes;
        let mut parts = object.key.split('/');
        let (kind, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        let pack: Option<PackId> = (kind == "pack").then(|| name.parse().ok()).flatten();
        let owner = match (kind, pack) {
            ("pack", Some(pack)) => Some(pack.txn),
            ("manifest" | "ws", _) => name.parse().ok(),
            _ => None,
        };
        let Some(owner) = owner else { continue };
        let live = match pack {
            Some(pack) => usage.packs.contains_key(&pack),
            None => numbers.contains_key(&owner),
        };
        if kind == "ws"
            && let Some(number) = numbers.get(&owner)
        {
            usage.snapshots[*number].working_set_bytes += object.bytes;
        }
        match (live, leased.contains(&owner)) {
            (true, _) => {}
            (false, true) => usage.unfinished_bytes += object.bytes,
            (false, false) => {
                usage.garbage_bytes += object.bytes;
                *usage.garbage.entry(owner).or_default() += object.bytes;
            }
        }
    }
}
