//! What this node remembers of a store's packs, so that a packer need not ask for it again: footers,
//! page tables and what commit records say of names. Any of it may be lost, old or damaged: it is
//! only ever a hint, checked before it is used and fetched or made again when it is wrong.

mod footer;
mod mapped;
mod table;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::format::record::{self, Commit, PackRef};
use crate::format::{Malformed, pack};
use crate::store::Store;
use crate::{Error, SnapshotId};
pub(super) use footer::PackPages;
use mapped::Mapped;
pub(super) use table::Table;

/// Bytes of a pack's end that are asked for first: the footer of most packs.
const FIRST_READ_BYTES: u64 = 1 << 20;
/// Most bytes of the index of one store on this node: 8 GiB hold some 160 million pages. What was
/// used longest ago goes first.
const MOST_BYTES: u64 = 8 << 30;
/// Longest record of kinships that is read back: some million snapshots.
const MOST_KINSHIP_BYTES: u64 = 256 << 20;

/// What of a commit record tells whether a snapshot may be a parent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Kinship {
    pub(super) created_unix_ms: u64,
    pub(super) name: String,
    #[serde(default)]
    pub(super) base: Option<String>,
}

impl Kinship {
    pub(super) fn of(commit: &Commit) -> Self {
        Self {
            created_unix_ms: commit.created_unix_ms,
            name: commit.name.clone(),
            base: commit.labels.get(super::lineage::BASE_LABEL).cloned(),
        }
    }
}

impl record::Record for BTreeMap<String, Kinship> {
    fn check(&self) -> Result<(), Malformed> {
        Ok(())
    }
}

/// The index of one store.
pub(super) struct Index {
    directory: PathBuf,
    /// Where nothing is to be remembered, the directory goes with the packer.
    _temporary: Option<tempfile::TempDir>,
}

impl Index {
    /// The index of `store` under `directory`, or one that is forgotten at once: where there is no
    /// directory, or it cannot be written to.
    pub(super) fn open(store: SnapshotId, directory: Option<&Path>) -> Result<Self, Error> {
        if let Some(directory) = directory {
            match Self::make(directory.join(store.to_string()), None) {
                Ok(index) => return Ok(index),
                Err(error) => tracing::warn!("nothing is remembered: {error}"),
            }
        }
        let temporary = tempfile::tempdir();
        let temporary = temporary.map_err(|error| Error::local("making an index", error))?;
        Self::make(temporary.path().to_owned(), Some(temporary))
    }

    fn make(directory: PathBuf, temporary: Option<tempfile::TempDir>) -> Result<Self, Error> {
        for part in ["footer", "pages"] {
            let path = directory.join(part);
            std::fs::create_dir_all(&path).map_err(|error| Error::local(path.display(), error))?;
        }
        Ok(Self { directory, _temporary: temporary })
    }

    /// The pages of a pack, from this node or from the pack's own end.
    pub(super) async fn pack(&self, store: &Store, pack: &PackRef) -> Result<PackPages, Error> {
        let key = pack.pack.key();
        // Whatever this node remembers: a page is only referenced in a pack that is there.
        if store.objects().length(&key).await? != pack.bytes {
            return Err(Error::damaged(&key, "has the wrong length"));
        }
        let path = self.directory.join("footer").join(pack.pack.to_string());
        if let Ok(bytes) = Mapped::open(&path) {
            match PackPages::verify(pack.pack, pack.bytes, bytes) {
                Ok(pages) => {
                    touch(&path);
                    return Ok(pages);
                }
                Err(why) => tracing::warn!("{}: {why}; fetching it again", path.display()),
            }
        }
        let bytes = fetch_footer(store, pack).await?;
        self.put(&path, |staged| std::fs::write(staged, &bytes))?;
        let mapped = Mapped::open(&path).map_err(|error| Error::local(path.display(), error))?;
        PackPages::verify(pack.pack, pack.bytes, mapped)
            .map_err(|why| Error::damaged(pack.pack.key(), why))
    }

    /// The page table of a snapshot, whose packs are numbered as in its commit record. One that lacks
    /// packs (not `whole`) is not remembered.
    pub(super) fn table(
        &self,
        snapshot: SnapshotId,
        packs: &[(u32, &PackPages)],
        whole: bool,
    ) -> Result<Table, Error> {
        let name = if whole { snapshot.to_string() } else { format!("{snapshot}-part") };
        let path = self.directory.join("pages").join(name);
        if whole && let Ok(bytes) = Mapped::open(&path) {
            match Table::check(snapshot, bytes) {
                Ok(table) => {
                    touch(&path);
                    return Ok(table);
                }
                Err(why) => tracing::warn!("{}: {why}; making it again", path.display()),
            }
        }
        self.put(&path, |staged| table::write(staged, snapshot, packs))?;
        let mapped = Mapped::open(&path).map_err(|error| Error::local(path.display(), error))?;
        Table::check(snapshot, mapped).map_err(|why| Error::local(path.display(), why))
    }

    /// What is remembered of commit records; nothing where it does not unseal.
    pub(super) fn kinships(&self) -> BTreeMap<String, Kinship> {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(self.directory.join("snapshots"));
        let read = file.and_then(|file| file.take(MOST_KINSHIP_BYTES).read_to_end(&mut bytes));
        read.ok().and_then(|_| record::unseal(&bytes).ok()).unwrap_or_default()
    }

    /// Remembers them.
    pub(super) fn remember(&self, kinships: &BTreeMap<String, Kinship>) -> Result<(), Error> {
        let path = self.directory.join("snapshots");
        self.put(&path, |staged| std::fs::write(staged, record::seal(kinships)))
    }

    /// Writes a file under a name of its own and moves it to `path`, so that a mapping of `path`
    /// never changes and two packers never mix.
    fn put(
        &self,
        path: &Path,
        write: impl FnOnce(&Path) -> std::io::Result<()>,
    ) -> Result<(), Error> {
        let staged = self.directory.join(format!("staged-{}", SnapshotId::random()));
        let written = write(&staged).and_then(|()| std::fs::rename(&staged, path));
        written.map_err(|error| {
            std::fs::remove_file(&staged).unwrap_or_default();
            Error::local(path.display(), error)
        })
    }

    /// Forgets what was used longest ago, until the index is within its bound.
    pub(super) fn prune(&self) {
        self.prune_to(MOST_BYTES);
    }

    fn prune_to(&self, most_bytes: u64) {
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for part in ["footer", "pages", ""] {
            let entries = std::fs::read_dir(self.directory.join(part));
            for entry in entries.into_iter().flatten().flatten() {
                if let Ok(metadata) = entry.metadata()
                    && metadata.is_file()
                    && let Ok(modified) = metadata.modified()
                {
                    files.push((modified, metadata.len(), entry.path()));
                }
            }
        }
        files.sort_unstable();
        let mut bytes: u64 = files.iter().map(|(_, length, _)| length).sum();
        for (_, length, path) in files {
            if bytes <= most_bytes {
                break;
            }
            std::fs::remove_file(path).unwrap_or_default();
            bytes -= length;
        }
    }
}

/// Marks a file as used now, for [`Index::prune`]; where that fails it is only forgotten sooner.
fn touch(path: &Path) {
    let now = SystemTime::now();
    std::fs::File::open(path).and_then(|file| file.set_modified(now)).unwrap_or_default();
}

/// The end of a pack, from its footer's first byte on; not verified yet.
async fn fetch_footer(store: &Store, pack: &PackRef) -> Result<Vec<u8>, Error> {
    let key = pack.pack.key();
    let damaged = |why: Malformed| Error::damaged(&key, why);
    let length = pack.bytes;
    let begin = length.saturating_sub(FIRST_READ_BYTES);
    let end = store.objects().get_range(&key, begin..length).await?;
    let trailer =
        end.len().checked_sub(pack::TRAILER_BYTES).ok_or_else(|| damaged("is short".into()))?;
    let footer = pack::footer_range(&end[trailer..], length).map_err(damaged)?;
    if footer.start >= begin {
        let skipped = usize::try_from(footer.start - begin).unwrap_or(usize::MAX);
        return Ok(end.get(skipped..).unwrap_or_default().to_vec());
    }
    Ok(store.objects().get_range(&key, footer.start..length).await?.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_is_bounded_and_forgets_what_was_used_longest_ago() {
        let directory = tempfile::tempdir().expect("directory");
        let index = Index::open(SnapshotId::random(), Some(directory.path())).expect("opens");
        for number in 0..10u64 {
            let path = index.directory.join("footer").join(number.to_string());
            std::fs::write(&path, vec![0; 1000]).expect("written");
            let used = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(number);
            let file = std::fs::File::open(&path).expect("opens");
            file.set_modified(used).expect("dated");
        }
        index.prune_to(4500);
        let left = |number: u64| index.directory.join("footer").join(number.to_string()).exists();
        assert_eq!((0..10).filter(|number| left(*number)).collect::<Vec<_>>(), [6, 7, 8, 9]);
    }
}

/// What fuzzing reads of a node's index.
#[cfg(feature = "fuzzing")]
pub(crate) mod fuzzing {
    use super::mapped::Mapped;
    use super::{Kinship, PackPages, Table};
    use crate::SnapshotId;
    use crate::format::keys::PackId;
    use crate::format::{Malformed, record};
    use crate::id::Hash;

    /// Looks `page_id` up in a page table, and counts what it finds.
    pub(crate) fn page_table(
        snapshot: SnapshotId,
        bytes: &[u8],
        page_id: &Hash,
    ) -> Result<usize, Malformed> {
        let mapped = Mapped::of(bytes).map_err(|error| Malformed(error.to_string()))?;
        Ok(Table::check(snapshot, mapped)?.hints(page_id).count())
    }

    /// Looks at every page of a footer, and counts those that have a place.
    pub(crate) fn pack_pages(
        pack: PackId,
        pack_bytes: u64,
        bytes: &[u8],
    ) -> Result<(u32, usize), Malformed> {
        let mapped = Mapped::of(bytes).map_err(|error| Malformed(error.to_string()))?;
        let pages = PackPages::verify(pack, pack_bytes, mapped)?;
        let count = pages.page_count();
        let known = |page: &u32| pages.page_id(*page).is_some() && pages.place(*page).is_some();
        Ok((count, (0..count).filter(known).count()))
    }

    /// Reads what a node remembers of snapshots.
    pub(crate) fn kinships(bytes: &[u8]) -> Result<usize, Malformed> {
        let read: std::collections::BTreeMap<String, Kinship> = record::unseal(bytes)?;
        Ok(read.len())
    }
}
