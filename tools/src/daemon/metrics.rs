//! What a daemon counts, as Prometheus reads it. `docs/OPERATIONS.md` has the table.

use std::fmt::Error as FormatError;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use reap_prefetcher::{FAULT_CLASSES, LatencyTotal};

use super::prepared::Daemon;

/// Type of the text.
pub(super) const CONTENT_TYPE: &str = prometheus_client::encoding::prometheus_text::CONTENT_TYPE;
/// What all names begin with.
const PREFIX: &str = "reap";
/// Bounds of the histogram of faults: 2 us to 2^25 us, 33 s; the rest is beyond all bounds.
const BOUNDS: usize = 25;

/// All metrics, as text.
pub(super) fn text(daemon: Arc<Daemon>) -> String {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Counted(daemon)));
    let mut text = String::new();
    // A string takes whatever is written.
    prometheus_client::encoding::prometheus_text::encode(&mut text, &registry).unwrap_or_default();
    text
}

/// Everything that a daemon counts.
struct Counted(Arc<Daemon>);

impl std::fmt::Debug for Counted {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Counted")
    }
}

impl Collector for Counted {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), FormatError> {
        let mut out = Writer(encoder);
        out.family("build", "The running version", MetricType::Info, |mut out| {
            out.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])
        })?;
        self.write_restores(&mut out)?;
        self.write_node(&mut out)?;
        self.write_store(&mut out)
    }
}

impl Counted {
    fn write_restores(&self, out: &mut Writer<'_>) -> Result<(), FormatError> {
        let (all, prepared) = (self.0.server.totals(), self.0.snapshots().len() as u64);
        out.gauge(
            "prepared_snapshots",
            "Snapshots and profiles that VMs can start from",
            prepared,
        )?;
        let started = all.started.iter().map(|(mode, count)| ([("mode", *mode)], *count));
        out.counters("restores_started", "Restores that began, by mode", started)?;
        let ended = all
            .ended
            .iter()
            .map(|((mode, outcome), count)| ([("mode", *mode), ("outcome", *outcome)], *count));
        out.counters("restores_ended", "Restores that ended, by mode and outcome", ended)?;
        let killed = all.killed.iter().map(|(cause, count)| ([("cause", cause.name())], *count));
        out.counters("restores_killed", "VMMs that were ended by reapd, by cause", killed)?;
        out.gauge("restores_running", "Restores in service", all.running())?;
        let waited = all.oldest_fault.unwrap_or_default().as_secs_f64();
        out.gauge(
            "oldest_fault_seconds",
            "How long the fault that waits longest has waited",
            waited,
        )?;
        out.histogram(
            "fault_seconds",
            "From a fault to its page, by where the page came from",
            FAULT_CLASSES.iter().zip(&all.faults),
        )?;
        for (name, help, count) in [
            (
                "restores_inert",
                "Restores with a working set of which nothing was installed",
                all.inert,
            ),
            (
                "prefetch_planned_pages",
                "Pages of working sets that were to be installed",
                all.planned_pages,
            ),
            (
                "prefetch_installed_pages",
                "Of these, installed before they were touched",
                all.installed_pages,
            ),
            ("prefetch_late_pages", "Of these, touched before they were installed", all.late_pages),
            (
                "prefetch_missed_pages",
                "Pages touched that the working set did not have",
                all.missed_pages,
            ),
            (
                "prefetch_failed_frames",
                "Frames of working sets that could not be had",
                all.failed_prefetch_frames,
            ),
            (
                "recorded_pages",
                "Pages whose first touch was recorded, for new and learned sets",
                all.recorded_pages,
            ),
            ("removed_pages", "Pages that guests gave back", all.removed_pages),
            ("fault_retries", "How often the kernel asked to try again (EAGAIN)", all.again),
        ] {
            out.counter(name, help, count)?;
        }
        Ok(())
    }

    fn write_node(&self, out: &mut Writer<'_>) -> Result<(), FormatError> {
        let node = &self.0.node;
        let prefetch = node.prefetch_status();
        for (name, help, value) in [
            ("memory_cache_bytes", "Decoded frames in memory", node.memory_cache_bytes()),
            ("prefetch_limit_bytes", "Most bytes of prefetching in flight", prefetch.limit_bytes),
            (
                "prefetch_in_flight_bytes",
                "Bytes of prefetching in flight",
                prefetch.in_flight_bytes,
            ),
            (
                "prefetch_waiting",
                "Streams that wait for room in the budget",
                prefetch.waiting as u64,
            ),
        ] {
            out.gauge(name, help, value)?;
        }
        if let Some(copies) = node.plain_copies_status() {
            for (name, help, value) in [
                ("plain_copies", "Plain copies on disk", copies.files),
                ("plain_copies_used_bytes", "Bytes of their data", copies.used_bytes),
                ("plain_copies_limit_bytes", "Most of these", copies.limit_bytes),
            ] {
                out.gauge(name, help, value)?;
            }
        }
        let Some(cache) = node.cache_status() else { return Ok(()) };
        for (name, help, value) in [
            ("cache_limit_bytes", "Most bytes of the cache on disk", cache.limit_bytes),
            ("cache_used_bytes", "Bytes of the cache on disk", cache.used_bytes),
            ("cache_pinned_bytes", "Of these, pinned", cache.pinned_bytes),
            ("cache_evictable_bytes", "Of these, evictable", cache.evictable_bytes),
            (
                "cache_missing_pinned_bytes",
                "Pinned bytes that are not in the cache",
                cache.missing_pinned_bytes,
            ),
            ("cache_frames", "Frames in the cache on disk", cache.frames),
        ] {
            out.gauge(name, help, value)?;
        }
        out.counter("cache_dropped_frames", "Frames that were not kept", cache.dropped_frames)?;
        out.counter(
            "cache_evicted_segments",
            "Files of the cache that had to go",
            cache.evicted_segments,
        )
    }

    fn write_store(&self, out: &mut Writer<'_>) -> Result<(), FormatError> {
        let (fetch, connection) = (self.0.node.counters(), self.0.node.connection());
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        for (name, help, count) in [
            (
                "store_reads",
                "Requests for ranges of packs and working sets (GETs)",
                load(&fetch.store_reads),
            ),
            ("store_read_bytes", "Bytes that they brought", load(&fetch.store_bytes)),
            ("store_retries", "Requests tried again", load(&fetch.retries)),
            (
                "store_hedged_reads",
                "Late demand requests made a second time",
                load(&fetch.hedged_reads),
            ),
            (
                "store_hedges_won",
                "Second requests that were answered first",
                load(&fetch.hedges_won),
            ),
            ("store_throttled", "Answers that meant: slow down", connection.throttled_answers),
            ("cache_reads", "Ranges read from the cache on disk", load(&fetch.disk_cache_reads)),
            ("memory_hits", "Frames found decoded in memory", load(&fetch.memory_hits)),
            ("decoded_frames", "Frames decoded and verified", load(&fetch.decoded_frames)),
            ("damaged_frames", "Frames that failed verification", load(&fetch.damaged_frames)),
        ] {
            out.counter(name, help, count)?;
        }
        match connection.credentials_expire_unix {
            Some(at) => out.gauge(
                "store_credentials_expire_timestamp_seconds",
                "When the credentials expire, in seconds since 1970",
                at,
            ),
            None => Ok(()),
        }
    }
}

/// Writes metrics one after the other.
struct Writer<'a>(DescriptorEncoder<'a>);

impl Writer<'_> {
    fn family(
        &mut self,
        name: &str,
        help: &str,
        kind: MetricType,
        write: impl FnOnce(MetricEncoder<'_>) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        write(self.0.encode_descriptor(name, help, None, kind)?)
    }

    fn counter(&mut self, name: &str, help: &str, count: u64) -> Result<(), FormatError> {
        self.family(name, help, MetricType::Counter, |out| ConstCounter::new(count).encode(out))
    }

    fn gauge<N>(&mut self, name: &str, help: &str, value: N) -> Result<(), FormatError>
    where
        ConstGauge<N>: EncodeMetric,
    {
        self.family(name, help, MetricType::Gauge, |out| ConstGauge::new(value).encode(out))
    }

    fn counters<const LABELS: usize>(
        &mut self,
        name: &str,
        help: &str,
        counts: impl IntoIterator<Item = (Labels<LABELS>, u64)>,
    ) -> Result<(), FormatError> {
        self.family(name, help, MetricType::Counter, |mut out| {
            counts.into_iter().try_for_each(|(labels, count)| {
                ConstCounter::new(count).encode(out.encode_family(&labels)?)
            })
        })
    }

    fn histogram<'a>(
        &mut self,
        name: &str,
        help: &str,
        classes: impl Iterator<Item = (&'a &'static str, &'a LatencyTotal)>,
    ) -> Result<(), FormatError> {
        self.family(name, help, MetricType::Histogram, |mut out| {
            for (class, total) in classes {
                let doublings = total.doublings().take(BOUNDS);
                let buckets: Vec<_> =
                    doublings.map(|(most, count)| (most.as_secs_f64(), count)).collect();
                out.encode_family(&[("class", *class)])?.encode_histogram::<NoLabelSet>(
                    total.sum().as_secs_f64(),
                    total.count(),
                    &buckets,
                    None,
                )?;
            }
            Ok(())
        })
    }
}

type Labels<const COUNT: usize> = [(&'static str, &'static str); COUNT];
