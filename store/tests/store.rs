//! The store over a real local directory: what is packed comes out again, and damage is noticed.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test binary counts with small numbers, and may print"
)]

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;

use reap_store::pack::{Input, Lineage, Packed, Request, pack};
use reap_store::verify::{Options, Report, verify};
use reap_store::{
    Error, ErrorKind, FileKind, FrameIndex, Node, NodeConfig, PAGE_SIZE, Snapshot, SnapshotId,
    Source, Store, Touch, Urgency, WorkingSetContent,
};

#[path = "store/collect.rs"]
mod collect;
#[path = "store/dedup.rs"]
mod dedup;
#[path = "store/rewrite.rs"]
mod rewrite;
#[path = "store/verify_levels.rs"]
mod verify_levels;

/// If set, stores are made under this URL instead of in local directories: `tests/servers/test-s3.sh`.
const REMOTE: &str = "REAP_TEST_S3_STORE";

struct Fixture {
    directory: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    url: String,
}

/// Pages with some structure: compressible, incompressible, zero, and repeated ones.
fn memory_bytes(pages: usize, seed: u32) -> Vec<u8> {
    let mut bytes = vec![0u8; pages * PAGE_SIZE];
    for (number, page) in bytes.chunks_exact_mut(PAGE_SIZE).enumerate() {
        let number = number as u32;
        match number % 7 {
            0 | 1 => {}
            2 => page.fill(0x5a),
            3 => {
                let mut state = number ^ seed ^ 0x9e37_79b9;
                for byte in page.iter_mut() {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    *byte = (state >> 24) as u8;
                }
            }
            _ => {
                for (at, word) in page.chunks_exact_mut(4).enumerate() {
                    word.copy_from_slice(
                        &((number / 16).wrapping_add(at as u32 / 9) ^ seed).to_le_bytes(),
                    );
                }
                page[0] = number as u8;
            }
        }
    }
    bytes
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let url = match std::env::var(REMOTE) {
            Ok(base) => format!("{base}/{}", SnapshotId::random()),
            Err(_) => format!("file://{}/store", directory.path().display()),
        };
        runtime.block_on(Store::init(&url)).expect("store is made");
        Self { directory, runtime, url }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn url(&self) -> String {
        self.url.clone()
    }

    fn store(&self) -> Store {
        self.runtime.block_on(Store::open(&self.url())).expect("store opens")
    }

    fn node(&self) -> Node {
        Node::start(&NodeConfig::reader(&self.url())).expect("node starts")
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("file is written");
        path
    }

    fn request(&self, name: &str, memory: &Path) -> Request {
        let memory = Input { name: "memory".into(), kind: FileKind::Memory, path: memory.into() };
        Request::new(name.parse().expect("a good name"), vec![memory])
    }

    fn pack(&self, name: &str, memory: &[u8]) -> Packed {
        let path = self.file("input", memory);
        let request = self.request(name, &path);
        pack(&self.store(), &self.runtime, &request, &mut |_| ControlFlow::Continue(()))
            .expect("packs")
    }

    /// Keys under some prefixes, of every transaction.
    fn keys(&self, prefixes: &[&str]) -> BTreeSet<String> {
        let store = self.store();
        let list = |prefix: &&str| {
            self.runtime.block_on(store.objects().list(prefix)).expect("lists").into_iter()
        };
        prefixes.iter().flat_map(list).map(|object| object.key).collect()
    }

    fn create(&self, key: &str, text: &str) {
        self.overwrite(key, text.into());
    }

    /// Keys of all pins, of every node.
    fn pins(&self) -> Vec<String> {
        self.keys(&["pin"]).into_iter().collect()
    }

    fn delete(&self, key: &str) {
        self.runtime.block_on(self.store().objects().delete(key)).expect("is deleted");
    }

    fn object(&self, key: &str) -> Vec<u8> {
        let store = self.store();
        self.runtime.block_on(store.objects().get(key, 1 << 30)).expect("is read").into()
    }

    /// Puts other bytes in the place of an object's.
    fn overwrite(&self, key: &str, bytes: Vec<u8>) {
        let store = self.store();
        self.runtime.block_on(store.objects().overwrite(key, bytes)).expect("is written");
    }

    /// Files of a local store.
    fn objects_under(&self, kind: &str) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.path("store").join(kind)) else {
            return Vec::new();
        };
        entries.map(|entry| entry.expect("entry").path()).collect()
    }
}

async fn verify_everything(store: &Store, ids: &[SnapshotId]) -> Result<Report, Error> {
    verify(store, ids, &Options::everything(), &mut |_| {}).await
}

fn read_all(snapshot: &Arc<Snapshot>, file: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let mut page = 0;
    while let Some(extent) = snapshot.extent(file, page) {
        let count = extent.pages as u32;
        match extent.source {
            Source::Zero => bytes.resize(bytes.len() + count as usize * PAGE_SIZE, 0),
            Source::Frame { frame, position } => {
                let (sender, receiver) = mpsc::channel();
                snapshot.fetch(&[frame], Urgency::Demand, move |_, frame| {
                    sender.send(frame).expect("receiver");
                });
                let frame = receiver.recv().expect("answered")?;
                bytes.extend_from_slice(frame.pages(position, count));
            }
        }
        page += extent.pages;
    }
    bytes.truncate(snapshot.files()[file].size as usize);
    Ok(bytes)
}

#[test]
fn what_is_packed_comes_out_bit_for_bit() {
    let fixture = Fixture::new();
    let mut memory = memory_bytes(3000, 1);
    memory.truncate(memory.len() - 1234);
    let packed = fixture.pack("one:v1", &memory);
    assert_eq!(packed.statistics.pages, 3000);
    assert!(packed.statistics.zero_pages >= 3000 * 2 / 7 - 1);
    assert!(packed.statistics.duplicate_pages >= 400, "{:?}", packed.statistics);
    let node = fixture.node();
    let name = "one:v1".parse().expect("a name");
    let snapshot = node.block_on(node.open_name(&name)).expect("opens");
    assert!(read_all(&snapshot, 0).expect("reads") == memory);
    let out = fixture.path("out");
    let files = node
        .block_on(reap_store::export::export(&snapshot, &out, &mut |_, _| {}))
        .expect("exports");
    assert_eq!(files, vec![out.join("memory")]);
    assert!(std::fs::read(out.join("memory")).expect("exported") == memory);
    assert!(fixture.keys(&["lease"]).is_empty(), "the lease is given up");
    assert_eq!(fixture.keys(&["pin"]).len(), 1);
    node.block_on(node.release_pins());
}

#[test]
fn many_readers_of_one_cold_frame_cause_one_read() {
    let fixture = Fixture::new();
    fixture.pack("one", &memory_bytes(64, 1));
    let node = fixture.node();
    let snapshot = node.block_on(node.open_name(&"one".parse().expect("name"))).expect("opens");
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..100 {
            let (snapshot, sender) = (snapshot.clone(), sender.clone());
            scope.spawn(move || {
                snapshot.fetch(&[FrameIndex(0)], Urgency::Demand, move |_, frame| {
                    sender.send(frame.is_ok()).expect("receiver");
                });
            });
        }
    });
    drop(sender);
    assert_eq!(receiver.iter().filter(|good| *good).count(), 100);
    assert_eq!(node.counters().store_reads.load(std::sync::atomic::Ordering::Relaxed), 1);
}

#[test]
fn a_working_set_gives_the_touched_pages_in_order() {
    let fixture = Fixture::new();
    let memory = memory_bytes(2000, 1);
    fixture.pack("one", &memory);
    let node = fixture.node();
    let snapshot = node.block_on(node.open_name(&"one".parse().expect("name"))).expect("opens");
    let touches: Vec<Touch> = (0..600u64)
        .map(|number| Touch { file: 0, page: (number * 37) % 2000, at_us: number * 10 })
        .collect();
    assert!(node.block_on(node.working_set(&snapshot)).expect("lists").is_none());
    let sequence = node
        .block_on(node.publish_working_set(&snapshot, &WorkingSetContent::of_recording(&touches)))
        .expect("publishes");
    assert_eq!(sequence, 1);
    let set = node.block_on(node.working_set(&snapshot)).expect("lists").expect("is there");
    assert_eq!(set.data_pages() + set.zero_pages(), 600);
    let (sender, receiver) = mpsc::channel();
    set.fetch(Urgency::Prefetch, move |number, frame| {
        sender.send((number, frame.expect("verified"))).expect("receiver");
    });
    let mut seen = 0;
    for (number, frame) in receiver {
        let mut position = 0;
        for run in set.runs(number) {
            let from = run.first_page as usize * PAGE_SIZE;
            let expected = &memory[from..from + run.pages as usize * PAGE_SIZE];
            assert!(frame.pages(position, run.pages) == expected);
            position += run.pages;
        }
        seen += u64::from(position);
    }
    assert_eq!(seen, set.data_pages());
    for page in 0..2000 {
        let run = |frame: usize| {
            (set.runs(frame).iter())
                .find(|run| (run.first_page..run.first_page + u64::from(run.pages)).contains(&page))
        };
        let frame = (0..set.frame_count()).find(|frame| run(*frame).is_some());
        assert_eq!(set.place(0, page).map(|(frame, _)| frame), frame, "page {page}");
        assert_eq!(set.place(1, page), None);
        let Some((frame, position)) = set.place(0, page) else { continue };
        let (sender, receiver) = mpsc::channel();
        set.fetch_one(frame, Urgency::Demand, move |frame| {
            sender.send(frame.expect("verified")).expect("receiver");
        });
        let expected = &memory[page as usize * PAGE_SIZE..][..PAGE_SIZE];
        assert!(receiver.recv().expect("called").pages(position, 1) == expected, "page {page}");
    }
    for run in set.zero_runs() {
        let from = run.first_page as usize * PAGE_SIZE;
        assert!(memory[from..from + run.pages as usize * PAGE_SIZE].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn names_move_and_removed_snapshots_are_gone() {
    let fixture = Fixture::new();
    let first = fixture.pack("name", &memory_bytes(50, 1));
    let second = fixture.pack("name", &memory_bytes(50, 2));
    let store = fixture.store();
    let name = "name".parse().expect("a name");
    assert_eq!(fixture.runtime.block_on(store.resolve(&name)).expect("resolves"), second.id);
    let mut ids = fixture.runtime.block_on(store.ids()).expect("lists");
    ids.sort();
    let mut expected = vec![first.id, second.id];
    expected.sort();
    assert_eq!(ids, expected);
    fixture.runtime.block_on(store.remove(second.id, second.id)).expect("removes");
    assert_eq!(fixture.runtime.block_on(store.ids()).expect("lists"), vec![first.id]);
    let node = fixture.node();
    let error = node.block_on(node.open_name(&name)).err().expect("is gone");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(fixture.pins().is_empty());
}

#[test]
fn a_file_that_changes_while_it_is_packed_fails_the_pack() {
    use std::os::unix::fs::FileExt;
    let fixture = Fixture::new();
    let path = fixture.file("input", &memory_bytes(2000, 1));
    let request = fixture.request("one", &path);
    let writer = std::fs::OpenOptions::new().write(true).open(&path).expect("opens");
    let mut written = false;
    let outcome = pack(&fixture.store(), &fixture.runtime, &request, &mut |_| {
        if !written {
            writer.write_all_at(b"changed", 100).expect("writes");
            written = true;
        }
        ControlFlow::Continue(())
    });
    assert!(written);
    let error = outcome.expect_err("noticed");
    assert!(error.to_string().contains("changed while it was packed"), "{error}");
    assert!(fixture.keys(&["snap"]).is_empty());
    assert!(fixture.keys(&["lease"]).is_empty());
}

#[test]
fn a_file_that_is_linked_while_it_is_packed_is_packed() {
    let fixture = Fixture::new();
    let bytes = memory_bytes(2000, 1);
    let path = fixture.file("input", &bytes);
    let request = fixture.request("one", &path);
    let mut linked = None;
    let outcome = pack(&fixture.store(), &fixture.runtime, &request, &mut |_| {
        let link = || std::fs::hard_link(&path, path.with_extension("jail")).expect("links");
        linked.get_or_insert_with(link);
        ControlFlow::Continue(())
    });
    assert!(linked.is_some());
    outcome.expect("packs");
}

/// Every changed byte and every truncation of every object is noticed by `verify`, and what can be
/// read in spite of it is right.
#[test]
fn damage_anywhere_is_noticed_and_never_read() {
    let fixture = Fixture::new();
    let memory = memory_bytes(300, 1);
    let packed = fixture.pack("one", &memory);
    let node = fixture.node();
    let snapshot = node.block_on(node.open_id(packed.id)).expect("opens");
    let touches: Vec<Touch> = (0..200).map(|page| Touch { file: 0, page, at_us: page }).collect();
    node.block_on(node.publish_working_set(&snapshot, &WorkingSetContent::of_recording(&touches)))
        .expect("publishes");
    drop((snapshot, node));
    let store = fixture.store();
    let verify = || fixture.runtime.block_on(verify_everything(&store, &[packed.id]));
    let clean = verify().expect("verifies");
    assert!(clean.problems.is_empty() && clean.warnings.is_empty(), "{clean:?}");
    assert_eq!(clean.working_sets, 1);
    for kind in ["pack", "manifest", "snap", "ws"] {
        let mut paths = fixture.objects_under(kind);
        if kind == "ws" {
            paths = paths
                .iter()
                .flat_map(|path| std::fs::read_dir(path).expect("dir"))
                .map(|entry| entry.expect("entry").path())
                .collect();
        }
        assert_eq!(paths.len(), 1, "{kind}");
        let good = std::fs::read(&paths[0]).expect("object");
        let stride = (good.len() / 150).max(1);
        let damages = (0..good.len()).step_by(stride).map(|at| {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << (at % 8);
            (format!("bit at {at}"), bytes)
        });
        let truncations = (0..20).map(|part| {
            let length = good.len() * part / 20;
            (format!("truncated to {length}"), good[..length].to_vec())
        });
        for (what, bytes) in damages.chain(truncations) {
            std::fs::write(&paths[0], bytes).expect("damaged");
            let report = verify().expect("verifies");
            let findings = if kind == "ws" { &report.warnings } else { &report.problems };
            assert_eq!(findings.len(), 1, "{kind}: {what}: {report:?}");
            let node = fixture.node();
            let opened = node.block_on(node.open_id(packed.id));
            if let Ok(snapshot) = &opened
                && let Ok(read) = read_all(snapshot, 0)
            {
                assert!(read == memory, "{kind}: {what}");
            }
            if kind == "ws" {
                let set = node.block_on(node.working_set(opened.as_ref().expect("opens")));
                set.expect("a damaged working set is no error");
            }
        }
        std::fs::write(&paths[0], good).expect("restored");
    }
    assert!(verify().expect("verifies").problems.is_empty());
}

#[test]
fn wrong_input_is_refused_before_anything_is_written() {
    let fixture = Fixture::new();
    let store = fixture.store();
    let empty = fixture.file("empty", b"");
    for (path, kind) in [
        (empty, ErrorKind::Invalid),
        (fixture.path("missing"), ErrorKind::NotFound),
        (fixture.path("store"), ErrorKind::Invalid),
    ] {
        let request = fixture.request("one", &path);
        let error = pack(&store, &fixture.runtime, &request, &mut |_| ControlFlow::Continue(()))
            .expect_err("refused");
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
    }
    assert!(fixture.keys(&["pack"]).is_empty() && fixture.keys(&["lease"]).is_empty());
    let not_a_store = format!("file://{}", fixture.directory.path().display());
    let error = fixture.runtime.block_on(Store::open(&not_a_store)).err().expect("refused");
    assert!(error.to_string().contains("is not a store"), "{error}");
    let error = fixture.runtime.block_on(Store::init(&not_a_store)).err().expect("refused");
    assert!(error.to_string().contains("is not empty"), "{error}");
    let error = fixture.runtime.block_on(Store::init(&fixture.url())).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::Exists);
}
