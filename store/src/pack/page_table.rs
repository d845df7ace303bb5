//! Which pages this snapshot has stored already: a bounded, forgetful map.

use std::collections::HashMap;

use crate::id::Hash;

/// Pages in one generation. Two generations are 1 Mi pages: all pages of a 4 GiB guest, in at most
/// about 80 MiB of memory. Forgetting a page only costs storing it again.
const GENERATION_PAGES: usize = 1 << 19;

/// Where a page is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Frame of the snapshot.
    pub(super) frame: u32,
    /// Page of the frame.
    pub(super) position: u32,
}

/// Pages seen lately: the young generation takes up what is new or seen again; when it is full the
/// old one is forgotten and the young one becomes old.
#[derive(Default)]
pub(super) struct PageTable {
    young: HashMap<Hash, Place>,
    old: HashMap<Hash, Place>,
}

impl PageTable {
    pub(super) fn get(&mut self, page_id: &Hash) -> Option<Place> {
        if let Some(place) = self.young.get(page_id) {
            return Some(*place);
        }
        let place = self.old.remove(page_id)?;
        self.insert(*page_id, place);
        Some(place)
    }

    pub(super) fn insert(&mut self, page_id: Hash, place: Place) {
        if self.young.len() >= GENERATION_PAGES {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(page_id, place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recent_pages_are_found_and_memory_is_bounded() {
        let mut table = PageTable::default();
        let page_id = |number: u32| {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&number.to_le_bytes());
            Hash(bytes)
        };
        let count = 3 * GENERATION_PAGES as u32;
        for number in 0..count {
            table.insert(page_id(number), Place { frame: number, position: 0 });
        }
        assert_eq!(table.get(&page_id(count - 1)), Some(Place { frame: count - 1, position: 0 }));
        assert_eq!(table.get(&page_id(0)), None);
        assert!(table.young.len() + table.old.len() <= 2 * GENERATION_PAGES);
    }
}
