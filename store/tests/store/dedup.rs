//! Pages of other snapshots: what is referred to, what is not, and that the bytes are right.

use std::os::unix::fs::FileExt;

use reap_store::format::record::{Condemned, seal};

use super::*;

/// Pages that are all different, none zero.
pub(super) fn distinct_bytes(pages: usize, seed: u32) -> Vec<u8> {
    let mut bytes = vec![0u8; pages * PAGE_SIZE];
    for (number, page) in bytes.chunks_exact_mut(PAGE_SIZE).enumerate() {
        for (at, word) in page.chunks_exact_mut(4).enumerate() {
            word.copy_from_slice(&((at as u32 / 7) ^ seed.rotate_left(8)).to_le_bytes());
        }
        page[..4].copy_from_slice(&(number as u32).to_le_bytes());
        page[4..8].copy_from_slice(&seed.to_le_bytes());
    }
    bytes
}

/// `bytes` with some pages replaced.
fn changed(bytes: &[u8], pages: impl IntoIterator<Item = usize>, seed: u32) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for page in pages {
        bytes[page * PAGE_SIZE + 100..][..4].copy_from_slice(&(seed + page as u32).to_le_bytes());
    }
    bytes
}

impl Fixture {
    pub(super) fn lineage(&self) -> Lineage {
        Lineage { automatic: true, index: Some(self.path("index")), ..Lineage::default() }
    }

    /// Packs with whatever relatives there are.
    pub(super) fn pack_related(&self, name: &str, memory: &[u8]) -> Packed {
        self.try_pack(name, memory, |request| request.lineage = self.lineage()).expect("packs")
    }

    pub(super) fn try_pack(
        &self,
        name: &str,
        memory: &[u8],
        set: impl FnOnce(&mut Request),
    ) -> Result<Packed, Error> {
        let path = self.file("input", memory);
        let mut request = self.request(name, &path);
        set(&mut request);
        pack(&self.store(), &self.runtime, &request, &mut |_| ControlFlow::Continue(()))
    }

    /// Packs a diff of `bytes` pages long with `data` at its pages, holes elsewhere.
    fn pack_diff(
        &self,
        parent: SnapshotId,
        pages: usize,
        data: &[(usize, &[u8])],
    ) -> Result<Packed, Error> {
        let path = self.path("diff");
        let file = std::fs::File::create(&path).expect("made");
        file.set_len((pages * PAGE_SIZE) as u64).expect("sized");
        for (page, bytes) in data {
            file.write_all_at(bytes, (page * PAGE_SIZE) as u64).expect("written");
        }
        let mut request = self.request("diff", &path);
        request.diff = true;
        request.lineage.parents = vec![parent];
        pack(&self.store(), &self.runtime, &request, &mut |_| ControlFlow::Continue(()))
    }

    pub(super) fn bytes_of(&self, id: SnapshotId) -> Vec<u8> {
        let node = self.node();
        let snapshot = node.block_on(node.open_id(id)).expect("opens");
        let bytes = read_all(&snapshot, 0).expect("reads");
        node.block_on(node.release_pins());
        bytes
    }

    fn condemn(&self, packs: Vec<reap_store::format::keys::PackId>) {
        let run = SnapshotId::random();
        let directory = self.path("store/gc/condemned");
        std::fs::create_dir_all(&directory).expect("made");
        let record = seal(&Condemned { run, packs });
        std::fs::write(directory.join(run.to_string()), record).expect("written");
    }

    pub(super) fn commit(&self, id: SnapshotId) -> reap_store::format::record::Commit {
        self.runtime.block_on(self.store().commit(id)).expect("is committed")
    }

    fn verify_all(&self) {
        let store = self.store();
        let ids = self.runtime.block_on(store.ids()).expect("lists");
        let report = self.runtime.block_on(super::verify_everything(&store, &ids));
        let report = report.expect("verifies");
        assert!(report.problems.is_empty() && report.warnings.is_empty(), "{report:?}");
    }
}

#[test]
fn a_new_version_stores_only_the_pages_that_changed() {
    let fixture = Fixture::new();
    let memory = distinct_bytes(1000, 1);
    let first = fixture.pack_related("f", &memory);
    assert_eq!((first.statistics.unique_pages, first.statistics.parent_pages), (1000, 0));
    let memory = changed(&memory, [3, 4, 500, 999], 77);
    let second = fixture.pack_related("f", &memory);
    assert_eq!((second.statistics.unique_pages, second.statistics.parent_pages), (4, 996));
    assert_eq!(second.parents, vec![first.id]);
    assert!(fixture.bytes_of(second.id) == memory);
    let packs = fixture.commit(second.id).packs;
    let first_packs = fixture.commit(first.id).packs;
    assert!(first_packs.iter().all(|pack| packs.contains(pack)), "collection must see them");
    let third = fixture.pack_related("f", &memory);
    assert_eq!((third.statistics.unique_pages, third.statistics.pack_bytes), (0, 0));
    assert!(fixture.bytes_of(third.id) == memory);
    fixture.verify_all();
}

#[test]
fn a_base_label_makes_relatives_and_another_name_alone_does_not() {
    let fixture = Fixture::new();
    let memory = distinct_bytes(200, 1);
    let labelled = |name: &str, base: &str| {
        fixture
            .try_pack(name, &memory, |request| {
                request.lineage = fixture.lineage();
                request.labels.insert("base".into(), base.into());
            })
            .expect("packs")
            .statistics
            .parent_pages
    };
    assert_eq!(labelled("one", "debian"), 0);
    assert_eq!(labelled("two", "alpine"), 0);
    assert_eq!(labelled("three", "debian"), 200);
    assert_eq!(fixture.pack_related("four", &memory).statistics.parent_pages, 0);
}

#[test]
fn a_removed_snapshot_is_no_parent() {
    let fixture = Fixture::new();
    let memory = distinct_bytes(100, 1);
    let first = fixture.pack_related("f", &memory);
    let store = fixture.store();
    fixture.runtime.block_on(store.remove(first.id, first.id)).expect("removes");
    let second = fixture.pack_related("f", &memory);
    assert_eq!((second.statistics.unique_pages, second.parents.len()), (100, 0));
    let named = fixture.try_pack("f", &memory, |request| request.lineage.parents = vec![first.id]);
    assert_eq!(named.expect_err("is gone").kind(), ErrorKind::NotFound);
    let unknown = SnapshotId::random();
    let named = fixture.try_pack("f", &memory, |request| request.lineage.parents = vec![unknown]);
    assert_eq!(named.expect_err("never was").kind(), ErrorKind::NotFound);
}

#[test]
fn pages_in_condemned_packs_are_stored_again() {
    let fixture = Fixture::new();
    let memory = distinct_bytes(300, 1);
    let first = fixture.pack_related("f", &memory);
    fixture.condemn(fixture.commit(first.id).packs.iter().map(|pack| pack.pack).collect());
    let second = fixture.pack_related("f", &memory);
    assert_eq!((second.statistics.unique_pages, second.statistics.parent_pages), (300, 0));
    let own = |id| fixture.commit(id).packs.iter().all(|pack| pack.pack.txn == id);
    assert!(own(second.id));
    // A diff over the first needs the pages of its holes all the same: they are copied.
    let diff = fixture.pack_diff(first.id, 300, &[(7, &[9; PAGE_SIZE])]).expect("packs");
    assert!(own(diff.id), "{:?}", fixture.commit(diff.id).packs);
    let mut expected = memory;
    expected[7 * PAGE_SIZE..8 * PAGE_SIZE].fill(9);
    assert!(fixture.bytes_of(diff.id) == expected);
    // A condemned list that cannot be read may condemn anything.
    fixture.create("gc/condemned/x", "what?");
    let path = fixture.file("input", &expected);
    let mut request = fixture.request("f", &path);
    request.lineage = fixture.lineage();
    let store = fixture.store();
    let refused = pack(&store, &fixture.runtime, &request, &mut |_| ControlFlow::Continue(()));
    assert_eq!(refused.expect_err("refused").kind(), ErrorKind::Damaged);
    assert!(fixture.keys(&["lease"]).is_empty());
}

#[test]
fn a_hole_of_a_diff_is_the_parents_page_and_written_zeros_are_zero() {
    let fixture = Fixture::new();
    let mut memory = memory_bytes(2000, 1);
    memory.truncate(memory.len() - 96);
    let parent = fixture.pack("f", &memory);
    let fresh = distinct_bytes(3, 9);
    let zeros = vec![0; 5 * PAGE_SIZE];
    // Pages 700 to 704 are not all zero in the parent, and are written as zeros.
    let data: [(usize, &[u8]); 3] = [(0, &fresh), (700, &zeros), (1500, &fresh)];
    let path_bytes = memory.len() as u64;
    let store = fixture.store();
    let packed = {
        let path = fixture.path("diff");
        let file = std::fs::File::create(&path).expect("made");
        file.set_len(path_bytes).expect("sized");
        for (page, bytes) in data {
            file.write_all_at(bytes, (page * PAGE_SIZE) as u64).expect("written");
        }
        let mut request = fixture.request("diff", &path);
        request.diff = true;
        request.lineage.parents = vec![parent.id];
        pack(&store, &fixture.runtime, &request, &mut |_| ControlFlow::Continue(())).expect("packs")
    };
    let mut expected = memory.clone();
    for (page, bytes) in data {
        expected[page * PAGE_SIZE..][..bytes.len()].copy_from_slice(bytes);
    }
    assert!(fixture.bytes_of(packed.id) == expected);
    assert_eq!(packed.statistics.unique_pages, 3);
    assert_eq!(fixture.pins(), Vec::<String>::new(), "the packer let its parent go");
    // Flat: the parent can go.
    fixture.runtime.block_on(store.remove(parent.id, parent.id)).expect("removes");
    assert!(fixture.bytes_of(packed.id) == expected);
    fixture.verify_all();
}

#[test]
fn what_cannot_be_a_diff_is_refused() {
    let fixture = Fixture::new();
    let memory = distinct_bytes(64, 1);
    let parent = fixture.pack("f", &memory).id;
    let longer = fixture.pack_diff(parent, 65, &[]).expect_err("is longer");
    assert!(longer.to_string().contains("a diff is as long"), "{longer}");
    let full = fixture.pack_diff(parent, 64, &[(0, &memory)]).expect_err("has no holes");
    assert!(full.to_string().contains("no holes"), "{full}");
    let orphan = fixture.try_pack("f", &memory, |request| request.diff = true);
    assert!(orphan.expect_err("has no parent").to_string().contains("--parent"));
    assert!(fixture.keys(&["lease"]).is_empty());
}

fn files_under(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).expect("directory") {
        let path = entry.expect("entry").path();
        if path.is_dir() {
            files.extend(files_under(&path));
        } else {
            files.push(path);
        }
    }
    files
}

/// The index is a hint: whatever became of it, pages are found again and bytes are right.
#[test]
fn a_damaged_index_is_made_again_and_never_gives_wrong_bytes() {
    let fixture = Fixture::new();
    let first = distinct_bytes(400, 1);
    fixture.pack_related("f", &first);
    let memory = changed(&first, [5, 6, 250], 3);
    fixture.pack_related("f", &memory);
    let files = files_under(&fixture.path("index"));
    assert!(files.len() >= 3, "footers, tables, kinships: {files:?}");
    type Damage = fn(Vec<u8>) -> Vec<u8>;
    let damages: [(&str, Damage); 5] = [
        ("emptied", |_| Vec::new()),
        ("cut", |bytes| bytes[..bytes.len() / 2].to_vec()),
        ("a bit flipped early", |mut bytes| {
            let at = bytes.len() / 9;
            bytes[at] ^= 4;
            bytes
        }),
        ("a bit flipped late", |mut bytes| {
            let at = bytes.len() - bytes.len() / 9 - 1;
            bytes[at] ^= 4;
            bytes
        }),
        ("other bytes", |bytes| vec![0xa5; bytes.len()]),
    ];
    for path in files {
        let good = std::fs::read(&path).expect("read");
        for (what, damage) in damages {
            std::fs::write(&path, damage(good.clone())).expect("damaged");
            let packed = fixture.pack_related("f", &memory);
            let found = packed.statistics.parent_pages;
            assert!(found >= 399, "{}: {what}: {found} found", path.display());
            assert!(fixture.bytes_of(packed.id) == memory, "{}: {what}", path.display());
        }
        std::fs::remove_file(&path).unwrap_or_default();
        let packed = fixture.pack_related("f", &memory);
        assert_eq!(packed.statistics.parent_pages, 400, "{} lost", path.display());
    }
    fixture.verify_all();
}

/// Every hint of the table points to some other page; the footers tell.
#[test]
fn wrong_hints_cost_space_and_nothing_else() {
    let fixture = Fixture::new();
    let memory = distinct_bytes(400, 1);
    let first = fixture.pack_related("f", &memory);
    fixture.pack_related("f", &memory);
    let store = fixture.store().id().to_string();
    let table = fixture.path("index").join(store).join("pages").join(first.id.to_string());
    let mut bytes = std::fs::read(&table).expect("a table");
    for entry in bytes[32..].chunks_exact_mut(16) {
        let page = u32::from_le_bytes(entry[12..16].try_into().expect("4 bytes"));
        entry[12..16].copy_from_slice(&((page + 200) % 400).to_le_bytes());
    }
    std::fs::write(&table, bytes).expect("written");
    let packed = fixture
        .try_pack("other", &memory, |request| {
            request.lineage =
                Lineage { parents: vec![first.id], automatic: false, ..fixture.lineage() };
        })
        .expect("packs");
    assert_eq!(packed.statistics.unique_pages, 400);
    assert!(fixture.bytes_of(packed.id) == memory);
}

#[test]
fn an_index_that_cannot_be_kept_is_done_without() {
    let fixture = Fixture::new();
    let memory = distinct_bytes(100, 1);
    fixture.file("index", b"a file where the directory should be");
    fixture.pack_related("f", &memory);
    let second = fixture.pack_related("f", &memory);
    assert_eq!(second.statistics.parent_pages, 100);
    assert!(fixture.bytes_of(second.id) == memory);
}

#[test]
fn a_pack_that_is_lost_or_shortened_is_not_referred_to() {
    let fixture = Fixture::new();
    let memory = distinct_bytes(200, 1);
    fixture.pack_related("f", &memory);
    fixture.pack_related("f", &memory);
    let key = fixture.keys(&["pack"]).pop_first().expect("a pack");
    let mut short = fixture.object(&key);
    short.pop();
    fixture.overwrite(&key, short);
    let second = fixture.pack_related("f", &memory);
    assert_eq!(second.statistics.unique_pages, 200);
    fixture.delete(&key);
    let third = fixture
        .try_pack("g", &memory, |request| {
            let parent = fixture.runtime.block_on(fixture.store().ids()).expect("lists");
            request.lineage = Lineage { parents: parent, ..fixture.lineage() };
        })
        .expect("packs");
    assert_eq!(third.statistics.parent_pages, 200, "the second has them");
    assert!(fixture.bytes_of(third.id) == memory);
}
