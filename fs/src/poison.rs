//! Pages that somebody dirtied through a shared mapping, on their way out of the page cache.
//!
//! The kernel must be told from a thread that serves no requests: to drop a page it may first write
//! it back, which is a request to us. For the same reason a FUSE thread must never wait to hand a
//! range over, so this is no queue: ranges of one inode are merged, and the memory is bounded by the
//! number of inodes. To drop more than was dirtied costs a read, never a wrong byte.

use std::collections::BTreeMap;
use std::ops::Range;

use parking_lot::{Condvar, Mutex};

/// Byte ranges to drop, one an inode.
#[derive(Default)]
pub(crate) struct Poison {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ranges: BTreeMap<u64, Range<u64>>,
    closed: bool,
}

impl Poison {
    /// `range` of inode `ino` was dirtied. Never waits.
    pub(crate) fn add(&self, ino: u64, range: Range<u64>) {
        let mut state = self.state.lock();
        let known = state.ranges.entry(ino).or_insert_with(|| range.clone());
        *known = known.start.min(range.start)..known.end.max(range.end);
        self.changed.notify_one();
    }

    /// The next range to drop; waits for one. `None` once closed.
    pub(crate) fn next(&self) -> Option<(u64, Range<u64>)> {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(next) = state.ranges.pop_first() {
                return Some(next);
            }
            self.changed.wait(&mut state);
        }
    }

    /// The mount has gone, and its pages with it.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_an_inode_are_merged_and_inodes_kept_apart() {
        let poison = Poison::default();
        poison.add(7, 4096..8192);
        poison.add(9, 0..10);
        poison.add(7, 40_960..45_056);
        poison.add(7, 0..4096);
        assert_eq!(poison.next(), Some((7, 0..45_056)));
        assert_eq!(poison.next(), Some((9, 0..10)));
        poison.add(7, 1..2);
        assert_eq!(poison.next(), Some((7, 1..2)));
    }

    #[test]
    fn closing_ends_the_one_who_waits() {
        let poison = Poison::default();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| poison.next());
            poison.close();
            assert_eq!(waiting.join().expect("ends"), None);
        });
    }
}
