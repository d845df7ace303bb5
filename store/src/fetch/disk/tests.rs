use std::time::{Duration, Instant};

use super::*;
use crate::SnapshotId;
use crate::fetch::ObjectId;
use crate::format::frame::{Codec, FrameEntry};
use crate::id::Hash;

const BYTES: u32 = 10_000;

/// Frame `number` of one object; its stored bytes are [`stored`].
fn spec(number: u64) -> FrameSpec {
    FrameSpec {
        object: ObjectId::WorkingSet(SnapshotId::from_bytes([7; 16]), 3),
        entry: FrameEntry {
            offset: number * u64::from(BYTES),
            stored_bytes: BYTES,
            pages: 16,
            codec: Codec::Zstd,
            hash: Hash([0; 32]),
        },
    }
}

fn stored(number: u64) -> Bytes {
    Bytes::from(vec![number as u8 ^ 0x5a; BYTES as usize])
}

fn limits(bytes: u64) -> Limits {
    Limits { bytes, free_floor: 0 }
}

fn open(directory: &Path, limits: Limits) -> DiskCache {
    DiskCache::open(directory, limits).expect("opens")
}

/// Inserts frames, a few at a time so that none is dropped because the writer is behind.
fn fill(cache: &DiskCache, numbers: Range<u64>) {
    for number in numbers {
        cache.insert(spec(number).key(), stored(number));
        if number % 64 == 63 {
            cache.wait();
        }
    }
    cache.wait();
}

fn is_there(cache: &DiskCache, number: u64) -> bool {
    match &cache.read(&[spec(number)])[..] {
        [Some(read)] => {
            assert!(*read == stored(number), "other bytes of frame {number}");
            true
        }
        _ => false,
    }
}

/// A file of the cache.
fn file(directory: &Path, name: &str) -> PathBuf {
    directory.join(FRAMES).join(name)
}

/// Of all segments.
fn bytes_in(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory.join(FRAMES)).expect("directory");
    let entries = entries.map(|entry| entry.expect("entry"));
    let segments = entries.filter(|entry| {
        let name = entry.file_name();
        ["data", "list"]
            .map(Some)
            .contains(&Path::new(&name).extension().and_then(|kind| kind.to_str()))
    });
    segments.map(|entry| entry.metadata().expect("metadata").len()).sum()
}

#[test]
fn frames_outlive_the_process_and_torn_files_are_survived() {
    let directory = tempfile::tempdir().expect("temporary directory");
    fill(&open(directory.path(), limits(64 << 20)), 0..50);
    let cache = open(directory.path(), limits(64 << 20));
    assert!((0..50).all(|number| is_there(&cache, number)));
    let refused = DiskCache::open(directory.path(), limits(64 << 20)).err().expect("is refused");
    assert_eq!(refused.kind(), crate::ErrorKind::Refused, "a second user of one directory");
    drop(cache);

    // As after a crash: a frame and a record that were not written to their ends.
    for (name, missing) in [("0000000000.data", 5), ("0000000000.list", 45)] {
        let torn = File::options().write(true).open(file(directory.path(), name)).expect("file");
        let length = torn.metadata().expect("metadata").len();
        torn.set_len(length - missing).expect("truncated");
    }
    let cache = open(directory.path(), limits(64 << 20));
    assert!((0..48).all(|number| is_there(&cache, number)));
    assert!(!is_there(&cache, 48) && !is_there(&cache, 49), "the torn ones are gone");
    fill(&cache, 48..60);
    drop(cache);
    let cache = open(directory.path(), limits(64 << 20));
    assert!((0..60).all(|number| is_there(&cache, number)), "what came after the tear");
    assert_eq!(cache.status().segments, 1, "a start goes on with the last segment");
    drop(cache);
    std::fs::remove_file(file(directory.path(), "0000000000.list")).expect("removed");
    let cache = open(directory.path(), limits(64 << 20));
    assert_eq!(cache.status().frames, 0);
    assert_eq!(bytes_in(directory.path()), 0, "a segment without a list takes no space");
}

#[test]
fn a_file_that_became_shorter_costs_its_frames_alone_and_they_can_come_again() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let cache = open(directory.path(), limits(64 << 20));
    fill(&cache, 0..10);
    let data = File::options().write(true).open(file(directory.path(), "0000000000.data"));
    data.expect("file").set_len(5 * u64::from(BYTES)).expect("truncated");
    assert!(is_there(&cache, 4) && !is_there(&cache, 5));
    fill(&cache, 5..6);
    assert!(is_there(&cache, 5), "it was not written again");
}

#[test]
fn frames_that_lie_together_are_one_read_and_others_are_not() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let cache = open(directory.path(), limits(64 << 20));
    fill(&cache, 0..100);
    // Asked for in another order than they were written in; two are not there.
    let wanted: Vec<_> = (0..102).rev().filter(|number| *number != 50).map(spec).collect();
    let (groups, missing) = cache.plan(wanted);
    assert_eq!(missing.len(), 2);
    let sizes: Vec<_> = groups.iter().map(Vec::len).collect();
    assert_eq!(sizes, vec![26, 25, 26, 22], "256 KiB each; a gap of one frame is read over");
    for group in groups {
        for (spec, read) in group.iter().zip(cache.read(&group)) {
            let number = spec.entry.offset / u64::from(BYTES);
            assert!(read.expect("is there") == stored(number), "other bytes of frame {number}");
        }
    }
    let wrong = FrameSpec { entry: FrameEntry { stored_bytes: 5, ..spec(7).entry }, ..spec(7) };
    assert_eq!(cache.read(&[wrong])[0], None, "another length is damage");
}

#[test]
fn the_cache_stays_within_its_bytes() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let cache = open(directory.path(), limits(8 << 20));
    for round in 0..20 {
        fill(&cache, round * 100..(round + 1) * 100);
        let (bytes, status) = (bytes_in(directory.path()), cache.status());
        assert_eq!(bytes, status.used_bytes, "round {round}: not all bytes are counted");
        assert!(bytes <= 8 << 20, "round {round}: {bytes} bytes");
    }
    assert!(bytes_in(directory.path()) > 6 << 20, "and it makes use of them");
    assert!(is_there(&cache, 1999) && !is_there(&cache, 0), "the oldest went");
    let dropped = cache.status().dropped_frames;
    assert_eq!(dropped, 0);
    drop(cache);
    let cache = open(directory.path(), limits(4 << 20));
    fill(&cache, 5000..5001);
    assert!(bytes_in(directory.path()) <= 4 << 20, "a smaller limit holds from the start");
    let tiny = open(&directory.path().join("tiny"), limits(1 << 20));
    for number in 0..1000 {
        tiny.insert(spec(number).key(), Bytes::from_static(b"few bytes"));
        tiny.wait();
    }
    assert!(tiny.status().frames <= 256, "the index is bounded too");
    cache.insert(spec(6000).key(), Bytes::from(vec![0; 5 << 20]));
    cache.wait();
    assert_eq!(cache.status().dropped_frames, 1, "a frame larger than the cache");
    assert!(is_there(&cache, 5000), "nothing went for a frame that cannot fit");
}

#[test]
fn pinned_frames_outlive_everything_else() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let cache = open(directory.path(), limits(8 << 20));
    // Pinned before they come, between others, in every segment.
    let wanted = || (0..1000).step_by(3).map(spec);
    let pinned = cache.pin("f", wanted()).expect("is less than half");
    fill(&cache, 0..2000);
    let here =
        |cache: &DiskCache| wanted().filter(|spec| cache.plan(vec![*spec]).1.is_empty()).count();
    assert_eq!(here(&cache), 334);
    assert!(bytes_in(directory.path()) <= 8 << 20);
    let status = cache.status();
    assert_eq!(status.pinned_bytes, 334 * u64::from(BYTES));
    assert_eq!(status.evictable_bytes + status.pinned_bytes, status.used_bytes);
    assert_eq!(status.missing_pinned_bytes, 0);
    assert!(!is_there(&cache, 1), "the others went");
    assert!(is_there(&cache, 999), "moved, with its bytes");

    let refused = cache.pin("g", (5000..5100).map(spec)).err().expect("is refused");
    assert_eq!(refused.kind(), crate::ErrorKind::Refused);
    let text = refused.to_string();
    assert!(
        text.starts_with("g: ") && text.contains("4340000") && text.contains("4194304"),
        "{text}"
    );
    // A start knows no pins: whoever had them pins them again.
    drop(pinned);
    drop(cache);
    let cache = open(directory.path(), limits(8 << 20));
    assert_eq!(here(&cache), 334, "a start keeps what was pinned, while there is room");
    assert_eq!(cache.status().pinned_bytes, 0);
    let pinned = cache.pin("f", wanted()).expect("is less than half");
    assert_eq!(cache.status().pinned_bytes, 334 * u64::from(BYTES));
    drop(pinned);
    fill(&cache, 3000..4000);
    assert_eq!(here(&cache), 0, "what is pinned no more goes like the rest");
}

/// A file system of its own, so that it can be filled.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(options: &str) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let options = std::ffi::CString::new(options).expect("text");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", directory.path(), "tmpfs", flags, options.as_c_str())
            .expect("mounts");
        Self(directory)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        rustix::mount::unmount(self.0.path(), flags).expect("unmounts");
    }
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn the_floor_holds_also_when_others_fill_the_disk() {
    let disk = SmallDisk::new("size=64M");
    let directory = disk.0.path().join("cache");
    let floor = 16 << 20;
    let cache = open(&directory, Limits { bytes: 1 << 30, free_floor: floor });
    let pinned = cache.pin("f", (0..50).map(spec)).expect("few");
    fill(&cache, 0..6000);
    let free = || {
        let at = rustix::fs::statvfs(disk.0.path()).expect("statvfs");
        at.f_bavail * at.f_frsize
    };
    until("the floor holds", || free() >= floor);
    assert!(cache.status().used_bytes > 20 << 20, "and it makes use of the rest");
    let others = |name: &str, mib: usize| {
        std::fs::write(disk.0.path().join(name), vec![1; mib << 20]).expect("written");
    };
    for name in ["one", "two", "three"] {
        others(name, 13);
        until("the cache gives way", || free() >= floor);
    }
    assert!((0..50).all(|number| is_there(&cache, number)), "a pinned frame went");
    others("four", 12);
    until("all that is not pinned goes", || cache.status().used_bytes < 2 << 20);
    // What the writer knows of the free space may be 0.1 s old.
    std::thread::sleep(Duration::from_millis(300));
    let before = cache.status();
    fill(&cache, 7000..7010);
    let after = cache.status();
    assert_eq!(after.dropped_frames, before.dropped_frames + 10, "below the floor");
    assert!((0..50).all(|number| is_there(&cache, number)), "a pinned frame went");
    std::fs::remove_file(disk.0.path().join("one")).expect("removed");
    until("frames are kept again", || {
        fill(&cache, 7000..7010);
        is_there(&cache, 7009)
    });
    drop(pinned);
}

#[test]
fn a_full_disk_costs_frames_and_nothing_else() {
    // Full in a way that no look at the free space tells: it has no inode for the list of a fifth segment.
    let disk = SmallDisk::new("size=64M,nr_inodes=15");
    let directory = disk.0.path().join("cache");
    let cache = open(&directory, limits(32 << 20));
    fill(&cache, 0..2000);
    let status = cache.status();
    assert!(status.dropped_frames > 0, "the disk was not full: this test shows nothing");
    assert!(status.frames > 100);
    let here = |cache: &DiskCache| (0..2000).filter(|number| is_there(cache, *number)).count();
    assert_eq!(here(&cache) as u64, status.frames);
    assert_eq!(bytes_in(&directory), status.used_bytes);
    drop(cache);
    let again = open(&directory, limits(32 << 20));
    assert_eq!(here(&again) as u64, status.frames, "a start on a full disk");
}

/// Not small frames for their own sake: the cost of a start is by the frame.
#[test]
#[allow(clippy::print_stdout, reason = "prints figures")]
fn a_million_frames_are_found_again() {
    const FRAMES: u64 = 1_000_000;
    let directory = tempfile::tempdir().expect("temporary directory");
    let limits = limits(4 << 30);
    let cache = open(directory.path(), limits);
    let key = |number: u64| {
        // As many to an object as a pack of 32 MiB has.
        let txn = SnapshotId::from_bytes((number as u128 / 2000).to_le_bytes());
        (ObjectId::WorkingSet(txn, 1), number % 2000 * 16_384)
    };
    for number in 0..FRAMES {
        cache.insert(key(number), Bytes::copy_from_slice(&number.to_le_bytes()));
        if number % 100_000 == 0 {
            cache.wait();
        }
    }
    cache.wait();
    assert_eq!(cache.status().dropped_frames, 0);
    drop(cache);
    let (before, began) = (resident_bytes(), Instant::now());
    let cache = open(directory.path(), limits);
    let (took, bytes) = (began.elapsed(), resident_bytes().saturating_sub(before));
    let status = cache.status();
    assert_eq!((status.frames, status.segments), (FRAMES, 62));
    for number in (0..FRAMES).step_by(9999) {
        let mut wanted = spec(0);
        (wanted.object, wanted.entry.offset) = key(number);
        wanted.entry.stored_bytes = 8;
        let read = cache.read(&[wanted]).pop().flatten().expect("is there");
        assert_eq!(read, number.to_le_bytes()[..]);
    }
    println!("{FRAMES} frames in {} segments: {took:?}, {bytes} bytes of memory", status.segments);
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("statm");
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.expect("pages") * 4096
}
