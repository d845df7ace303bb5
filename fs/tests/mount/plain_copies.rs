//! Files that the kernel reads from a plain copy in place of the mount. A kernel before 6.9 cannot, and then the mount says so, which
//! is all that is tested.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use reap_fs::{Mount, MountConfig};
use reap_store::{Error, ErrorKind, Node, NodeConfig, PlainCopy, Snapshot};

use super::{Fixture, PAGE, errno, url};

/// The fixture's store on a node that has a place for copies.
struct Copying {
    fixture: Fixture,
    node: Node,
    snapshot: Arc<Snapshot>,
}

impl Copying {
    /// `None` where the kernel cannot do it.
    fn new(pages: usize, limit: u64, floor: u64) -> Option<Self> {
        let mut fixture = Fixture::new(pages);
        fixture.mount.take().expect("a mount").stop(Duration::from_secs(1));
        let config = NodeConfig {
            cache_dir: Some(fixture.directory.path().join("cache")),
            plain_copies_bytes: limit,
            disk_free_floor_bytes: floor,
            ..NodeConfig::reader(&url(fixture.directory.path()))
        };
        let node = Node::start(&config).expect("node");
        let config = MountConfig { mount_point: fixture.path(""), refuse_write_open: false };
        let mount = Mount::start(node.clone(), &config).expect("mounts");
        let can = mount.passes_through();
        fixture.mount = Some(mount);
        if !can {
            assert!(is_before_6_9(), "the kernel should be able to");
            return None;
        }
        let snapshot = node.block_on(node.open_id(fixture.packed.id)).expect("opens");
        Some(Self { fixture, node, snapshot })
    }

    fn copy(&self) -> Result<Arc<PlainCopy>, Error> {
        self.node.block_on(self.node.plain_copy(&self.snapshot, 0))
    }

    fn path(&self) -> PathBuf {
        self.fixture.memory_path()
    }

    /// Frames that were asked for, for any reader.
    fn asked(&self) -> u64 {
        let counters = self.node.counters();
        counters.memory_hits.load(Ordering::Relaxed)
            + counters.decoded_frames.load(Ordering::Relaxed)
    }

    /// Copies that somebody holds or has open.
    fn in_use(&self) -> u64 {
        self.node.plain_copies_status().expect("has a place for them").files
    }

    /// The kernel tells us later that a file was closed.
    fn until_in_use(&self, wanted: u64) {
        let began = Instant::now();
        while self.in_use() != wanted {
            assert!(began.elapsed() < Duration::from_secs(10), "{} copies", self.in_use());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn reads(&self, file: &File) -> bool {
        let mut bytes = vec![0; self.fixture.memory.len() + PAGE];
        let mut read = 0;
        loop {
            match file.read_at(&mut bytes[read..], read as u64).expect("reads") {
                0 => return bytes[..read] == self.fixture.memory[..],
                more => read += more,
            }
        }
    }
}

fn is_before_6_9() -> bool {
    let system = rustix::system::uname();
    let release = system.release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) < (Some(6), Some(9))
}

#[test]
fn the_kernel_reads_a_plain_copy_and_the_store_is_not_asked() {
    let Some(copying) = Copying::new(1500, 1 << 30, 0) else { return };
    let copy = copying.copy().expect("copies");
    assert!(Arc::ptr_eq(&copy, &copying.copy().expect("is there")), "one copy is enough");
    let status = copying.node.plain_copies_status().expect("a place for them");
    assert_eq!((status.files, status.used_bytes, status.limit_bytes), (1, copy.bytes(), 1 << 30));
    assert!(copy.bytes() < copying.fixture.memory.len() as u64, "holes are holes");
    let asked = copying.asked();
    let file = File::open(copying.path()).expect("opens");
    let again = File::open(copying.path()).expect("opens a second time");
    assert!(copying.reads(&file) && copying.reads(&again));
    let script = "import mmap, sys\n\
        file = open(sys.argv[1], 'rb')\n\
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)\n\
        sys.exit(0 if bytes(memory) == open(sys.argv[2], 'rb').read() else 1)\n";
    let mut python = std::process::Command::new("python3");
    python.args(["-c", script]).arg(copying.path());
    python.arg(copying.fixture.directory.path().join("input"));
    assert!(python.status().expect("runs").success(), "a mapping has other bytes");
    assert_eq!(copying.asked(), asked, "the mount was asked");
    // Length and holes are the snapshot's as ever.
    assert_eq!(file.metadata().expect("stat").len(), copying.fixture.memory.len() as u64);
    let hole =
        rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(3 * PAGE as u64)).expect("a hole");
    assert!(hole > 3 * PAGE as u64 && hole < copying.fixture.memory.len() as u64);
    // Its space is in use until it is let go and closed.
    drop(copy);
    assert_eq!(copying.in_use(), 1);
    let late = File::open(copying.path()).expect("opens beside the others");
    drop((file, again));
    assert!(copying.reads(&late));
    drop(late);
    copying.until_in_use(0);
    assert!(copying.snapshot.plain_copy(0).is_none());
    let file = File::open(copying.path()).expect("opens");
    assert!(copying.reads(&file) && copying.asked() > asked, "by the mount again");
}

/// The kernel gives `EIO` where a file is open in both ways at once.
#[test]
fn a_file_that_is_open_keeps_its_way_and_others_follow() {
    let Some(copying) = Copying::new(300, 1 << 30, 0) else { return };
    let before = File::open(copying.path()).expect("opens");
    let _copy = copying.copy().expect("copies");
    let beside = File::open(copying.path()).expect("opens, as the one before");
    let asked = copying.asked();
    assert!(copying.reads(&beside) && copying.reads(&before));
    assert!(copying.asked() > asked, "by the mount");
    drop((before, beside));
    // Closed for the kernel, and soon for us.
    let began = Instant::now();
    loop {
        let asked = copying.asked();
        let file = File::open(copying.path()).expect("opens");
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("drops pages");
        assert!(copying.reads(&file));
        if copying.asked() == asked {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "it never changes over");
    }
}

#[test]
fn who_could_write_does_not_get_at_the_copy() {
    let Some(copying) = Copying::new(50, 1 << 30, 0) else { return };
    let _copy = copying.copy().expect("copies");
    let for_writing = || File::options().read(true).write(true).open(copying.path());
    let reader = File::open(copying.path()).expect("opens");
    assert_eq!(errno(for_writing()), Some(libc::EROFS));
    assert_eq!(errno(File::options().append(true).open(copying.path())), Some(libc::EROFS));
    assert!(copying.reads(&reader));
    drop(reader);
    let began = Instant::now();
    let writer = loop {
        match for_writing() {
            Ok(writer) => break writer,
            Err(error) => assert!(began.elapsed() < Duration::from_secs(10), "{error}"),
        }
    };
    assert_eq!(errno(writer.write_at(b"x", 0)), Some(libc::EROFS));
    let reader = File::open(copying.path()).expect("opens beside it");
    assert!(copying.reads(&reader) && copying.reads(&writer));
}

#[test]
fn a_copy_that_has_no_room_or_cannot_be_had_leaves_nothing() {
    let refused = |copying: &Copying, text: &str| {
        let error = copying.copy().err().expect("is refused");
        assert!(error.kind() == ErrorKind::Refused && error.to_string().contains(text), "{error}");
        assert_eq!(copying.in_use(), 0);
    };
    let Some(copying) = Copying::new(50, 8 << 10, 0) else { return };
    refused(&copying, "(--plain-copies)");
    let Some(copying) = Copying::new(50, 1 << 30, 1 << 60) else { return };
    refused(&copying, "(--cache-free-floor)");
    let Some(copying) = Copying::new(1500, 1 << 30, 0) else { return };
    for entry in
        std::fs::read_dir(copying.fixture.directory.path().join("store/pack")).expect("packs")
    {
        let path = entry.expect("entry").path();
        let mut bytes = std::fs::read(&path).expect("reads");
        let middle = bytes.len() / 2;
        bytes[middle..middle + 64].iter_mut().for_each(|byte| *byte ^= 0x11);
        std::fs::write(&path, bytes).expect("writes");
    }
    let error = copying.copy().err().expect("is damaged");
    assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
    assert_eq!(copying.in_use(), 0);
    assert!(copying.snapshot.plain_copy(0).is_none());
    let names = std::fs::read_dir(copying.fixture.directory.path().join("cache")).expect("cache");
    let names: Vec<_> = names.map(|entry| entry.expect("entry").file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().contains("copy")), "{names:?}");
    assert_eq!(names.len(), 1, "the node's id alone: {names:?}");
}
