//! Serves guest memory through userfaultfd: demand faults, recording, working-set prefetch.
//!
//! A VMM connects to a socket of [`Server`] and hands over its regions and its userfaultfd, as
//! Firecracker does. From then on a fault flows so:
//!
//! ```text
//! kernel -> engine (fault thread) -> vm.read_events: removals are marked, then
//!           fault: removed? zero? frame in memory? -> vm.serve -> UFFDIO_COPY, the vCPU runs
//!                  frame not in memory -> Snapshot::fetch(Demand) -> decode thread -> vm.serve
//! ```
//!
//! and a working set so: `WorkingSet::fetch(Prefetch)` -> decode threads -> `vm.install_ahead`,
//! run by run, in batches short enough that a fault hardly waits for them.
//!
//! Two threads serve any number of VMs: `faults` ([`engine`]) and `accept` ([`accept`]); neither
//! waits for the network, a disk or a client. What installs pages is in [`memory`] and nowhere else, under
//! the lock that orders it against removals. Decisions are pure: [`handshake`], [`layout`], [`page_state`]; [`memory`]
//! sees the kernel through a trait, and a model drives it through every order of events and answers.
//! Kernel interfaces are wrapped in [`uffd`], [`vmm`] and [`poller`].
//!
//! A VM that cannot be served is ended through its pidfd, and the reason is logged and kept in its
//! [`RestoreReport`]: a guest that hangs or reads wrong memory is worse than a dead one.

#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "tests count with small numbers"
    )
)]

mod accept;
mod engine;
mod fault;
mod fit;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod hand_over;
mod handshake;
mod history;
mod latency;
mod layout;
mod memory;
mod page_state;
mod pending;
mod persist;
mod plan;
mod poller;
mod prefetch;
mod recording;
mod report;
mod server;
mod timeline;
mod uffd;
mod vm;
mod vmm;

pub use fit::Fit;
pub use handshake::HandshakeError;
pub use history::Totals;
pub use latency::{FAULT_CLASSES, Latency, LatencyTotal};
pub use recording::OnRecorded;
pub use report::{Cause, End, RestoreReport};
pub use server::{Mode, Server, ServerConfig, ServerError};
pub use timeline::{Event, EventKind, Timeline};
