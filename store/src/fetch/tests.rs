//! The fetch path with a disk cache, over a store in memory.

use std::path::Path;
use std::sync::mpsc;

use object_store::memory::InMemory;

use super::disk::Limits;
use super::*;

/// A store of one object of small frames, and a fetch path to it.
struct Fixture {
    runtime: tokio::runtime::Runtime,
    objects: Objects,
    specs: Vec<FrameSpec>,
    pages: Vec<Vec<u8>>,
    cache: tempfile::TempDir,
}

impl Fixture {
    fn new(frames: u8) -> Self {
        Self::of_pages(frames, 1)
    }

    /// With frames of so many pages.
    fn of_pages(frames: u8, frame_pages: usize) -> Self {
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let objects = Objects::over(Arc::new(InMemory::new()));
        let object = ObjectId::WorkingSet(SnapshotId::from_bytes([9; 16]), 1);
        let (mut specs, mut pages, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
        let mut offset = 0;
        for number in 0..frames {
            let page = vec![number + 1; frame_pages * crate::PAGE_SIZE];
            let (entry, stored) = frame::encode(&page, 1).expect("encodes");
            let entry = FrameEntry { offset, ..entry };
            offset = entry.end();
            specs.push(FrameSpec { object, entry });
            pages.push(page);
            chunks.push(stored);
        }
        runtime.block_on(objects.create(&object.key(), &chunks)).expect("created");
        let cache = tempfile::tempdir().expect("temporary directory");
        Self { runtime, objects, specs, pages, cache }
    }

    fn directory(&self) -> &Path {
        self.cache.path()
    }

    /// As a process that begins: nothing in memory.
    fn fetcher(&self) -> Fetcher {
        let limits = Limits { bytes: 64 << 20, free_floor: 0 };
        // The threads of the one before may still be about to let its cache go.
        let disk = loop {
            match DiskCache::open(self.directory(), limits) {
                Ok(disk) => break disk,
                Err(error) => assert_eq!(error.kind(), crate::ErrorKind::Refused, "{error}"),
            }
            std::thread::yield_now();
        };
        let workers = Workers::new(1).expect("threads");
        let runtime = self.runtime.handle().clone();
        Fetcher::new(self.objects.clone(), runtime, workers, Some(disk), 1 << 20, 0)
    }

    /// Fetches all frames, which must come with the right bytes; answers with the requests it took.
    fn fetch_all(&self, fetcher: &Fetcher) -> u64 {
        let before = fetcher.counters().store_reads.load(Ordering::Relaxed);
        let (sender, receiver) = mpsc::channel();
        let done: Done = Arc::new(move |tag, frame| sender.send((tag, frame)).unwrap_or_default());
        let wanted = self.specs.iter().enumerate().map(|(tag, spec)| (*spec, tag));
        fetcher.fetch(wanted, Urgency::Demand, &done);
        drop(done);
        let mut came = 0;
        for (tag, frame) in receiver {
            let frame = frame.expect("comes");
            assert!(frame.pages(0, 1) == self.pages[tag], "other bytes of frame {tag}");
            came += 1;
        }
        assert_eq!(came, self.specs.len());
        fetcher.disk().expect("a disk cache").wait();
        fetcher.counters().store_reads.load(Ordering::Relaxed) - before
    }
}

#[test]
fn frames_of_the_disk_cache_need_no_request_and_few_reads() {
    let fixture = Fixture::new(40);
    assert_eq!(fixture.fetch_all(&fixture.fetcher()), 1);
    let again = fixture.fetcher();
    assert_eq!(fixture.fetch_all(&again), 0);
    assert_eq!(again.counters().disk_cache_reads.load(Ordering::Relaxed), 1);
    assert_eq!(again.counters().decoded_frames.load(Ordering::Relaxed), 40);
}

/// Invariant 3: whatever became of the cache's files, what comes out is right, and what was damaged is
/// kept again.
#[test]
fn every_flipped_bit_of_the_disk_cache_costs_a_request_at_most() {
    let fixture = Fixture::new(3);
    fixture.fetch_all(&fixture.fetcher());
    let files = ["0000000000.data", "0000000000.list"];
    let paths = files.map(|name| fixture.directory().join("frames").join(name));
    let whole = paths.clone().map(|path| std::fs::read(path).expect("file"));
    let (mut noticed, mut flips) = (0, 0);
    for (number, bytes) in whole.iter().enumerate() {
        for bit in 0..bytes.len() * 8 {
            for (path, bytes) in paths.iter().zip(&whole) {
                std::fs::write(path, bytes).expect("written");
            }
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&paths[number], damaged).expect("written");
            let fetcher = fixture.fetcher();
            flips += 1;
            noticed += fixture.fetch_all(&fetcher).min(1);
            drop(fetcher);
            assert_eq!(
                fixture.fetch_all(&fixture.fetcher()),
                0,
                "bit {bit} of {number} stays damaged"
            );
        }
    }
    // zstd's format has bits that say nothing.
    assert!(noticed * 100 >= flips * 95, "{noticed} of {flips}");
}

/// A runtime without timers is one of our bugs, and shows what any other in a read comes to.
#[test]
fn a_read_that_panics_ends_with_an_error() {
    let fixture = Fixture::new(1);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build();
    let runtime = runtime.expect("runtime");
    let workers = Workers::new(1).expect("threads");
    let fetcher =
        Fetcher::new(fixture.objects.clone(), runtime.handle().clone(), workers, None, 1 << 20, 0);
    let (sender, receiver) = mpsc::channel();
    let done: Done = Arc::new(move |_, frame: Result<Frame, Error>| {
        sender.send(frame.map(|_| ())).expect("receiver");
    });
    fetcher.fetch([(fixture.specs[0], 0)], Urgency::Demand, &done);
    let error = receiver.recv().expect("an answer").expect_err("it panicked");
    assert!(error.to_string().contains("this is a bug"), "{error}");
}

/// What came of a prefetch, as its tags, in their order; each waits for `gate`, if there is one, on the one decode
/// thread.
fn prefetch(
    fetcher: &Fetcher,
    fixture: &Fixture,
    tags: std::ops::Range<usize>,
    came: &mpsc::Sender<usize>,
    gate: Option<mpsc::Receiver<()>>,
) {
    let (came, gate) = (came.clone(), Mutex::new(gate));
    let pages = fixture.pages.clone();
    let done: Done = Arc::new(move |tag, frame: Result<Frame, Error>| {
        if let Some(gate) = &*gate.lock() {
            gate.recv().unwrap_or_default();
        }
        let frame = frame.expect("comes");
        assert!(frame.pages(0, frame.page_count()) == pages[tag], "other bytes of frame {tag}");
        came.send(tag).unwrap_or_default();
    });
    let wanted: Vec<_> = tags.map(|tag| (fixture.specs[tag], tag)).collect();
    fetcher.fetch(wanted, Urgency::Prefetch, &done);
}

#[test]
fn a_long_prefetch_leaves_room_for_a_short_one_and_ends_within_its_budget() {
    let fixture = Fixture::of_pages(50, 256);
    let fetcher = fixture.fetcher();
    let (came, order) = mpsc::channel();
    let (go_on, gate) = mpsc::channel();
    prefetch(&fetcher, &fixture, 0..48, &came, Some(gate));
    assert!(fetcher.prefetch_status().waiting == 1, "all of it fits: this shows nothing");
    prefetch(&fetcher, &fixture, 48..50, &came, None);
    (0..48).for_each(|_| go_on.send(()).expect("gate"));
    let order: Vec<usize> = (0..50).map(|_| order.recv().expect("all come")).collect();
    let short = order.iter().position(|tag| *tag == 49).expect("it came");
    assert!(short < 16, "the short one waited for the long one: {order:?}");
    let status = loop {
        let status = fetcher.prefetch_status();
        if status.in_flight_bytes == 0 {
            break status;
        }
        std::thread::yield_now();
    };
    assert_eq!(status.waiting, 0);
    assert!(status.highest_bytes <= status.limit_bytes, "{status:?}");
    assert!(status.highest_bytes >= status.limit_bytes / 2, "{status:?}");
}

/// Invariant 5.
#[test]
fn demand_waits_for_no_budget() {
    let fixture = Fixture::of_pages(50, 256);
    let fetcher = fixture.fetcher();
    let (came, order) = mpsc::channel();
    let (go_on, gate) = mpsc::channel();
    prefetch(&fetcher, &fixture, 0..49, &came, Some(gate));
    let (sender, demanded) = mpsc::channel();
    for wanted in [48, 49] {
        let sender = sender.clone();
        let done: Done = Arc::new(move |tag, frame: Result<Frame, Error>| {
            frame.expect("comes");
            sender.send(tag).expect("receiver");
        });
        fetcher.fetch([(fixture.specs[wanted], wanted)], Urgency::Demand, &done);
        assert_eq!(demanded.recv(), Ok(wanted), "in and after what waits for the budget");
    }
    assert!(order.try_recv().is_err(), "the prefetch is held up");
    drop(go_on);
    assert_eq!(order.iter().take(49).count(), 49);
}
