//! Carrying out reads: locally on the decode threads, remotely on the I/O runtime.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::{Either, select};
use tokio::sync::SemaphorePermit;

use super::ranges::{self, RangeRead, Shape};
use super::{Abandoned, Fetcher, FrameSpec, ObjectId, pieces};
use crate::collect;
use crate::objects::Pass;
use crate::{Error, ErrorKind, Urgency};

/// How long a store that does not answer is asked again. Longer than any restart of a store
/// should take, shorter than an operator's patience: a guest disk that gets EIO stays read-only.
const STORE_DEADLINE: Duration = Duration::from_secs(60);
/// Waits between tries grow from the first to the second. With the 2 s after which a try without an answer is given
/// up, a store that is back is noticed within 3 s.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A request's place among those in flight, given back on drop.
type Place<'a> = Either<Option<SemaphorePermit<'a>>, Pass<'a>>;

impl Fetcher {
    /// Starts reads, which are all of one urgency. Never waits.
    pub(super) fn begin(&self, reads: Vec<RangeRead>) {
        let Some(urgency) = reads.first().map(|read| read.urgency) else { return };
        let is_local = |read: &RangeRead| read.from_cache || self.is_local();
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
        if read.from_cache {
            self.read_cache(read);
        } else {
            let bytes = self.read_pack(&read);
            let buffer = bytes.as_ref().ok().cloned();
            self.arrived(read, bytes, true);
            // Where no other thread has a frame of it to decode.
            if let Some(Ok(buffer)) = buffer.map(Bytes::try_into_mut) {
                self.0.workers.spares().give_back(buffer.into());
            }
        }
    }

    /// What was evicted since the read was planned is read from the store.
    fn read_cache(&self, mut read: RangeRead) {
        self.0.counters.disk_cache_reads.fetch_add(1, Ordering::Relaxed);
        let disk = self.0.disk.as_ref();
        let found = disk.map(|disk| disk.read(&read.frames)).unwrap_or_default();
        let (mut here, mut missing) = (Vec::new(), Vec::new());
        for (spec, stored) in std::mem::take(&mut read.frames).into_iter().zip(found) {
            match stored {
                Some(stored) => here.push((spec, stored)),
                None => missing.push(spec),
            }
        }
        let groups = ranges::merge(missing, Shape::Near);
        self.begin(groups.into_iter().map(|group| read.again(group)).collect());
        self.decode(read, here, true);
    }

    fn read_pack(&self, read: &RangeRead) -> Result<Bytes, Error> {
        let range = read.range();
        let file = self.open_pack(read.object())?;
        let length = usize::try_from(range.end - range.start)
            .map_err(|error| Error::damaged(read.object().key(), error))?;
        let mut bytes = self.0.workers.spares().take(length);
        self.count_store_read(length as u64);
        match pieces::read_exact_at(&file, &mut bytes, range.start) {
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
        if let Some(ahead) = read.ahead.take() {
            // Its request is out: nobody needs to take the frames over.
            if !self.claim(&mut read) {
                return;
            }
            if let Some(bytes) = ahead.bytes(read.range()).await {
                return self.arrived(read, Ok(bytes), false);
            }
        }
        // Not claimed while it waits for its place: demand may take its frames over until then.
        let place = self.place(read.urgency).await;
        if !self.claim(&mut read) {
            return;
        }
        let abandoned = Abandoned { fetcher: self, frames: &read.frames, doing: "reading" };
        let bytes = self.request(&read, place).await;
        drop(abandoned);
        self.arrived(read, bytes, false);
    }

    /// Waits until one more request may be in flight.
    async fn place(&self, urgency: Urgency) -> Place<'_> {
        match urgency {
            // The semaphore is never closed.
            Urgency::Demand => Either::Left(self.0.demand_permits.acquire().await.ok()),
            Urgency::Prefetch => Either::Right(self.0.objects.prefetch_pass().await),
        }
    }

    /// All retries of ranges are here.
    async fn request(&self, read: &RangeRead, place: Place<'_>) -> Result<Bytes, Error> {
        let since = match read.urgency {
            Urgency::Demand => read.since,
            // Nobody counts the time for which it had no turn.
            Urgency::Prefetch => Instant::now(),
        };
        let (mut wait, mut place) = (BACKOFF.0, Some(place));
        loop {
            let tried = match read.urgency {
                Urgency::Demand => self.try_demand(read).await,
                Urgency::Prefetch => self.try_range(read).await,
            };
            let error = match tried {
                Ok(bytes) => return Ok(bytes),
                Err(error) => error,
            };
            if error.kind() != ErrorKind::Unreachable {
                return Err(error);
            }
            if Instant::now() + wait > since + STORE_DEADLINE {
                let after = since.elapsed().as_secs();
                let text = format!("given up after {after} s: {}", error.message());
                return Err(Error::unreachable(error.object(), text));
            }
            self.0.counters.retries.fetch_add(1, Ordering::Relaxed);
            // What waits is not in flight, and a store that complained may take fewer by then. Not in
            // step with the other requests that failed for the same reason.
            drop(place.take());
            tokio::time::sleep(wait.mul_f64(rand::random_range(0.5..1.0))).await;
            place = Some(self.place(read.urgency).await);
            wait = (wait * 2).min(BACKOFF.1);
        }
    }

    async fn try_range(&self, read: &RangeRead) -> Result<Bytes, Error> {
        let range = read.range();
        self.count_store_read(range.end - range.start);
        self.0.objects.try_range(&read.object().key(), range, read.urgency).await
    }

    /// One try, with a second request for the same range if the first is late. The first good answer
    /// counts, the other request is dropped.
    async fn try_demand(&self, read: &RangeRead) -> Result<Bytes, Error> {
        let began = Instant::now();
        let delay = self.0.hedging.lock().begin();
        let mut first = pin!(self.try_range(read));
        let tried = match tokio::time::timeout(delay, &mut first).await {
            Ok(tried) => tried,
            Err(_late) => match self.may_hedge() {
                Some(_permit) => self.race(first, pin!(self.try_range(read))).await,
                None => first.await,
            },
        };
        if tried.is_ok() {
            self.0.hedging.lock().answered(began.elapsed());
        }
        tried
    }

    /// A place for a second request, if there is one and the store is to bear it.
    fn may_hedge(&self) -> Option<SemaphorePermit<'_>> {
        let permit = self.0.demand_permits.try_acquire().ok();
        let permit = permit.filter(|_| self.0.hedging.lock().spend());
        let counters = &self.0.counters;
        let count =
            if permit.is_some() { &counters.hedged_reads } else { &counters.hedges_withheld };
        count.fetch_add(1, Ordering::Relaxed);
        permit
    }

    async fn race<R>(&self, first: Pin<&mut R>, second: Pin<&mut R>) -> Result<Bytes, Error>
    where
        R: Future<Output = Result<Bytes, Error>>,
    {
        match select(first, second).await {
            Either::Left((Ok(bytes), _)) => Ok(bytes),
            Either::Left((Err(_), second)) => second.await.inspect(|_| self.count_won()),
            Either::Right((Ok(bytes), _)) => {
                self.count_won();
                Ok(bytes)
            }
            Either::Right((Err(_), first)) => first.await,
        }
    }

    fn count_won(&self) {
        self.0.counters.hedges_won.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_store_read(&self, bytes: u64) {
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

    /// The bytes of a range of the store are here, or are not to be had.
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
        let start = read.range().start;
        let stored = |spec: &FrameSpec| {
            let from = usize::try_from(spec.entry.offset - start).unwrap_or(usize::MAX);
            // Short bytes fail verification, which is where damage is handled.
            let to = from.saturating_add(spec.entry.stored_bytes as usize).min(bytes.len());
            (*spec, bytes.slice(from.min(to)..to))
        };
        let frames = read.frames.iter().map(stored).collect();
        self.decode(read, frames, on_decode_thread);
    }

    /// Hands what was read to the decode threads, frame by frame so that they share the work;
    /// a decode thread keeps the first frame for itself.
    fn decode(&self, read: RangeRead, frames: Vec<(FrameSpec, Bytes)>, on_decode_thread: bool) {
        let read = Arc::new(read);
        let mut frames = frames.into_iter();
        let own = if on_decode_thread { frames.next() } else { None };
        for (spec, stored) in frames {
            let (fetcher, read) = (self.clone(), read.clone());
            let urgency = self.urgency_now(&spec.key(), read.urgency);
            self.0.workers.submit(urgency, move || fetcher.finish(&spec, &stored, &read));
        }
        if let Some((spec, stored)) = own {
            self.finish(&spec, &stored, &read);
        }
    }

    /// A frame that was promoted while its bytes were on the way is decoded as demand.
    fn urgency_now(&self, key: &super::FrameKey, planned: Urgency) -> Urgency {
        self.0.flights.lock().get(key).map_or(planned, |flight| flight.urgency)
    }
}
