//! The content-addressed snapshot store.
//!
//! Start reading at [`Snapshot`]: it is the one deep interface, "give me these frames, at this
//! urgency". [`Node`] opens snapshots, [`pack`] writes them, [`format`] is every stored byte.

#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "tests count with small numbers"
    )
)]

pub mod collect;
pub mod copy;
pub mod error;
pub mod export;
mod fetch;
pub mod format;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod id;
pub mod keep;
pub mod node;
pub mod objects;
pub mod pack;
mod plain;
mod probe;
mod reader;
mod reads;
pub mod repack;
pub mod repair;
mod rewrite;
mod scheduling;
mod sequential;
#[cfg(test)]
mod simulation;
pub mod snapshot;
mod spare;
pub mod store;
pub mod usage;
pub mod verify;
mod workers;
pub mod working_set;

pub use error::{Error, ErrorKind};
pub use fetch::{CacheStatus, FetchCounters, PrefetchStatus};
pub use id::{Hash, Name, Profile, SnapshotId};
pub use keep::{Filled, Kept};
pub use node::{Node, NodeConfig};
pub use plain::{PlainCopiesStatus, PlainCopy};
pub use reads::ReadLog;
pub use scheduling::take_short_turns;
pub use sequential::SequentialReader;
pub use snapshot::{Extent, File, FileKind, Frame, FrameIndex, Snapshot, Source, Urgency};
pub use store::Store;
pub use working_set::{
    RecordedPage, Touch, WEIGHT_ONE, WorkingSet, WorkingSetContent, WorkingSetRun,
};

/// Bytes in one page of a file: the unit of dedup, and of every page number in this crate.
pub const PAGE_SIZE: usize = 4096;
