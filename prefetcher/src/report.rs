//! What a restore did: counts and latencies, cheap to keep and ready to be shown.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use reap_store::SnapshotId;
use serde::Serialize;

use crate::fit::{Counts, Fit};
use crate::latency::{FAULT_CLASSES, FaultClass, Histogram, Latency};
use crate::timeline::{EventKind, Recorder};

/// How a restore ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The VMM ended by itself.
    VmmEnded,
    /// All memory was handed over because the daemon stops; the VM goes on alone.
    HandedOver,
    /// We ended the VMM.
    Killed {
        /// The kind of reason.
        cause: Cause,
        /// The reason.
        reason: String,
    },
}

/// Why a VMM is ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(into = "&'static str")]
pub enum Cause {
    /// A fault was not served by its deadline.
    Deadline,
    /// A page cannot be had: its store is gone, or its bytes are damaged.
    Unservable,
    /// The VMM does what cannot be served.
    Protocol,
    /// The kernel refused.
    Kernel,
    /// The daemon stopped before the VM had all its memory.
    Stop,
    /// A fault of ours.
    Bug,
}

impl Cause {
    /// All of them.
    pub(crate) const ALL: [Self; 6] =
        [Self::Deadline, Self::Unservable, Self::Protocol, Self::Kernel, Self::Stop, Self::Bug];

    /// Its name, in JSON and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Deadline => "deadline",
            Self::Unservable => "unservable",
            Self::Protocol => "protocol",
            Self::Kernel => "kernel",
            Self::Stop => "stop",
            Self::Bug => "bug",
        }
    }
}

impl From<Cause> for &'static str {
    fn from(cause: Cause) -> Self {
        cause.name()
    }
}

/// Name of the mode in which a set is looked at and not installed.
pub(crate) const SAMPLE: &str = "sample";
/// Names of all modes.
pub(crate) const MODES: [&str; 4] = ["demand", "record", SAMPLE, "prefetch"];

/// The live counters of a restore.
#[derive(Debug)]
pub(crate) struct Restore {
    pub(crate) id: u64,
    snapshot: SnapshotId,
    pid: i32,
    pub(crate) mode: &'static str,
    started: SystemTime,
    pub(crate) began: Instant,
    pub(crate) planned_pages: AtomicU64,
    pub(crate) planned_zero_pages: AtomicU64,
    pub(crate) prefetched_pages: AtomicU64,
    pub(crate) prefetched_zero_pages: AtomicU64,
    /// The part of the set that restores touch on average, in 2^-16.
    expected: AtomicU64,
    touched_planned: AtomicU64,
    touched_planned_zero: AtomicU64,
    missed_pages: AtomicU64,
    missed_zero_pages: AtomicU64,
    settled: AtomicBool,
    pub(crate) timeline: Recorder,
    pub(crate) recorded_pages: AtomicU64,
    pub(crate) again: AtomicU64,
    pub(crate) removed_pages: AtomicU64,
    pub(crate) failed_prefetch_frames: AtomicU64,
    first_prefetch_us: AtomicU64,
    last_prefetch_us: AtomicU64,
    pub(crate) faults: [Histogram; FAULT_CLASSES.len()],
    end: Mutex<Option<End>>,
}

/// A restore, as `GET /restores` shows it. Pages are of 4 KiB, times in microseconds since the
/// handshake.
#[derive(Clone, Debug, Serialize)]
pub struct RestoreReport {
    /// Counts from 1 in this process.
    pub id: u64,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The VMM.
    pub pid: i32,
    /// `demand`, `record`, `sample` or `prefetch`: the mode that was really used.
    pub mode: &'static str,
    /// Milliseconds since 1970.
    pub started_unix_ms: u64,
    /// `None` while the VM runs.
    pub end: Option<End>,
    /// Pages with bytes in the working set.
    pub planned_pages: u64,
    /// Zero pages in the working set.
    pub planned_zero_pages: u64,
    /// Of those, installed before they were touched.
    pub prefetched_pages: u64,
    /// The same for zero pages.
    pub prefetched_zero_pages: u64,
    /// Faults on planned pages that had not been installed yet. This and what follows, up to `fit`,
    /// is counted until the restore settled.
    pub late_pages: u64,
    /// Planned pages that were touched, in mode `sample`, where nothing is installed.
    pub hit_pages: u64,
    /// Faults on pages with bytes that the working set does not have.
    pub missed_pages: u64,
    /// Faults on zero pages that it does not have.
    pub missed_zero_pages: u64,
    /// No new page was touched for a while, or the VM ended.
    pub settled: bool,
    /// How well the working set fitted; `None` without one.
    pub fit: Option<Fit>,
    /// There was a working set, its pages were touched, and none of its bytes were installed: an error.
    pub inert: bool,
    /// Frames of the working set that could not be had.
    pub failed_prefetch_frames: u64,
    /// Pages recorded so far.
    pub recorded_pages: u64,
    /// Pages that the guest gave back.
    pub removed_pages: u64,
    /// How often the kernel asked to try again.
    pub again: u64,
    /// When the first and the last prefetched page was installed.
    pub first_prefetch_us: Option<u64>,
    /// See `first_prefetch_us`.
    pub last_prefetch_us: Option<u64>,
    /// Faults served from memory.
    pub faults_cached: Latency,
    /// Faults that had to fetch.
    pub faults_fetched: Latency,
    /// Faults on zero pages.
    pub faults_zero: Latency,
    /// Faults on pages that the guest had given back.
    pub faults_removed: Latency,
}

impl Restore {
    pub(crate) fn new(id: u64, snapshot: SnapshotId, pid: i32, mode: &'static str) -> Self {
        let began = Instant::now();
        Self {
            id,
            snapshot,
            pid,
            mode,
            started: SystemTime::now(),
            began,
            planned_pages: AtomicU64::new(0),
            planned_zero_pages: AtomicU64::new(0),
            prefetched_pages: AtomicU64::new(0),
            prefetched_zero_pages: AtomicU64::new(0),
            expected: AtomicU64::new(1 << 16),
            touched_planned: AtomicU64::new(0),
            touched_planned_zero: AtomicU64::new(0),
            missed_pages: AtomicU64::new(0),
            missed_zero_pages: AtomicU64::new(0),
            settled: AtomicBool::new(false),
            timeline: Recorder::new(began),
            recorded_pages: AtomicU64::new(0),
            again: AtomicU64::new(0),
            removed_pages: AtomicU64::new(0),
            failed_prefetch_frames: AtomicU64::new(0),
            first_prefetch_us: AtomicU64::new(u64::MAX),
            last_prefetch_us: AtomicU64::new(0),
            faults: Default::default(),
            end: Mutex::new(None),
        }
    }

    /// A fault on these pages was served; `planned` where the set has them.
    pub(crate) fn fault(
        &self,
        class: FaultClass,
        pages: (u64, u64),
        took: Duration,
        planned: bool,
    ) {
        self.faults[class as usize].add(took);
        if !self.settled.load(Ordering::Relaxed) {
            self.timeline.add(class.event(), pages, took, planned);
        }
    }

    /// Pages were touched that the working set has, or has not.
    pub(crate) fn touched(&self, planned: bool, zero: bool, pages: u64) {
        if self.settled.load(Ordering::Relaxed) {
            return;
        }
        let counter = match (planned, zero) {
            (true, false) => &self.touched_planned,
            (true, true) => &self.touched_planned_zero,
            (false, false) => &self.missed_pages,
            (false, true) => &self.missed_zero_pages,
        };
        counter.fetch_add(pages, Ordering::Relaxed);
    }

    /// The part of the working set that restores touch on average, 0 to 1.
    pub(crate) fn expect(&self, part: f64) {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to what fits"
        )]
        let fixed = (part.clamp(0.0, 1.0) * 65536.0) as u64;
        self.expected.store(fixed, Ordering::Relaxed);
    }

    /// What comes from now on is the VM's life, not its restore.
    pub(crate) fn settle(&self) {
        if !self.settled.swap(true, Ordering::Relaxed) {
            tracing::info!("restore {}: settled: {}", self.id, self.summary());
            if self.is_inert() {
                let text = "it had a working set, and nothing of it was installed";
                tracing::error!("restore {}: {text}", self.id);
            }
        }
    }

    /// It is over: what came of it, for the log.
    pub(crate) fn log_end(&self) {
        self.settle();
        tracing::info!("restore {}: ended: {}", self.id, self.summary());
    }

    /// A working set was declared and touched, and none of its bytes were installed.
    pub(crate) fn is_inert(&self) -> bool {
        let counts = self.counts();
        !counts.sampled && counts.touched_data > 0 && counts.installed_data == 0
    }

    /// One line about it.
    pub(crate) fn summary(&self) -> String {
        let counts = self.counts();
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut text = format!("mode {}", self.mode);
        if load(&self.recorded_pages) > 0 {
            text.push_str(&format!(", {} pages recorded", load(&self.recorded_pages)));
        }
        if let Some(fit) = Fit::new(&counts) {
            let late = if counts.sampled { 0 } else { counts.touched };
            let (planned, installed, missed) = (counts.planned, counts.installed, counts.missed);
            text.push_str(&format!(
                ", {planned} planned, {installed} installed, {late} late, {missed} missed; {fit}"
            ));
        }
        text
    }

    pub(crate) fn counts(&self) -> Counts {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            planned: load(&self.planned_pages) + load(&self.planned_zero_pages),
            planned_data: load(&self.planned_pages),
            installed: load(&self.prefetched_pages) + load(&self.prefetched_zero_pages),
            installed_data: load(&self.prefetched_pages),
            touched: load(&self.touched_planned) + load(&self.touched_planned_zero),
            touched_data: load(&self.touched_planned),
            missed: load(&self.missed_pages) + load(&self.missed_zero_pages),
            expected: load(&self.expected) as f64 / 65536.0,
            sampled: self.mode == SAMPLE,
        }
    }

    /// `pages` pages of the working set are there now, the first of them `first`.
    pub(crate) fn prefetched(&self, first: u64, pages: u64, zero: bool) {
        if pages == 0 {
            return;
        }
        let kind = if zero { EventKind::InstallZero } else { EventKind::Install };
        self.timeline.add(kind, (first, pages), Duration::ZERO, true);
        let counter = if zero { &self.prefetched_zero_pages } else { &self.prefetched_pages };
        counter.fetch_add(pages, Ordering::Relaxed);
        let now_us = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.first_prefetch_us.fetch_min(now_us, Ordering::Relaxed);
        self.last_prefetch_us.fetch_max(now_us, Ordering::Relaxed);
    }

    /// Writes down how it ended; the first says it. Whether this was the first.
    pub(crate) fn finish(&self, end: End) -> bool {
        let mut ended = self.end.lock();
        let first = ended.is_none();
        ended.get_or_insert(end);
        first
    }

    pub(crate) fn was_killed(&self) -> bool {
        matches!(*self.end.lock(), Some(End::Killed { .. }))
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.end.lock().is_some()
    }

    pub(crate) fn end(&self) -> Option<End> {
        self.end.lock().clone()
    }

    pub(crate) fn report(&self) -> RestoreReport {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let since = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        let first_prefetch_us = Some(load(&self.first_prefetch_us)).filter(|us| *us != u64::MAX);
        let fault = |class: FaultClass| self.faults[class as usize].summary();
        let counts = self.counts();
        RestoreReport {
            id: self.id,
            snapshot: self.snapshot,
            pid: self.pid,
            mode: self.mode,
            started_unix_ms: u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
            end: self.end(),
            planned_pages: load(&self.planned_pages),
            planned_zero_pages: load(&self.planned_zero_pages),
            prefetched_pages: load(&self.prefetched_pages),
            prefetched_zero_pages: load(&self.prefetched_zero_pages),
            late_pages: if counts.sampled { 0 } else { counts.touched },
            hit_pages: if counts.sampled { counts.touched } else { 0 },
            missed_pages: load(&self.missed_pages),
            missed_zero_pages: load(&self.missed_zero_pages),
            settled: self.settled.load(Ordering::Relaxed),
            fit: Fit::new(&counts),
            inert: self.is_inert(),
            failed_prefetch_frames: load(&self.failed_prefetch_frames),
            recorded_pages: load(&self.recorded_pages),
            removed_pages: load(&self.removed_pages),
            again: load(&self.again),
            first_prefetch_us,
            last_prefetch_us: first_prefetch_us.map(|_| load(&self.last_prefetch_us)),
            faults_cached: fault(FaultClass::Cached),
            faults_fetched: fault(FaultClass::Fetched),
            faults_zero: fault(FaultClass::Zero),
            faults_removed: fault(FaultClass::Removed),
        }
    }
}
