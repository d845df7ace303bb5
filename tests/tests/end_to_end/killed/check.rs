//! What must hold of a store after a kill, after success, and after collection.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use reap_store::collect::{Options, collect};
use reap_store::format::record::Commit;
use reap_store::verify;
use reap_store::{ErrorKind, Node, NodeConfig, SnapshotId, Store};

use super::url;

/// Stores of a scenario; not all are there in each.
const STORES: [&str; 2] = ["store", "other"];

/// A snapshot's files, all in one.
type Digest = blake3::Hash;

/// What can be read of the stores of a scenario: by store.
#[derive(Clone, Debug, Default)]
pub(super) struct Contents(BTreeMap<&'static str, StoreContents>);

#[derive(Clone, Debug, Default)]
struct StoreContents {
    names: BTreeMap<String, SnapshotId>,
    snapshots: BTreeMap<SnapshotId, Digest>,
}

/// What a command finds, and what it makes of it.
pub(super) struct Oracle {
    pub(super) before: Contents,
    pub(super) after: Contents,
}

/// What has happened.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// The command was killed: it has done its work, or nothing.
    Kill,
    /// It said that it has done it.
    Success,
}

impl StoreContents {
    fn digest_of(&self, name: &str) -> Option<&Digest> {
        self.snapshots.get(self.names.get(name)?)
    }
}

impl Contents {
    /// Exports every snapshot of every store under `place`.
    pub(super) fn read(place: &Path) -> Result<Self> {
        let mut contents = Self::default();
        for store in STORES {
            if place.join(store).join("format").exists() {
                let read = read_store(&url(place, store)).with_context(|| store.to_owned())?;
                contents.0.insert(store, read);
            }
        }
        Ok(contents)
    }

    /// The one that was not there before.
    pub(super) fn new_snapshot(&self, before: &Self) -> Result<SnapshotId> {
        let new = self.0["store"].snapshots.keys();
        let mut new = new.filter(|id| !before.0["store"].snapshots.contains_key(id));
        new.next().copied().context("no new snapshot")
    }
}

fn read_store(url: &str) -> Result<StoreContents> {
    let node = Node::start(&NodeConfig::reader(url))?;
    let read = node.block_on(async {
        let mut contents = StoreContents::default();
        let ids: Vec<_> = committed(node.store()).await?.into_keys().collect();
        for id in &ids {
            let snapshot = node.open_id(*id).await?;
            contents.snapshots.insert(*id, export(&snapshot).await?);
        }
        for named in node.store().names().await? {
            // A name may stand for what is removed, as a dead link does.
            if ids.contains(&named.snapshot) {
                contents.names.insert(named.name.to_string(), named.snapshot);
            }
        }
        let options = verify::Options::everything();
        let report = verify::verify(node.store(), &ids, &options, &mut |_| {}).await?;
        ensure!(report.problems.is_empty() && report.warnings.is_empty(), "verify: {report:?}");
        Ok(contents)
    });
    node.block_on(node.release_pins());
    read
}

/// The files of a snapshot as they are exported.
async fn export(snapshot: &std::sync::Arc<reap_store::Snapshot>) -> Result<Digest> {
    let out = super::scratch()?;
    let files = reap_store::export::export(snapshot, out.path(), &mut |_, _| {}).await?;
    let mut hasher = blake3::Hasher::new();
    for file in files {
        let bytes = std::fs::read(&file)?;
        hasher.update(file.file_name().context("a name")?.as_encoded_bytes());
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(&bytes);
    }
    Ok(hasher.finalize())
}

/// Fails where something acknowledged is lost, something half-done can be seen, or, after success,
/// something is missing.
pub(super) fn check(place: &Path, oracle: &Oracle, after: After) -> Result<()> {
    let now = Contents::read(place)?;
    for (store, done) in &oracle.after.0 {
        let nothing = StoreContents::default();
        let before = oracle.before.0.get(store).unwrap_or(&nothing);
        let Some(now) = now.0.get(store) else {
            ensure!(after == After::Kill && before.snapshots.is_empty(), "no {store}");
            continue;
        };
        check_store(before, done, now, after).with_context(|| (*store).to_owned())?;
    }
    Ok(())
}

fn check_store(
    before: &StoreContents,
    done: &StoreContents,
    now: &StoreContents,
    after: After,
) -> Result<()> {
    for (id, digest) in &before.snapshots {
        match now.snapshots.get(id) {
            Some(same) => ensure!(same == digest, "{id} has other bytes"),
            None => ensure!(!done.snapshots.contains_key(id), "{id} is lost"),
        }
    }
    let known: BTreeSet<_> =
        before.snapshots.values().chain(done.snapshots.values()).map(Digest::as_bytes).collect();
    for (id, digest) in &now.snapshots {
        ensure!(known.contains(digest.as_bytes()), "{id} has bytes that nobody packed");
    }
    let names: BTreeSet<_> = before.names.keys().chain(done.names.keys()).collect();
    for name in names.into_iter().chain(now.names.keys()) {
        let is = now.digest_of(name);
        let (was, will_be) = (before.digest_of(name), done.digest_of(name));
        let right = is == will_be || after == After::Kill && is == was;
        ensure!(right, "{name} stands for something else than it should");
    }
    Ok(())
}

/// Collects twice when all that was left is old, and fails where anything is left that no snapshot needs.
pub(super) fn check_nothing_is_left(place: &Path) -> Result<()> {
    for store in STORES {
        let root = place.join(store);
        if !root.exists() {
            continue;
        }
        // The reader that finds out who was killed.
        let readers_dir = Some(place.join("index"));
        let reader = NodeConfig::reader(&url(place, store));
        let node = Node::start(&NodeConfig { readers_dir, ..reader })?;
        node.block_on(node.release_pins());
        for _ in 0..2 {
            make_old(&root)?;
            let options =
                Options { dry_run: false, confirmed: true, lease_timeout: Duration::ZERO };
            node.block_on(collect(node.store(), options))?;
        }
        let (packs, manifests) = node.block_on(needed(node.store()))?;
        let mut left = litter(&root)?;
        for (kind, needed) in [("pack", packs), ("manifest", manifests)] {
            let there = names_in(&root.join(kind))?;
            left.extend(there.difference(&needed).map(|name| format!("{kind}/{name}")));
            ensure!(needed.is_subset(&there), "{store}/{kind}: {needed:?} of {there:?}");
        }
        ensure!(left.is_empty(), "{store}: left after two collections: {left:?}");
    }
    Ok(())
}

async fn needed(store: &Store) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    let (mut packs, mut manifests) = (BTreeSet::new(), BTreeSet::new());
    for (id, commit) in committed(store).await? {
        packs.extend(commit.packs.iter().map(|pack| pack.pack.to_string()));
        manifests.insert(id.to_string());
    }
    Ok((packs, manifests))
}

/// What is there and not removed; transactions that a collector has ended are neither.
async fn committed(store: &Store) -> Result<BTreeMap<SnapshotId, Commit>> {
    let mut committed = BTreeMap::new();
    for id in store.ids().await? {
        match store.commit(id).await {
            Ok(commit) => _ = committed.insert(id, commit),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(committed)
}

/// Staged files, and objects that stand only for somebody at work.
pub(super) fn litter(store: &Path) -> Result<Vec<String>> {
    let mut left = Vec::new();
    let mut directories = vec![store.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let key = path.strip_prefix(store)?.display().to_string();
            let at_work = ["lease/", "pin/", "gc/condemned/", "gc/probe/", "gc/HALT"];
            if key.contains('#') || at_work.iter().any(|prefix| key.starts_with(prefix)) {
                left.push(key);
            }
        }
    }
    Ok(left)
}

fn names_in(directory: &Path) -> Result<BTreeSet<String>> {
    match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(error) => bail!("{}: {error}", directory.display()),
        Ok(entries) => {
            entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
        }
    }
}

/// As if a day had passed.
fn make_old(directory: &Path) -> Result<()> {
    let then = SystemTime::now() - Duration::from_secs(24 * 3600);
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            make_old(&path)?;
        } else {
            std::fs::File::options().write(true).open(&path)?.set_modified(then)?;
        }
    }
    Ok(())
}
