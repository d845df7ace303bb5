//! Carrying out reads: locally on the decode threads, remotely on the I/O runtime.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::ranges::RangeRead;
use super::{Fetcher, FrameSpec, ObjectId};
use crate::collect;
use crate::objects::Objects;
use crate::{Error, ErrorKind, Urgency};

/// How long a store that does not answer is asked again. Longer than any restart of a store
/// should take, shorter than an operator's patience: a guest disk that gets EIO stays read-only.
const STORE_DEADLINE: Duration = Duration::from_secs(60);
/// Waits between tries grow from the first to the second; a store that is back is noticed within 2 s.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

impl Fetcher {
    /// Starts reads, which are all of one urgency. Never waits.
    pub(super) fn begin(&self, reads: Vec<RangeRead>) {
        let Some(urgency) = reads.first().map(|read| read.urgency) else { return };
        let is_local = |read: &RangeRead| read.from_cache || self.0.objects.local_root().is_some();
        let (local, remote): (Vec<_>, Vec<_>) = reads.into_iter().partition(is_local);
        let jobs = local.into_iter().map(|read| {
            let fetcher = self.clone();
            move || fetcher.read_local(read)
        });
        self.0.workers.submit_all(urgency, jobs);
        for read in remote {
            let fetcher = self.clone();
            self.0.runtime.spawn(async move { fetcher.read_remote(read).await });
        }
    }

    fn read_local(&self, mut read: RangeRead) {
        if !self.claim(&mut read) {
            return;
        }
        let bytes = if read.from_cache { self.read_cache(&read) } else { self.read_pack(&read) };
        let buffer = bytes.as_ref().ok().cloned();
        self.arrived(read, bytes, true);
        // Where no other thread has a frame of it to decode.
        if let Some(Ok(buffer)) = buffer.map(Bytes::try_into_mut) {
            self.0.workers.spares().give_back(buffer.into());
        }
    }

    fn read_cache(&self, read: &RangeRead) -> Result<Bytes, Error> {
        self.0.counters.disk_cache_reads.fetch_add(1, Ordering::Relaxed);
        let found = self.0.disk.as_ref().and_then(|disk| disk.get(&read.frames[0].key()));
        // Evicted since it was planned: an empty answer fails verification and goes to the store.
        Ok(found.unwrap_or_default())
    }

    fn read_pack(&self, read: &RangeRead) -> Result<Bytes, Error> {
        let range = read.range();
        let file = self.open_pack(read.object())?;
        let length = usize::try_from(range.end - range.start)
            .map_err(|error| Error::damaged(read.object().key(), error))?;
        let mut bytes = self.0.workers.spares().take(length);
        self.count_store_read(length as u64);
        match file.read_exact_at(&mut bytes, range.start) {
            Ok(()) => Ok(bytes.into()),
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(Error::damaged(read.object().key(), "is truncated"))
            }
            Err(error) => Err(Error::local(read.object().key(), error)),
        }
    }

    fn open_pack(&self, object: ObjectId) -> Result<Arc<std::fs::File>, Error> {
        if let Some(file) = self.0.open_packs.lock().get(&object) {
            return Ok(file.clone());
        }
        let root = self.0.objects.local_root().ok_or_else(|| {
            Error::local(object.key(), "a remote object was read as a file; this is a bug")
        })?;
        let path = root.join(object.key());
        let file = std::fs::File::open(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::not_found(path.display(), "is not there"),
            _ => Error::local(path.display(), error),
        })?;
        let file = Arc::new(file);
        self.0.open_packs.lock().put(object, file.clone());
        Ok(file)
    }

    async fn read_remote(&self, mut read: RangeRead) {
        let permits = match read.urgency {
            Urgency::Demand => &self.0.demand_permits,
            Urgency::Prefetch => &self.0.prefetch_permits,
        };
        // The semaphores are never closed.
        let permit = permits.acquire().await;
        if !self.claim(&mut read) {
            return;
        }
        let bytes = self.request(&self.0.objects, &read).await;
        drop(permit);
        self.arrived(read, bytes, false);
    }

    async fn request(&self, objects: &Objects, read: &RangeRead) -> Result<Bytes, Error> {
        let (key, range) = (read.object().key(), read.range());
        let patient = read.urgency == Urgency::Prefetch;
        let mut wait = BACKOFF.0;
        loop {
            self.count_store_read(range.end - range.start);
            let error = match objects.get_range(&key, range.clone(), patient).await {
                Ok(bytes) => return Ok(bytes),
                Err(error) => error,
            };
            let late = Instant::now() + wait > read.since + STORE_DEADLINE;
            if error.kind() != ErrorKind::Unreachable || late {
                return Err(error);
            }
            self.0.counters.retries.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(BACKOFF.1);
        }
    }

    fn count_store_read(&self, bytes: u64) {
        self.0.counters.store_reads.fetch_add(1, Ordering::Relaxed);
        self.0.counters.store_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Keeps the frames that this read still owns; from now on no other read takes them over.
    fn claim(&self, read: &mut RangeRead) -> bool {
        let mut flights = self.0.flights.lock();
        read.frames.retain(|spec| match flights.get_mut(&spec.key()) {
            Some(flight) if flight.read == read.number => {
                flight.begun = true;
                true
            }
            _ => false,
        });
        !read.frames.is_empty()
    }

    /// Hands what was read to the decode threads, frame by frame so that they share the work;
    /// a decode thread keeps the first frame for itself.
    fn arrived(&self, read: RangeRead, bytes: Result<Bytes, Error>, on_decode_thread: bool) {
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(error) => {
                if error.kind() == ErrorKind::NotFound
                    && let ObjectId::Pack(pack) = read.object()
                {
                    let objects = self.0.objects.clone();
                    // The snapshot is pinned: nobody may have deleted its pack.
                    self.0.runtime.spawn(async move { collect::halt(&objects, &pack.key()).await });
                }
                for spec in &read.frames {
                    self.complete(&spec.key(), &Err(error.clone()));
                }
                return;
            }
        };
        let read = Arc::new(read);
        let start = read.range().start;
        let stored = |spec: &FrameSpec| {
            let from = usize::try_from(spec.entry.offset - start).unwrap_or(usize::MAX);
            // Short bytes fail verification, which is where damage is handled.
            let to = from.saturating_add(spec.entry.stored_bytes as usize).min(bytes.len());
            bytes.slice(from.min(to)..to)
        };
        let own = usize::from(on_decode_thread);
        for spec in read.frames.iter().skip(own) {
            let (fetcher, read, stored) = (self.clone(), read.clone(), stored(spec));
            let spec = *spec;
            let urgency = self.urgency_now(&spec.key(), read.urgency);
            self.0.workers.submit(urgency, move || fetcher.finish(&spec, &stored, &read));
        }
        for spec in read.frames.iter().take(own) {
            self.finish(spec, &stored(spec), &read);
        }
    }

    /// A frame that was promoted while its bytes were on the way is decoded as demand.
    fn urgency_now(&self, key: &super::FrameKey, planned: Urgency) -> Urgency {
        self.0.flights.lock().get(key).map_or(planned, |flight| flight.urgency)
    }
}
