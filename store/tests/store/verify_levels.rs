//! What each level of verification finds, and what it says of itself.

use std::path::PathBuf;

use reap_store::SnapshotId;
use reap_store::verify::{Level, Options, Report, Share, verify};

use super::*;

impl Fixture {
    fn verified(&self, ids: &[SnapshotId], level: Level, share: Share) -> Report {
        let store = self.store();
        let options = Options { level, whole_store: true, share, seed: 7 };
        let mut last = 0;
        let report = self.runtime.block_on(verify(&store, ids, &options, &mut |at| {
            assert!(last <= at.done_bytes && at.done_bytes <= at.total_bytes, "{at:?}");
            last = at.done_bytes;
        }));
        report.expect("the store can be asked")
    }

    fn found(&self, id: SnapshotId, level: Level) -> usize {
        self.verified(&[id], level, Share::Percent(100.0)).problems.len()
    }

    fn only_pack(&self) -> PathBuf {
        self.objects_under("pack").pop().expect("a pack")
    }

    fn is_halted(&self) -> bool {
        self.path("store/gc/HALT").exists()
    }
}

const LEVELS: [Level; 4] = [Level::Structure, Level::Sizes, Level::Sample, Level::Everything];

#[test]
fn each_level_finds_what_it_looks_at() {
    let fixture = Fixture::new();
    let packed = fixture.pack("one", &memory_bytes(300, 1));
    let all = |level| LEVELS.map(|one| usize::from(one >= level));
    let found = || LEVELS.map(|level| fixture.found(packed.id, level));
    assert_eq!(found(), [0, 0, 0, 0]);
    assert!(!fixture.is_halted());

    let pack = fixture.only_pack();
    let good = std::fs::read(&pack).expect("read");
    let mut bad = good.clone();
    bad[500] ^= 1;
    std::fs::write(&pack, &bad).expect("damaged");
    assert_eq!(found(), all(Level::Sample), "a flipped bit");
    // In the footer, which readers do not need.
    let mut bad = good.clone();
    let last = bad.len() - 70;
    bad[last] ^= 1;
    std::fs::write(&pack, &bad).expect("damaged");
    assert_eq!(found(), all(Level::Everything), "a flipped bit of a page id");
    std::fs::write(&pack, &good[..good.len() - 1]).expect("damaged");
    assert_eq!(found(), all(Level::Sizes), "a cut");
    assert!(!fixture.is_halted(), "nothing was missing");
    std::fs::remove_file(&pack).expect("removed");
    assert_eq!(fixture.found(packed.id, Level::Structure), 0);
    assert!(!fixture.is_halted(), "no pack was looked at");
    assert_eq!(found(), all(Level::Sizes), "a loss");
    assert!(fixture.is_halted(), "an object of a live snapshot is missing");
    std::fs::write(&pack, good).expect("as it was");

    let manifest = fixture.objects_under("manifest").pop().expect("a manifest");
    std::fs::remove_file(&manifest).expect("removed");
    assert_eq!(found(), [1, 1, 1, 1], "no manifest");
}

#[test]
fn a_name_that_stands_for_nothing_is_a_problem_of_the_whole_store() {
    let fixture = Fixture::new();
    let packed = fixture.pack("one", &memory_bytes(30, 1));
    let store = fixture.store();
    let name = "nothing".parse().expect("a name");
    fixture.runtime.block_on(store.tag(&name, SnapshotId::random())).expect("tagged");
    let report = fixture.verified(&[packed.id], Level::Structure, Share::Percent(1.0));
    assert_eq!(report.problems.len(), 1, "{report:?}");
    assert!(report.problems[0].contains("name nothing"), "{report:?}");
    // The newest decides; its history must be readable all the same.
    fixture.runtime.block_on(store.tag(&name, packed.id)).expect("tagged");
    assert_eq!(fixture.found(packed.id, Level::Structure), 0);
    let first = fixture.path("store/ref/nothing/000000000001");
    std::fs::write(first, "nonsense").expect("damaged");
    assert_eq!(fixture.found(packed.id, Level::Structure), 1);
}

#[test]
fn a_sample_is_as_large_as_is_asked_for_and_the_same_for_the_same_seed() {
    let fixture = Fixture::new();
    let packed = fixture.pack("one", &memory_bytes(3000, 1));
    let read = |share| fixture.verified(&[packed.id], Level::Sample, share);
    let all = read(Share::Percent(100.0));
    assert!(all.frames_referred > 50 && all.frames == all.frames_referred, "{all:?}");
    let half = read(Share::Percent(50.0));
    assert!(half.frames > all.frames / 4 && half.frames < all.frames * 3 / 4, "{half:?}");
    assert_eq!(half.bytes, read(Share::Percent(50.0)).bytes);
    let bounded = read(Share::Bytes(all.bytes / 3));
    assert!(bounded.bytes <= all.bytes / 3 && bounded.bytes > all.bytes / 5, "{bounded:?}");
    assert_eq!(read(Share::Percent(0.0)).frames, 0);
    assert_eq!(half.seed, Some(7));
    assert!(half.not_looked_at.iter().any(|what| what.contains("not picked")), "{half:?}");
}

/// A snapshot that is removed and collected between its listing and its packs' is no loss.
#[test]
fn a_snapshot_that_went_meanwhile_is_no_loss() {
    let fixture = Fixture::new();
    let packed = fixture.pack("one", &memory_bytes(100, 1));
    let store = fixture.store();
    fixture.runtime.block_on(store.remove(packed.id, packed.id)).expect("removed");
    std::fs::remove_file(fixture.only_pack()).expect("collected");
    let report = fixture.verified(&[packed.id], Level::Everything, Share::Percent(1.0));
    assert!(report.problems.is_empty() && !fixture.is_halted(), "{report:?}");
    assert!(report.warnings.iter().any(|text| text.contains("removed meanwhile")), "{report:?}");
}

#[test]
fn working_sets_are_bound_at_every_level() {
    let fixture = Fixture::new();
    let packed = fixture.pack("one", &memory_bytes(300, 1));
    let node = fixture.node();
    let snapshot = node.block_on(node.open_id(packed.id)).expect("opens");
    let touches: Vec<Touch> = (0..200).map(|page| Touch { file: 0, page, at_us: page }).collect();
    node.block_on(
        node.publish_working_set(&snapshot, &reap_store::WorkingSetContent::of_recording(&touches)),
    )
    .expect("publishes");
    drop((snapshot, node));
    for level in LEVELS {
        let report = fixture.verified(&[packed.id], level, Share::Percent(1.0));
        assert_eq!((report.working_sets, report.warnings.len()), (1, 0), "{report:?}");
    }
    let path = fixture.path(&format!("store/ws/{}/000000000001", packed.id));
    let good = std::fs::read(&path).expect("read");
    for length in [0, 47, 60, good.len() - 1] {
        std::fs::write(&path, &good[..length]).expect("cut");
        for level in LEVELS {
            let report = fixture.verified(&[packed.id], level, Share::Percent(1.0));
            assert_eq!(
                (report.working_sets, report.warnings.len()),
                (0, 1),
                "{length}: {report:?}"
            );
            assert!(report.problems.is_empty());
        }
    }
}
