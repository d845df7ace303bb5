//! The one table from errors to errno.

use fuser::Errno;
use reap_store::{Error, ErrorKind};

/// What a system call on the mount answers. `docs/SEMANTICS.md` has the table for people.
pub(crate) fn of(error: &Error) -> Errno {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::Invalid => Errno::ENOENT,
        ErrorKind::Refused => Errno::EACCES,
        ErrorKind::Exists => Errno::EEXIST,
        ErrorKind::Damaged | ErrorKind::Unreachable | ErrorKind::Local => Errno::EIO,
    }
}

/// The same for the bytes of a file that is open: it is there, so it cannot be "not found".
pub(crate) fn of_read(_: &Error) -> Errno {
    Errno::EIO
}
