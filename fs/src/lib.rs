//! The read-only mount: `snapshots/NAME/{memory,state,<disks>}` and `by-id/ID/...`.
//!
//! A read flows so:
//!
//! ```text
//! kernel -> FUSE thread -> shim -> tree: inode -> (snapshot, file)
//!        -> read: extents -> all frames in memory? assemble and answer here
//!                            else Snapshot::fetch(Demand) -> a decode thread assembles and answers
//! ```
//!
//! Threads: two to four FUSE threads, each with its own queue to the kernel, and one that tells the
//! kernel which pages to drop ([`poison`]). A panic in a request is answered with `EIO`; the thread
//! lives.
//!
//! No FUSE thread waits for the network or a disk: names are looked up and directories listed on
//! the node's runtime, and answered from there. [`shim`] is thin; [`tree`] and [`read`] are the
//! logic, and know nothing of FUSE. Inode numbers are a pure function of content, so that every
//! name of a snapshot shares one page cache, and a successor process gives the same numbers.

mod errno;
mod mount;
mod opens;
mod poison;
mod read;
mod shim;
mod tree;

pub use mount::{Mount, MountConfig, MountError, StopOutcome, is_under};
