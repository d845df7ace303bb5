//! A pretend VMM: it maps and registers memory in regions, shakes hands as Firecracker does, touches pages
//! and checks every byte, and gives pages back. [`Vcpu`] runs real guest code over the same memory.
//!
//! In a process of its own it is the program `pretend-vmm`, which takes commands on its standard input.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::unwrap_used,
    reason = "a tool of tests, which counts with small numbers on 64 bits"
)]

mod content;
mod huge;
mod memory;
mod socket;
mod vcpu;

pub use content::{PAGE_BYTES, true_memory, true_page};
pub use huge::HugePool;
pub use memory::PretendVm;
pub use socket::{is_refused, send};
pub use vcpu::{Vcpu, has_kvm};
