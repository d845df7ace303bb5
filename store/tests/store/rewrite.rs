//! Repacking, copying and counting.

use reap_store::copy::copy;
use reap_store::repack::{Repacked, repack};
use reap_store::usage::usage;

use super::dedup::distinct_bytes;
use super::*;

impl Fixture {
    fn repack(&self, ids: &[SnapshotId], during: impl FnMut()) -> Vec<Repacked> {
        let node = self.node();
        let usage = self.runtime.block_on(usage(node.store())).expect("counts");
        let mut during = during;
        let index = self.path("index");
        let repacked = repack(&node, &self.runtime, &usage, ids, 0.5, Some(&index), &mut |_| {
            during();
            ControlFlow::Continue(())
        });
        node.block_on(node.release_pins());
        repacked.expect("repacks")
    }

    fn record(&self, id: SnapshotId, pages: std::ops::Range<u64>) {
        let node = self.node();
        let snapshot = node.block_on(node.open_id(id)).expect("opens");
        let touches: Vec<Touch> =
            pages.map(|page| Touch { file: 0, page, at_us: page * 3 }).collect();
        node.block_on(
            node.publish_working_set(&snapshot, &WorkingSetContent::of_recording(&touches)),
        )
        .expect("publishes");
    }
}

/// The pages of the newest working set of `id`, compared with `memory`; how many.
fn check_working_set(node: &Node, id: SnapshotId, memory: &[u8]) -> u64 {
    let snapshot = node.block_on(node.open_id(id)).expect("opens");
    let set = node.block_on(node.working_set(&snapshot)).expect("lists").expect("is there");
    let (sender, receiver) = mpsc::channel();
    set.fetch(Urgency::Prefetch, move |number, frame| {
        sender.send((number, frame.expect("verified"))).expect("receiver");
    });
    for (number, frame) in receiver {
        let mut position = 0;
        for run in set.runs(number) {
            let expected = &memory[run.first_page as usize * PAGE_SIZE..];
            let expected = &expected[..run.pages as usize * PAGE_SIZE];
            assert!(frame.pages(position, run.pages) == expected);
            position += run.pages;
        }
    }
    set.data_pages()
}

/// A snapshot that needs 100 of the 2000 pages in its parent's pack.
fn mostly_dead(fixture: &Fixture) -> (Packed, Vec<u8>) {
    let old = distinct_bytes(2000, 1);
    let first = fixture.pack_related("f", &old);
    let mut memory = distinct_bytes(2000, 2);
    memory[..100 * PAGE_SIZE].copy_from_slice(&old[..100 * PAGE_SIZE]);
    let second = fixture.pack_related("f", &memory);
    assert_eq!(second.statistics.parent_pages, 100);
    let store = fixture.store();
    fixture.runtime.block_on(store.remove(first.id, first.id)).expect("removes");
    (second, memory)
}

#[test]
fn repacking_leaves_mostly_dead_packs_behind_and_keeps_all_else() {
    let fixture = Fixture::new();
    let (second, memory) = mostly_dead(&fixture);
    fixture.record(second.id, 0..50);
    fixture.record(second.id, 0..300);
    let store = fixture.store();
    let extra = "also".parse().expect("a name");
    fixture.runtime.block_on(store.tag(&extra, second.id)).expect("tags");
    let before = fixture.runtime.block_on(usage(&store)).expect("counts");
    let repacked = fixture.repack(&[second.id], || {});
    assert_eq!(repacked.len(), 1);
    let new = repacked[0].packed.id;
    assert_eq!((repacked[0].working_sets, repacked[0].packs_left), (2, 1));
    assert_eq!(repacked[0].packed.statistics.unique_pages, 100, "only what had to move");
    for name in ["f", "also"] {
        let name = name.parse().expect("a name");
        assert_eq!(fixture.runtime.block_on(store.resolve(&name)).expect("resolves"), new);
    }
    assert_eq!(fixture.runtime.block_on(store.ids()).expect("lists"), vec![new]);
    assert!(fixture.bytes_of(new) == memory);
    let node = fixture.node();
    assert_eq!(check_working_set(&node, new, &memory), 300);
    let (old_facts, new_commit) = (fixture.commit(second.id), fixture.commit(new));
    assert_eq!(old_facts.labels, new_commit.labels);
    let after = fixture.runtime.block_on(usage(&store)).expect("counts");
    assert!(after.dead_bytes < before.dead_bytes / 4, "{after:?} {before:?}");
    assert!(after.garbage_bytes > before.garbage_bytes, "collection can take the old pack");
    assert!(fixture.repack(&[new], || {}).is_empty(), "nothing is mostly dead any more");
    drop(node);
}

#[test]
fn a_name_that_moves_while_its_snapshot_is_repacked_stays_where_it_went() {
    let fixture = Fixture::new();
    let (second, memory) = mostly_dead(&fixture);
    let mut newer = None;
    let repacked = fixture.repack(&[second.id], || {
        newer.get_or_insert_with(|| fixture.pack("f", &distinct_bytes(10, 5)).id);
    });
    let name = "f".parse().expect("a name");
    let store = fixture.store();
    let stands_for = fixture.runtime.block_on(store.resolve(&name)).expect("resolves");
    assert_eq!(Some(stands_for), newer);
    assert!(repacked[0].names.is_empty());
    assert!(fixture.bytes_of(repacked[0].packed.id) == memory);
}

#[test]
fn copying_sends_only_what_the_other_store_lacks() {
    let here = Fixture::new();
    let there = Fixture::new();
    let memory = memory_bytes(1500, 1);
    let first = here.pack("f", &memory);
    here.record(first.id, 0..100);
    let mut second_memory = memory.clone();
    second_memory[4 * PAGE_SIZE + 9] ^= 1;
    let second = here.pack("f", &second_memory);
    let node = here.node();
    let name = "g:v1".parse().expect("a name");
    let index = Some(here.path("index"));
    let copy = |id| {
        let target = there.store();
        copy(&node, id, &target, &there.runtime, &name, index.clone(), &mut |_| {
            ControlFlow::Continue(())
        })
        .expect("copies")
    };
    let one = copy(first.id);
    assert_eq!((one.packed.statistics.parent_pages, one.working_sets), (0, 1));
    assert!(there.bytes_of(one.packed.id) == memory);
    check_working_set(&there.node(), one.packed.id, &memory);
    let two = copy(second.id);
    assert_eq!(two.packed.statistics.unique_pages, 1, "{:?}", two.packed.statistics);
    assert!(there.bytes_of(two.packed.id) == second_memory);
    let facts = |fixture: &Fixture, id| {
        let node = fixture.node();
        node.block_on(node.open_id(id)).expect("opens").facts().clone()
    };
    assert_eq!(facts(&here, second.id), facts(&there, two.packed.id));
}

#[test]
fn counts_tell_used_from_dead_and_garbage() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let count = || fixture.runtime.block_on(usage(&store)).expect("counts");
    assert_eq!((count().raw_bytes, count().garbage_bytes), (0, 0));
    let (second, memory) = mostly_dead(&fixture);
    let counted = count();
    assert_eq!(counted.snapshots.len(), 1);
    let one = &counted.snapshots[0];
    assert_eq!((one.snapshot, one.raw_bytes), (second.id, memory.len() as u64));
    assert_eq!(one.data_bytes, memory.len() as u64);
    assert_eq!(one.stored_bytes, one.exclusive_bytes, "nobody else is left");
    assert!(counted.unique_bytes >= memory.len() as u64);
    assert_eq!(one.unique_bytes, counted.unique_bytes);
    assert_eq!(counted.garbage.values().sum::<u64>(), counted.garbage_bytes);
    assert_eq!(counted.garbage.len(), 1, "of the first alone");
    assert!(
        counted.dead_bytes > 0 && counted.garbage_bytes > 0,
        "a pack and a manifest: {counted:?}"
    );
    let there = fixture.runtime.block_on(store.objects().list("")).expect("lists");
    let there: u64 = there.iter().map(|object| object.bytes).sum();
    assert_eq!(counted.stored_bytes, there);
    fixture.runtime.block_on(store.remove(second.id, second.id)).expect("removes");
    let nothing = count();
    assert_eq!((nothing.raw_bytes, nothing.dead_bytes), (0, 0));
    assert!(nothing.garbage_bytes > there * 9 / 10, "{nothing:?}");
}
