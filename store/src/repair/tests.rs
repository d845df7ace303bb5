//! Stores that lost something, and what comes of repairing them.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Runtime;

use super::*;
use crate::fetch::ObjectId;
use crate::fetch::disk::{DiskCache, Limits};
use crate::format::keys;
use crate::pack::{Input, Lineage, Request, pack};
use crate::verify::{Options, verify};
use crate::{ErrorKind, FileKind, NodeConfig, PAGE_SIZE, Snapshot, Touch};

/// A store in a directory, of a parent and a child that refers to it.
struct Fixture {
    directory: tempfile::TempDir,
    runtime: Runtime,
    parent: SnapshotId,
    child: SnapshotId,
}

const PAGES: usize = 200;

/// Pages of which no two are the same.
fn memory(changed: std::ops::Range<usize>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(PAGES * PAGE_SIZE);
    for page in 0..PAGES {
        let seed = if changed.contains(&page) { page + 100_000 } else { page };
        let words = (0..PAGE_SIZE / 4).map(|at| (seed * 31 + at / 7) as u32);
        bytes.extend(words.flat_map(u32::to_le_bytes));
    }
    bytes
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("directory");
        let runtime = Runtime::new().expect("runtime");
        let url = format!("file://{}/store", directory.path().display());
        runtime.block_on(Store::init(&url)).expect("made");
        let [parent, child] = [SnapshotId::from_bytes([0; 16]); 2];
        let mut fixture = Self { directory, runtime, parent, child };
        fixture.parent = fixture.pack("parent", &memory(0..0), Vec::new());
        fixture.child = fixture.pack("child", &memory(20..60), vec![fixture.parent]);
        fixture.record(fixture.child);
        fixture
    }

    fn path(&self, key: &str) -> PathBuf {
        self.directory.path().join("store").join(key)
    }

    fn url(&self, store: &str) -> String {
        format!("file://{}/{store}", self.directory.path().display())
    }

    fn store(&self) -> Store {
        self.runtime.block_on(Store::open(&self.url("store"))).expect("opens")
    }

    fn node(&self) -> Node {
        Node::start(&NodeConfig::reader(&self.url("store"))).expect("starts")
    }

    fn pack(&self, name: &str, memory: &[u8], parents: Vec<SnapshotId>) -> SnapshotId {
        let path = self.directory.path().join("input");
        std::fs::write(&path, memory).expect("written");
        let input = Input { name: "memory".into(), kind: FileKind::Memory, path };
        let request = Request {
            lineage: Lineage { parents, ..Lineage::default() },
            ..Request::new(name.parse().expect("a name"), vec![input])
        };
        let go_on = &mut |_| ControlFlow::Continue(());
        pack(&self.store(), &self.runtime, &request, go_on).expect("packs").id
    }

    fn record(&self, id: SnapshotId) {
        let node = self.node();
        let snapshot = node.block_on(node.open_id(id)).expect("opens");
        let touches: Vec<_> = (0..50).map(|page| Touch { file: 0, page, at_us: page }).collect();
        node.block_on(
            node.publish_working_set(&snapshot, &crate::WorkingSetContent::of_recording(&touches)),
        )
        .expect("publishes");
        drop(snapshot);
        node.block_on(node.release_pins());
    }

    /// The same objects in another place, as a bucket is replicated.
    fn replica(&self) -> Store {
        let to = self.directory.path().join("replica");
        let copied = std::process::Command::new("cp")
            .arg("-r")
            .arg(self.path(""))
            .arg(&to)
            .status()
            .expect("cp");
        assert!(copied.success());
        self.runtime.block_on(Store::open(&self.url("replica"))).expect("opens")
    }

    fn own_pack(&self, id: SnapshotId) -> String {
        keys::PackId { txn: id, number: 0 }.key()
    }

    fn repair(&self, sources: &Sources, dry_run: bool) -> Result<Repaired, Error> {
        let node = self.node();
        let ids = node.block_on(node.ids()).expect("listed");
        let go_on = &mut |_| ControlFlow::Continue(());
        let repaired = repair(&node, &self.runtime, &ids, sources, dry_run, go_on);
        node.block_on(node.release_pins());
        repaired
    }

    /// What the names stand for is there, bit for bit, and nothing is wrong any more.
    fn is_whole(&self) {
        let node = self.node();
        for (name, good) in [("parent", memory(0..0)), ("child", memory(20..60))] {
            let name = name.parse().expect("a name");
            let snapshot = node.block_on(node.open_name(&name)).expect("opens");
            assert!(read(&node, &snapshot) == good, "{name}: other bytes");
        }
        node.block_on(node.release_pins());
        let store = self.store();
        let options = Options { whole_store: true, ..Options::everything() };
        let report = self.runtime.block_on(async {
            let ids = store.ids().await?;
            verify(&store, &ids, &options, &mut |_| {}).await
        });
        let report = report.expect("verifies");
        assert!(report.problems.is_empty() && report.warnings.is_empty(), "{report:?}");
        assert_eq!((report.snapshots, report.working_sets), (2, 1));
    }

    /// Every file of the store, but for pins.
    fn files(&self) -> std::collections::BTreeMap<PathBuf, Vec<u8>> {
        fn walk(directory: &Path, files: &mut std::collections::BTreeMap<PathBuf, Vec<u8>>) {
            for entry in std::fs::read_dir(directory).expect("a directory") {
                let path = entry.expect("an entry").path();
                match path.is_dir() {
                    true => walk(&path, files),
                    false => drop(files.insert(path.clone(), std::fs::read(&path).expect("read"))),
                }
            }
        }
        let mut files = std::collections::BTreeMap::new();
        walk(&self.path(""), &mut files);
        files
    }

    fn damage(&self, key: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.path(key);
        let mut bytes = std::fs::read(&path).expect("is there");
        change(&mut bytes);
        std::fs::write(&path, bytes).expect("damaged");
    }
}

fn read(node: &Node, snapshot: &Arc<Snapshot>) -> Vec<u8> {
    let directory = tempfile::tempdir().expect("directory");
    let out = directory.path().join("out");
    let quiet = &mut |_, _| {};
    let paths = node.block_on(crate::export::export(snapshot, &out, quiet)).expect("exports");
    std::fs::read(&paths[0]).expect("read")
}

#[test]
fn a_whole_store_is_left_alone() {
    let fixture = Fixture::new();
    let before = fixture.files();
    let repaired = fixture.repair(&Sources::default(), false).expect("looks");
    assert!(repaired.is_clean() && !repaired.applied, "{repaired:?}");
    assert_eq!(fixture.files(), before);
}

#[test]
fn missing_objects_come_back_from_a_replica_as_they_were() {
    let fixture = Fixture::new();
    let from = Some(fixture.replica());
    let sources = Sources { from, ..Sources::default() };
    let working_set = keys::working_set(fixture.child, 1);
    let lost = [fixture.own_pack(fixture.parent), keys::manifest(fixture.child), working_set];
    let before = fixture.files();
    lost.iter().for_each(|key| std::fs::remove_file(fixture.path(key)).expect("was there"));
    let damaged = fixture.files();

    let dry = fixture.repair(&sources, true).expect("looks");
    assert_eq!(
        dry.objects.iter().map(|one| &one.key).collect::<Vec<_>>(),
        lost.iter().collect::<Vec<_>>()
    );
    assert!(dry.rewrites.is_empty() && dry.lost.is_empty() && !dry.applied, "{dry:?}");
    assert_eq!(fixture.files(), damaged, "a dry run changes nothing");

    let repaired = fixture.repair(&sources, false).expect("repairs");
    assert!(repaired.applied && repaired.objects == dry.objects, "{repaired:?}");
    let mut after = fixture.files();
    assert!(after.remove(&fixture.path(keys::HALT)).is_some(), "collection goes on");
    assert_eq!(after, before);
    fixture.is_whole();
}

#[test]
fn without_a_source_a_loss_is_told_and_nothing_is_changed() {
    let fixture = Fixture::new();
    std::fs::remove_file(fixture.path(&fixture.own_pack(fixture.parent))).expect("was there");
    std::fs::remove_file(fixture.path(&keys::manifest(fixture.child))).expect("was there");
    let before = fixture.files();
    let repaired = fixture.repair(&Sources::default(), false).expect("looks");
    assert!(!repaired.applied && repaired.rewrites.is_empty(), "{repaired:?}");
    let lost: Vec<_> =
        repaired.lost.iter().map(|loss| (loss.snapshot, loss.object.clone())).collect();
    let (parent, child) = (fixture.parent, fixture.child);
    assert_eq!(lost, [(child, keys::manifest(child)), (parent, fixture.own_pack(parent))]);
    assert_eq!(fixture.files(), before);
}

/// A flipped bit, a cut, a lost footer: an object is not overwritten, so every snapshot that needs it is
/// written once more, from the frames that are good and from those of the replica.
#[test]
fn snapshots_with_a_damaged_pack_are_written_once_more() {
    type Damage = fn(&mut Vec<u8>);
    let damages: [Damage; 3] =
        [|bytes| bytes[300] ^= 4, |bytes| bytes.truncate(bytes.len() / 2), |bytes| bytes.clear()];
    for damage in damages {
        let fixture = Fixture::new();
        let from = Some(fixture.replica());
        let sources = Sources { from, ..Sources::default() };
        let pack = fixture.own_pack(fixture.parent);
        fixture.damage(&pack, damage);
        let dry = fixture.repair(&sources, true).expect("looks");
        assert_eq!(dry.rewrites.len(), 2, "{dry:?}");
        assert!(dry.rewrites.iter().all(|one| one.objects == [pack.clone()] && one.frames > 0));
        assert!(dry.objects.is_empty() && dry.lost.is_empty());

        let repaired = fixture.repair(&sources, false).expect("repairs");
        assert_eq!(repaired.replaced.len(), 2, "{repaired:?}");
        assert!(repaired.replaced.iter().all(|one| one.names.len() == 1));
        let shared: u64 =
            repaired.replaced.iter().map(|one| one.packed.statistics.parent_pages).sum();
        assert!(shared > 0, "the second shares what the first has written");
        std::fs::remove_file(fixture.path(keys::HALT)).expect("collection is halted");
        fixture.is_whole();
    }
}

/// A copy has other ids and other packs, and the same frames.
#[test]
fn frames_of_a_copy_in_another_store_are_good_as_well() {
    let fixture = Fixture::new();
    let other = fixture.runtime.block_on(Store::init(&fixture.url("other"))).expect("made");
    let node = fixture.node();
    let name = "elsewhere".parse().expect("a name");
    let go_on = &mut |_| ControlFlow::Continue(());
    crate::copy::copy(&node, fixture.parent, &other, &fixture.runtime, &name, None, go_on)
        .expect("copies");
    node.block_on(node.release_pins());
    drop(node);
    std::fs::remove_file(fixture.path(&fixture.own_pack(fixture.parent))).expect("was there");
    let sources = Sources { from: Some(other), ..Sources::default() };
    let repaired = fixture.repair(&sources, false).expect("repairs");
    assert!(repaired.lost.is_empty() && repaired.objects.is_empty(), "{repaired:?}");
    assert_eq!(repaired.replaced.len(), 2);
    std::fs::remove_file(fixture.path(keys::HALT)).expect("collection is halted");
    fixture.is_whole();
}

#[test]
fn damaged_records_and_working_sets_are_replaced_from_a_replica() {
    let fixture = Fixture::new();
    let from = Some(fixture.replica());
    let sources = Sources { from, ..Sources::default() };
    fixture.damage(&keys::manifest(fixture.parent), |bytes| bytes[20] ^= 1);
    fixture.damage(&keys::working_set(fixture.child, 1), |bytes| bytes.truncate(70));
    let repaired = fixture.repair(&sources, false).expect("repairs");
    assert_eq!((repaired.working_sets, repaired.replaced.len()), (1, 1), "{repaired:?}");
    assert_eq!(repaired.replaced[0].replaced, fixture.parent);
    let again = fixture.path(&keys::working_set(fixture.child, 2));
    assert!(again.exists(), "a damaged working set is published again, later");
    // The damaged one stays, is passed over, and costs nothing.
    std::fs::remove_file(fixture.path(&keys::working_set(fixture.child, 1))).expect("was there");
    std::fs::remove_file(fixture.path(keys::HALT)).expect("collection is halted");
    fixture.is_whole();
}

/// What a node's cache has of a pack that is gone.
fn fill_cache(fixture: &Fixture, id: SnapshotId, keep: impl Fn(usize) -> bool) -> PathBuf {
    let directory = fixture.directory.path().join("cache");
    std::fs::create_dir_all(&directory).expect("made");
    std::fs::write(directory.join("node"), "").expect("written");
    let (_, manifest) = fixture.runtime.block_on(fixture.store().read_snapshot(id)).expect("read");
    let limits = Limits { bytes: 1 << 30, free_floor: 0 };
    let cache = DiskCache::open(&directory, limits).expect("opens");
    let kept = manifest.frames.iter().enumerate().filter(|(number, _)| keep(*number));
    for (_, packed) in kept {
        let (pack, _) = manifest.packs[packed.pack as usize];
        let object = std::fs::read(fixture.path(&pack.key())).expect("a pack");
        let from = packed.entry.offset as usize;
        let stored = &object[from..from + packed.entry.stored_bytes as usize];
        cache.insert((ObjectId::Pack(pack), packed.entry.offset), Bytes::copy_from_slice(stored));
    }
    directory
}

#[test]
fn a_cache_with_all_frames_of_a_lost_pack_is_enough_and_one_with_half_of_them_is_not() {
    for enough in [true, false] {
        let fixture = Fixture::new();
        let keep = |number: usize| enough || number.is_multiple_of(2);
        let cache = fill_cache(&fixture, fixture.parent, keep);
        std::fs::remove_file(fixture.path(&fixture.own_pack(fixture.parent))).expect("was there");
        let before = fixture.files();
        let sources = Sources { caches: vec![cache], ..Sources::default() };
        let repaired = fixture.repair(&sources, false).expect("looks");
        if enough {
            assert_eq!(repaired.replaced.len(), 2, "{repaired:?}");
            std::fs::remove_file(fixture.path(keys::HALT)).expect("collection is halted");
            fixture.is_whole();
        } else {
            assert_eq!(repaired.lost.len(), 2, "{repaired:?}");
            assert!(repaired.lost[0].what.contains("nowhere to be had"), "{repaired:?}");
            assert!(!repaired.applied && fixture.files() == before, "nothing is changed");
        }
    }
}

#[test]
fn what_a_collection_is_about_to_delete_does_not_come_back() {
    let fixture = Fixture::new();
    let from = Some(fixture.replica());
    let sources = Sources { from, ..Sources::default() };
    let pack = keys::PackId { txn: fixture.parent, number: 0 };
    std::fs::remove_file(fixture.path(&pack.key())).expect("was there");
    let run = SnapshotId::random();
    let record = crate::format::record::Condemned { run, packs: vec![pack] };
    std::fs::create_dir_all(fixture.path("gc/condemned")).expect("made");
    let path = fixture.path(&format!("gc/condemned/{run}"));
    std::fs::write(path, crate::format::record::seal(&record)).expect("written");
    let refused = fixture.repair(&sources, false).expect_err("is condemned");
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert!(!fixture.path(&pack.key()).exists());
}
