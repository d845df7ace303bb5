//! Faults that are not served yet: what is being fetched, and what the kernel said `Again` to.

use std::collections::HashMap;
use std::time::Instant;

use crate::latency::FaultClass;

/// A fault that waits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PendingFault {
    pub(crate) since: Instant,
    pub(crate) class: FaultClass,
    /// The kernel said `Again`; a fetch is not under way.
    pub(crate) retry: bool,
}

/// Faults that wait, by unit.
#[derive(Debug, Default)]
pub(crate) struct Pending(HashMap<u64, PendingFault>);

impl Pending {
    pub(crate) fn contains(&self, unit: u64) -> bool {
        self.0.contains_key(&unit)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn insert(&mut self, unit: u64, fault: PendingFault) {
        self.0.insert(unit, fault);
    }

    pub(crate) fn remove(&mut self, unit: u64) -> Option<PendingFault> {
        self.0.remove(&unit)
    }

    /// Takes out the faults that are to be tried again.
    pub(crate) fn take_retries(&mut self) -> Vec<(u64, PendingFault)> {
        self.0.extract_if(|_, fault| fault.retry).collect()
    }

    /// When the oldest fault came.
    pub(crate) fn oldest(&self) -> Option<Instant> {
        self.0.values().map(|fault| fault.since).min()
    }
}
