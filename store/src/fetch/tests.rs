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
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let objects = Objects::over(Arc::new(InMemory::new()));
        let object = ObjectId::WorkingSet(SnapshotId::from_bytes([9; 16]), 1);
        let (mut specs, mut pages, mut chunks) = (Vec::new(), Vec::new(), Vec::new());
        let mut offset = 0;
        for number in 0..frames {
            let page = vec![number + 1; crate::PAGE_SIZE];
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
        Fetcher::new(self.objects.clone(), runtime, workers, Some(disk), 1 << 20)
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
        Fetcher::new(fixture.objects.clone(), runtime.handle().clone(), workers, None, 1 << 20);
    let (sender, receiver) = mpsc::channel();
    let done: Done = Arc::new(move |_, frame: Result<Frame, Error>| {
        sender.send(frame.map(|_| ())).expect("receiver");
    });
    fetcher.fetch([(fixture.specs[0], 0)], Urgency::Demand, &done);
    let error = receiver.recv().expect("an answer").expect_err("it panicked");
    assert!(error.to_string().contains("this is a bug"), "{error}");
}
