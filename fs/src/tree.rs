//! The tree of the mount: which inode is what, without FUSE.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;
use reap_store::{Hash, PAGE_SIZE, Snapshot, SnapshotId};

/// The root directory.
pub(crate) const ROOT: u64 = 1;
/// `snapshots`.
pub(crate) const NAMES: u64 = 2;
/// `by-id`.
pub(crate) const IDS: u64 = 3;
/// Inode numbers below are fixed.
const FIRST_HASHED: u64 = 16;

/// What an inode is.
#[derive(Clone)]
pub(crate) enum Entry {
    Root,
    Names,
    Ids,
    Directory(Arc<Snapshot>),
    File(Arc<Snapshot>, usize),
}

/// What `stat` tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Attributes {
    pub(crate) ino: u64,
    pub(crate) is_directory: bool,
    pub(crate) bytes: u64,
    /// Of 512 bytes: as many as are not zero.
    pub(crate) blocks: u64,
    pub(crate) modified: SystemTime,
}

/// The directory of a snapshot, whatever name it was found under.
pub(crate) fn directory_ino(id: SnapshotId) -> u64 {
    hashed(id, u32::MAX)
}

/// A file of a snapshot.
pub(crate) fn file_ino(id: SnapshotId, file: usize) -> u64 {
    hashed(id, u32::try_from(file).unwrap_or(u32::MAX - 1))
}

fn hashed(id: SnapshotId, what: u32) -> u64 {
    let mut bytes = [0; 20];
    bytes[..16].copy_from_slice(id.as_bytes());
    bytes[16..].copy_from_slice(&what.to_le_bytes());
    let Hash(hash) = Hash::of(&bytes);
    let mut number = [0; 8];
    number.copy_from_slice(&hash[..8]);
    u64::from_le_bytes(number).max(FIRST_HASHED)
}

impl Entry {
    pub(crate) fn ino(&self) -> u64 {
        match self {
            Self::Root => ROOT,
            Self::Names => NAMES,
            Self::Ids => IDS,
            Self::Directory(snapshot) => directory_ino(snapshot.id()),
            Self::File(snapshot, file) => file_ino(snapshot.id(), *file),
        }
    }

    pub(crate) fn attributes(&self) -> Attributes {
        let ino = self.ino();
        match self {
            Self::File(snapshot, file) => Attributes {
                ino,
                is_directory: false,
                bytes: snapshot.files()[*file].size,
                blocks: snapshot.data_pages(*file) * (PAGE_SIZE as u64 / 512),
                modified: snapshot.created(),
            },
            Self::Directory(snapshot) => Attributes {
                ino,
                is_directory: true,
                bytes: 0,
                blocks: 0,
                modified: snapshot.created(),
            },
            _ => {
                let modified = SystemTime::UNIX_EPOCH;
                Attributes { ino, is_directory: true, bytes: 0, blocks: 0, modified }
            }
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Directory(one), Self::Directory(other)) => one.id() == other.id(),
            (Self::File(one, file), Self::File(other, other_file)) => {
                one.id() == other.id() && file == other_file
            }
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }
}

/// The entry called `name` in a snapshot's directory.
pub(crate) fn file_named(snapshot: &Arc<Snapshot>, name: &str) -> Option<Entry> {
    let file = snapshot.files().iter().position(|file| file.name == name)?;
    Some(Entry::File(snapshot.clone(), file))
}

/// Another entry has the same inode number; one in 2^64 pairs does.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Collision;

/// The inodes that the kernel knows, with how often it looked each up. An inode keeps its snapshot
/// open; the kernel forgets it sooner or later.
#[derive(Default)]
pub(crate) struct Inodes(Mutex<HashMap<u64, (Entry, u64)>>);

impl Inodes {
    pub(crate) fn get(&self, ino: u64) -> Option<Entry> {
        match ino {
            ROOT => Some(Entry::Root),
            NAMES => Some(Entry::Names),
            IDS => Some(Entry::Ids),
            _ => self.0.lock().get(&ino).map(|(entry, _)| entry.clone()),
        }
    }

    /// The kernel is about to be told of `entry`.
    pub(crate) fn looked_up(&self, entry: &Entry) -> Result<(), Collision> {
        match entry.ino() {
            fixed if fixed < FIRST_HASHED => Ok(()),
            ino => self.admit(ino, entry),
        }
    }

    fn admit(&self, ino: u64, entry: &Entry) -> Result<(), Collision> {
        let mut inodes = self.0.lock();
        let (known, lookups) = inodes.entry(ino).or_insert_with(|| (entry.clone(), 0));
        if !known.is_same(entry) {
            return Err(Collision);
        }
        *lookups += 1;
        Ok(())
    }

    /// The kernel forgets so many lookups.
    pub(crate) fn forget(&self, ino: u64, lookups: u64) {
        let mut inodes = self.0.lock();
        let gone = inodes.get_mut(&ino).and_then(|(_, known)| {
            *known = known.saturating_sub(lookups);
            (*known == 0).then_some(())
        });
        let dropped = gone.and_then(|()| inodes.remove(&ino));
        drop(inodes);
        // The last reference to a snapshot may go here: outside the lock.
        drop(dropped);
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.0.lock().len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_numbers_depend_on_content_alone() {
        let id = SnapshotId::from_bytes([7; 16]);
        assert_eq!(file_ino(id, 0), file_ino(id, 0));
        assert_ne!(file_ino(id, 0), file_ino(id, 1));
        assert_ne!(directory_ino(id), file_ino(id, 0));
        assert_ne!(file_ino(id, 0), file_ino(SnapshotId::from_bytes([8; 16]), 0));
        // A change here breaks the promise to a successor process.
        assert_eq!(file_ino(id, 0), 14_029_638_099_784_365_762);
    }

    #[test]
    fn fixed_inodes_are_never_forgotten() {
        let inodes = Inodes::default();
        inodes.looked_up(&Entry::Names).expect("no collision");
        inodes.forget(NAMES, 5);
        assert!(matches!(inodes.get(NAMES), Some(Entry::Names)));
        assert_eq!(inodes.len(), 0);
        assert!(inodes.get(99).is_none());
    }

    #[test]
    fn an_inode_lives_as_long_as_its_lookups_and_a_collision_is_refused() {
        let inodes = Inodes::default();
        inodes.admit(99, &Entry::Names).expect("new");
        inodes.admit(99, &Entry::Names).expect("the same again");
        assert_eq!(inodes.admit(99, &Entry::Ids), Err(Collision));
        assert!(matches!(inodes.get(99), Some(Entry::Names)));
        inodes.forget(99, 1);
        assert_eq!(inodes.len(), 1);
        inodes.forget(99, 1);
        assert_eq!(inodes.len(), 0);
    }
}
