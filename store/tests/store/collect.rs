//! Collection on a real store: what nobody needs goes, and nothing else.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use reap_store::collect::{Collected, Options, collect};
use reap_store::pack::{Lineage, Packed, pack};
use reap_store::{Error, ErrorKind, SnapshotId};

use super::{Fixture, memory_bytes, read_all};

const NOW: Options =
    Options { dry_run: false, confirmed: true, lease_timeout: Duration::from_millis(0) };

impl Fixture {
    fn collect(&self, options: Options) -> Result<Collected, Error> {
        self.runtime.block_on(collect(&self.store(), options))
    }

    fn packed(&self, name: &str, seed: u32, lineage: Lineage) -> Packed {
        let memory = self.file("memory", &memory_bytes(400, seed));
        let request = reap_store::pack::Request { lineage, ..self.request(name, &memory) };
        pack(&self.store(), &self.runtime, &request, &mut |_| ControlFlow::Continue(()))
            .expect("packs")
    }

    fn remove(&self, id: SnapshotId) {
        let removed = self.store();
        self.runtime.block_on(removed.remove(id, SnapshotId::random())).expect("is removed");
    }
}

#[test]
fn removed_snapshots_go_and_others_stay_whole() {
    let fixture = Fixture::new();
    let (gone, kept) =
        (fixture.packed("a", 1, Lineage::default()), fixture.packed("b", 2, Lineage::default()));
    let before = fixture.keys(&["pack", "manifest"]);
    assert!(fixture.collect(NOW).expect("collects").garbage.is_empty());
    fixture.remove(gone.id);

    let dry = fixture.collect(Options { dry_run: true, ..NOW }).expect("looks");
    let of_gone = |key: &String| key.contains(&gone.id.to_string());
    assert_eq!(dry.garbage.len(), before.iter().filter(|key| of_gone(key)).count());
    assert!(dry.garbage.iter().all(|object| object.reason.contains("removed") && object.bytes > 0));
    let refused =
        fixture.collect(Options { confirmed: false, ..NOW }).expect_err("half of all bytes");
    assert_eq!(refused.kind(), ErrorKind::Refused);
    assert!(refused.to_string().contains("--yes"), "{refused}");
    assert_eq!(fixture.keys(&["pack", "manifest"]), before, "nothing went so far");

    let done = fixture.collect(NOW).expect("collects");
    assert!(done.deleted && done.live_snapshots == 1);
    let left = fixture.keys(&["pack", "manifest"]);
    assert_eq!(left, before.into_iter().filter(|key| !of_gone(key)).collect());
    assert!(fixture.keys(&["gc/condemned", "lease"]).is_empty());
    assert!(fixture.collect(NOW).expect("collects").garbage.is_empty());
    let node = fixture.node();
    let snapshot = node.block_on(node.open_id(kept.id)).expect("opens");
    assert!(read_all(&snapshot, 0).expect("reads") == memory_bytes(400, 2));
}

#[test]
fn what_another_snapshot_refers_to_stays() {
    let fixture = Fixture::new();
    let parent = fixture.packed("a", 1, Lineage::default());
    let child = fixture.packed("b", 1, Lineage { parents: vec![parent.id], ..Lineage::default() });
    assert_eq!(child.parents, [parent.id], "the child shares its parent's pages");
    fixture.remove(parent.id);
    let done = fixture.collect(NOW).expect("collects");
    let keys: Vec<_> = done.garbage.iter().map(|object| object.key.as_str()).collect();
    assert_eq!(keys, [format!("manifest/{}", parent.id)], "its packs are the child's too");
    let node = fixture.node();
    let snapshot = node.block_on(node.open_id(child.id)).expect("opens");
    assert!(read_all(&snapshot, 0).expect("reads") == memory_bytes(400, 1));
    drop(snapshot);
    node.block_on(node.release_pins());
    fixture.remove(child.id);
    fixture.collect(NOW).expect("collects");
    assert!(fixture.keys(&["pack", "manifest"]).is_empty());
}

#[test]
fn a_removed_snapshot_stays_while_a_node_serves_it() {
    let fixture = Fixture::new();
    let packed = fixture.packed("a", 1, Lineage::default());
    let node = fixture.node();
    let snapshot = node.block_on(node.open_id(packed.id)).expect("opens");
    fixture.remove(packed.id);
    assert!(fixture.collect(NOW).expect("collects").garbage.is_empty());
    assert!(read_all(&snapshot, 0).expect("reads") == memory_bytes(400, 1));
    drop(snapshot);
    node.block_on(node.release_pins());
    assert!(fixture.collect(NOW).expect("collects").deleted);
    assert!(fixture.keys(&["pack", "manifest", "pin"]).is_empty());
}

#[test]
fn an_unfinished_packing_is_ended_and_its_objects_go() {
    let fixture = Fixture::new();
    fixture.packed("a", 1, Lineage::default());
    let txn = SnapshotId::random();
    for key in [format!("lease/{txn}"), format!("pack/{txn}-0000"), format!("manifest/{txn}")] {
        fixture.create(&key, "of a packer that was killed");
    }
    let staged = fixture.path(&format!("store/pack/{txn}-0001#3"));
    if fixture.url().starts_with("file:") {
        std::fs::write(&staged, "half a pack").expect("is written");
    }
    std::thread::sleep(Duration::from_millis(20));
    let first = fixture.collect(NOW).expect("collects");
    assert!(first.garbage.is_empty(), "the first run ends the packer: {first:?}");
    let second = fixture.collect(NOW).expect("collects");
    assert_eq!(second.garbage.len(), 2, "{second:?}");
    assert!(fixture.keys(&["lease"]).is_empty() && !staged.exists());
    assert!(!fixture.keys(&["pack", "manifest"]).iter().any(|key| key.contains(&txn.to_string())));
    let decision = String::from_utf8(fixture.object(&format!("snap/{txn}"))).expect("is text");
    assert!(decision.contains("abort"), "it can never commit");
}

#[test]
fn a_surprise_or_damage_deletes_nothing() {
    let fixture = Fixture::new();
    let (gone, kept) =
        (fixture.packed("a", 1, Lineage::default()), fixture.packed("b", 2, Lineage::default()));
    fixture.remove(gone.id);
    let before = fixture.keys(&["pack", "manifest"]);
    for key in ["pack/what", "manifest/0", "tomb/x", "pin/1", "lease/y", "snap/z"] {
        fixture.create(key, "?");
        let refused = fixture.collect(NOW).expect_err("a surprise");
        assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
        assert!(refused.to_string().contains(key), "{refused}");
        fixture.delete(key);
    }
    let snap = format!("snap/{}", kept.id);
    let good = fixture.object(&snap);
    let mut bad = good.clone();
    bad[40] ^= 1;
    fixture.overwrite(&snap, bad);
    assert_eq!(fixture.collect(NOW).expect_err("damage").kind(), ErrorKind::Damaged);
    fixture.overwrite(&snap, good);
    assert_eq!(fixture.keys(&["pack", "manifest"]), before);
    assert!(fixture.keys(&["gc/condemned"]).is_empty());
}

#[test]
fn a_missing_pack_of_a_live_snapshot_halts_collection() {
    let fixture = Fixture::new();
    let (gone, kept) =
        (fixture.packed("a", 1, Lineage::default()), fixture.packed("b", 2, Lineage::default()));
    fixture.remove(gone.id);
    let own = |key: &String| key.starts_with("pack/") && key.contains(&kept.id.to_string());
    let pack = fixture.keys(&["pack"]).into_iter().find(own).expect("a pack");
    fixture.delete(&pack);
    let before = fixture.keys(&["pack", "manifest"]);

    assert_eq!(fixture.collect(NOW).expect_err("a loss").kind(), ErrorKind::Damaged);
    let refused = fixture.collect(NOW).expect_err("is halted");
    assert!(refused.to_string().contains("gc/HALT"), "{refused}");
    fixture.delete("gc/HALT");

    // A reader that misses it halts collection too.
    let node = fixture.node();
    let snapshot = node.block_on(node.open_id(kept.id)).expect("opens");
    assert_eq!(read_all(&snapshot, 0).expect_err("a loss").kind(), ErrorKind::NotFound);
    let halted = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        fixture.keys(&["gc"]).iter().any(|key| key == "gc/HALT")
    });
    assert!(halted, "the reader said nothing");
    assert_eq!(fixture.keys(&["pack", "manifest"]), before);
}

#[test]
fn packers_and_collectors_at_the_same_time_lose_nothing() {
    let fixture = Fixture::new();
    let mut last = fixture.packed("a", 1, Lineage::default());
    let (done, deleted) = (AtomicBool::new(false), AtomicUsize::new(0));
    let store = fixture.store();
    let collecting = || {
        while !done.load(Ordering::Acquire) {
            // As in production: a packer at work is waited for, not ended.
            let patient = Options { lease_timeout: Duration::from_secs(60), ..NOW };
            let run = fixture.runtime.block_on(collect(&store, patient)).expect("collects");
            deleted.fetch_add(run.garbage.len(), Ordering::AcqRel);
        }
    };
    let mut seed = 1;
    std::thread::scope(|scope| {
        let collectors = [scope.spawn(collecting), scope.spawn(collecting)];
        while deleted.load(Ordering::Acquire) < 40 && seed < 2000 {
            seed += 1;
            let lineage = Lineage { parents: vec![last.id], ..Lineage::default() };
            let next = fixture.packed("a", seed % 3, lineage);
            fixture.remove(last.id);
            last = next;
        }
        done.store(true, Ordering::Release);
        collectors.into_iter().for_each(|one| one.join().expect("ends"));
    });
    assert!(deleted.into_inner() >= 40, "too little was deleted for anything to go wrong");
    let node = fixture.node();
    let snapshot = node.block_on(node.open_id(last.id)).expect("opens");
    assert!(read_all(&snapshot, 0).expect("reads") == memory_bytes(400, seed % 3));
    fixture.collect(NOW).expect("collects");
    fixture.collect(NOW).expect("collects");
    let commit = fixture.runtime.block_on(store.commit(last.id)).expect("is there");
    let needed: BTreeSet<_> = commit.packs.iter().map(|pack| pack.pack.key()).collect();
    assert_eq!(fixture.keys(&["pack"]), needed);
    assert_eq!(fixture.keys(&["manifest"]).len(), 1);
}
