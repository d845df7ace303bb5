//! Which way each open file is read: through the page cache of the mount, or passed through to a plain copy, which the kernel
//! reads itself.
//!
//! The kernel refuses (`EIO`) a file that is open in both ways at once. So whoever opens it goes the way of those who have it
//! open; who is first chooses. It is closed for the kernel before it is for us, so what is counted here may be closed already,
//! never the other way round.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// Files that are open, by inode. `Backing` is what the kernel knows a copy by, kept while it is used.
pub(crate) struct Opens<Backing>(Mutex<HashMap<u64, Open<Backing>>>);

struct Open<Backing> {
    count: u64,
    /// Passed through, if there is one.
    backing: Option<Arc<Backing>>,
}

/// How a file that is being opened will be read.
#[derive(Debug)]
pub(crate) enum Way<Backing> {
    /// Through the page cache of the mount.
    Cached,
    /// By the kernel, from a copy.
    PassedThrough(Arc<Backing>),
    /// It is passed through, and whoever could write would write to the copy.
    Refused,
}

impl<Backing> Way<Backing> {
    fn by(backing: Option<Arc<Backing>>) -> Self {
        backing.map_or(Self::Cached, Self::PassedThrough)
    }
}

impl<Backing> Default for Opens<Backing> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<Backing> Opens<Backing> {
    /// Inode `ino` is opened. `backing` is asked where nobody has it open; it must not wait.
    pub(crate) fn open(
        &self,
        ino: u64,
        to_write: bool,
        backing: impl FnOnce() -> Option<Backing>,
    ) -> Way<Backing> {
        let mut opens = self.0.lock();
        if let Some(open) = opens.get_mut(&ino) {
            if to_write && open.backing.is_some() {
                return Way::Refused;
            }
            open.count += 1;
            return Way::by(open.backing.clone());
        }
        let backing = if to_write { None } else { backing().map(Arc::new) };
        opens.insert(ino, Open { count: 1, backing: backing.clone() });
        Way::by(backing)
    }

    /// One who had it open has closed it. One that is not known, as after a restart of ours, changes nothing.
    pub(crate) fn close(&self, ino: u64) {
        let mut opens = self.0.lock();
        let gone = opens.get_mut(&ino).and_then(|open| {
            open.count -= 1;
            (open.count == 0).then_some(())
        });
        let gone = gone.and_then(|()| opens.remove(&ino));
        drop(opens);
        // It may be the last to hold a copy: outside the lock.
        drop(gone);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn no_copy() -> Option<u8> {
        None
    }

    fn must_not_be_asked() -> Option<u8> {
        panic!("the file is open already")
    }

    #[test]
    fn who_comes_later_goes_the_same_way_until_all_have_closed() {
        let opens = Opens::default();
        assert!(matches!(opens.open(7, false, no_copy), Way::Cached));
        assert!(matches!(opens.open(7, false, must_not_be_asked), Way::Cached));
        assert!(matches!(opens.open(8, false, || Some(3)), Way::PassedThrough(_)));
        opens.close(7);
        assert!(matches!(opens.open(7, true, must_not_be_asked), Way::Cached));
        opens.close(7);
        opens.close(7);
        let Way::PassedThrough(first) = opens.open(7, false, || Some(5)) else { panic!() };
        let Way::PassedThrough(second) = opens.open(7, false, must_not_be_asked) else { panic!() };
        assert!(Arc::ptr_eq(&first, &second), "the kernel wants one backing file for all");
    }

    #[test]
    fn who_could_write_is_never_passed_through() {
        let opens = Opens::default();
        assert!(matches!(opens.open(7, true, must_not_be_asked), Way::Cached));
        opens.close(7);
        assert!(matches!(opens.open(7, false, || Some(5)), Way::PassedThrough(..)));
        assert!(matches!(opens.open(7, true, must_not_be_asked), Way::Refused));
        opens.close(7);
        assert!(matches!(opens.open(7, true, must_not_be_asked), Way::Cached));
    }

    #[test]
    fn a_copy_is_let_go_with_the_last_who_has_it_open() {
        let (opens, copy) = (Opens::default(), Arc::new(()));
        for _ in 0..2 {
            drop(opens.open(7, false, || Some(copy.clone())));
        }
        opens.close(7);
        assert_eq!(Arc::strong_count(&copy), 2, "one still has it open");
        opens.close(7);
        assert_eq!(Arc::strong_count(&copy), 1);
        opens.close(7);
        opens.close(99);
    }
}
