//! What a store's answers say about its load, and who has to wait because of it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::gate::{Gate, Pass};
use super::remote::Purpose;

/// Prefetch requests in flight: enough to fill 10 Gbit/s at the 90 MB/s that one S3 connection
/// gives.
const PREFETCH_REQUESTS: usize = 16;
/// Uploads, listings, records and whole objects in flight.
const BULK_REQUESTS: usize = 64;

/// Answers that mean "slow down": 503 on S3 and Azure, 429 on GCS and others.
const THROTTLED: [u16; 2] = [429, 503];

/// The requests of one process to one store. Demand is never held back: its bound is the fetch
/// path's own.
#[derive(Debug)]
pub(super) struct Traffic {
    prefetch: Gate,
    bulk: Gate,
    throttled_answers: AtomicU64,
}

impl Traffic {
    pub(super) fn new() -> Self {
        Self {
            prefetch: Gate::new(PREFETCH_REQUESTS),
            bulk: Gate::new(BULK_REQUESTS),
            throttled_answers: AtomicU64::new(0),
        }
    }

    /// Waits until a prefetch may go out.
    pub(super) async fn prefetch(&self) -> Pass<'_> {
        self.prefetch.enter().await
    }

    /// Waits until another request may go out.
    pub(super) async fn bulk(&self) -> Pass<'_> {
        self.bulk.enter().await
    }

    /// Notes an answer's status. Whoever is throttled, all that nobody waits for gives way.
    pub(super) fn answered(&self, purpose: Purpose, status: u16, began: Instant) {
        if THROTTLED.contains(&status) {
            self.throttled_answers.fetch_add(1, Ordering::Relaxed);
            let cut = [&self.prefetch, &self.bulk].map(|gate| gate.throttled(began));
            if cut.contains(&true) {
                tracing::warn!(
                    "the store answers {status}, slow down: at most {} prefetch and {} other requests from now",
                    self.prefetch.limit(),
                    self.bulk.limit()
                );
            }
            return;
        }
        match purpose {
            Purpose::Demand => {}
            Purpose::Prefetch => self.prefetch.answered(),
            Purpose::Bulk | Purpose::Upload => self.bulk.answered(),
        }
    }

    /// Answers that meant "slow down"; prefetch and other requests that may be in flight now.
    pub(super) fn load(&self) -> (u64, usize, usize) {
        let throttled = self.throttled_answers.load(Ordering::Relaxed);
        (throttled, self.prefetch.limit(), self.bulk.limit())
    }
}
