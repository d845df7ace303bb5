//! Small stores, and the commands that are killed over them.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context, Result};
use reap_store::pack::{Lineage, Request, pack};
use reap_store::{FileKind, Node, NodeConfig, PAGE_SIZE, Store, Touch, WorkingSetContent};

use super::url;

/// A store, and a command over it.
pub(super) struct Scenario {
    pub(super) name: &'static str,
    /// Fills an empty directory: `store`, `other`, and files to pack.
    pub(super) prepare: fn(&Path) -> Result<()>,
    pub(super) arguments: fn(&Path) -> Vec<String>,
    /// The exit code of the command where its work is done already, if not 0.
    pub(super) done_already: Option<i32>,
}

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "init",
        prepare: |_| Ok(()),
        arguments: |_| words(&["init"]),
        done_already: Some(6),
    },
    Scenario {
        name: "pack into an empty store",
        prepare: |place| {
            init(place, "store")?;
            write(place, "memory", &pages(1, 0..90))?;
            write(place, "state", &[7; 5000])?;
            write(place, "disk", &pages(2, 0..20))
        },
        arguments: |place| {
            let disk = format!("root={}", place.join("disk").display());
            let files = ["--memory", "memory", "--state", "state"];
            let mut all = words(&["pack", "--name", "f"]);
            all.extend(in_place(place, &files));
            all.extend(["--disk".into(), disk]);
            all
        },
        done_already: None,
    },
    Scenario {
        name: "pack by a parent",
        prepare: |place| {
            family(place)?;
            write(place, "memory", &[pages(1, 0..60), pages(3, 60..90)].concat())
        },
        arguments: pack_memory,
        done_already: None,
    },
    Scenario {
        name: "pack --diff",
        prepare: |place| {
            family(place)?;
            sparse(place, "memory", 90, &[(5, pages(4, 0..3)), (40, vec![0; PAGE_SIZE])])
        },
        arguments: |place| {
            let mut all = pack_memory(place);
            all.extend(words(&["--diff", "--parent", "f"]));
            all
        },
        done_already: None,
    },
    Scenario {
        name: "gc",
        prepare: garbage,
        arguments: |_| words(&["gc", "--yes", "--lease-timeout", "0"]),
        done_already: None,
    },
    Scenario {
        name: "rm",
        prepare: family,
        arguments: |_| words(&["rm", "g"]),
        done_already: Some(3),
    },
    Scenario {
        name: "tag",
        prepare: family,
        arguments: |_| words(&["tag", "g", "f"]),
        done_already: None,
    },
    Scenario {
        name: "repack",
        prepare: mostly_dead,
        arguments: |_| words(&["repack", "--all"]),
        done_already: None,
    },
    Scenario {
        name: "copy",
        prepare: |place| {
            family(place)?;
            init(place, "other")?;
            pack_as(place, "other", "x", &pages(1, 30..50), Lineage::default())
        },
        arguments: |place| {
            let to = url(place, "other");
            words(&["copy", "g", "--to", &to, "--name", "x"])
        },
        done_already: None,
    },
];

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Options and files of `place`, by turns.
fn in_place(place: &Path, pairs: &[&str]) -> Vec<String> {
    let path = |file: &str| place.join(file).display().to_string();
    pairs.chunks_exact(2).flat_map(|pair| [pair[0].to_owned(), path(pair[1])]).collect()
}

fn pack_memory(place: &Path) -> Vec<String> {
    [words(&["pack", "--name", "f"]), in_place(place, &["--memory", "memory"])].concat()
}

/// Pages that are all different, some of them zero.
fn pages(seed: u8, numbers: std::ops::Range<u32>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for number in numbers {
        let mut page = vec![0; PAGE_SIZE];
        if number % 5 != 0 {
            for (at, byte) in page.iter_mut().enumerate() {
                *byte = seed ^ (at / 7) as u8;
            }
            page[..4].copy_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&page);
    }
    bytes
}

fn write(place: &Path, file: &str, bytes: &[u8]) -> Result<()> {
    Ok(std::fs::write(place.join(file), bytes)?)
}

/// A file of so many pages, with data at these and holes between.
fn sparse(place: &Path, file: &str, page_count: u64, data: &[(u64, Vec<u8>)]) -> Result<()> {
    let out = std::fs::File::create(place.join(file))?;
    out.set_len(page_count * PAGE_SIZE as u64)?;
    for (page, bytes) in data {
        std::os::unix::fs::FileExt::write_all_at(&out, bytes, page * PAGE_SIZE as u64)?;
    }
    Ok(())
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn init(place: &Path, store: &str) -> Result<()> {
    runtime()?.block_on(Store::init(&url(place, store)))?;
    Ok(())
}

/// Packs by the library, and records a working set.
fn pack_as(place: &Path, store: &str, name: &str, memory: &[u8], lineage: Lineage) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), memory)?;
    let memory = reap_store::pack::Input {
        name: "memory".into(),
        kind: FileKind::Memory,
        path: file.path().to_owned(),
    };
    let runtime = tokio::runtime::Runtime::new()?;
    let opened = runtime.block_on(Store::open(&url(place, store)))?;
    let request = Request { lineage, ..Request::new(name.parse()?, vec![memory]) };
    let id = pack(&opened, &runtime, &request, &mut |_| ControlFlow::Continue(()))?.id;
    let node = Node::start(&NodeConfig::reader(&url(place, store)))?;
    let snapshot = node.block_on(node.open_id(id))?;
    let touches: Vec<_> =
        (0..12).map(|page| Touch { file: 0, page: page * 3, at_us: page }).collect();
    node.block_on(node.publish_working_set(&snapshot, &WorkingSetContent::of_recording(&touches)))?;
    drop(snapshot);
    node.block_on(node.release_pins());
    Ok(())
}

fn relatives() -> Lineage {
    Lineage { automatic: true, ..Lineage::default() }
}

/// Snapshots `f` and `g`; `g` refers to pages of `f`.
fn family(place: &Path) -> Result<()> {
    init(place, "store")?;
    pack_as(place, "store", "f", &pages(1, 0..90), relatives())?;
    let store = runtime()?.block_on(Store::open(&url(place, "store")))?;
    let parents = runtime()?.block_on(store.ids())?;
    let lineage = Lineage { parents, ..Lineage::default() };
    pack_as(place, "store", "g", &[pages(1, 0..50), pages(2, 50..90)].concat(), lineage)
}

/// Removes what `name` stands for.
fn remove(place: &Path, name: &str) -> Result<()> {
    let runtime = runtime()?;
    runtime.block_on(async {
        let store = Store::open(&url(place, "store")).await?;
        let id = store.resolve(&name.parse()?).await?;
        store.remove(id, id).await.map_err(anyhow::Error::from)
    })
}

/// Removed snapshots, of which one is needed by another still; a packer that was killed; names that moved.
fn garbage(place: &Path) -> Result<()> {
    family(place)?;
    for (name, seed) in [("h", 5), ("i", 6), ("j", 7)] {
        pack_as(place, "store", name, &pages(seed, 0..40), Lineage::default())?;
    }
    ["f", "h", "i"].iter().try_for_each(|name| remove(place, name))?;
    write(place, "memory", &pages(8, 0..60))?;
    // As far as its manifest.
    let killed = super::KillAt::After(20);
    let scenario = SCENARIOS.iter().find(|one| one.name == "pack by a parent");
    super::run(scenario.context("a scenario")?, place, Some(killed))?;
    Ok(())
}

/// `f` and `g` need few pages of a pack whose snapshot is gone.
fn mostly_dead(place: &Path) -> Result<()> {
    init(place, "store")?;
    pack_as(place, "store", "old", &pages(1, 0..100), Lineage::default())?;
    let store = runtime()?.block_on(Store::open(&url(place, "store")))?;
    let parents = runtime()?.block_on(store.ids())?;
    for (name, seed) in [("f", 2), ("g", 3)] {
        let lineage = Lineage { parents: parents.clone(), ..Lineage::default() };
        let memory = [pages(1, 0..20), pages(seed, 20..60)].concat();
        pack_as(place, "store", name, &memory, lineage)?;
    }
    remove(place, "old")
}
