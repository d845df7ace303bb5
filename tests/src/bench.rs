//! `reap-bench`: the ways to bring a trace's pages into a guest, side by side, interleaved, in one run.
//!
//! Each measured start is a process of its own ([`touch`]) that maps memory as a VMM does and reads one byte
//! of each page of the trace, in order; afterwards, outside the measured time, it compares every page that
//! it touched with the memory file. [`ways`] has the alternatives, [`report`] and [`plot`] what is shown.

pub mod answers;
pub mod guests;
mod memory;
pub mod plot;
pub mod remote;
pub mod report;
pub mod touch;
mod trace;
pub mod ways;

pub use trace::Trace;
