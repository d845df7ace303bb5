//! The mount over a real kernel and a real store: every way of reading, and every wrong use.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a test binary counts with small numbers"
)]

use std::io::{Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use reap_fs::{Mount, MountConfig, MountError, StopOutcome};
use reap_store::pack::{Input, Packed, Request, pack};
use reap_store::{FileKind, Node, NodeConfig, Store};

mod plain_copies;

const PAGE: usize = 4096;

/// Pages of zeros, repeated and single ones, and an end inside a page.
fn content(pages: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0u8; pages * PAGE];
    for (number, page) in bytes.chunks_exact_mut(PAGE).enumerate() {
        match (number / 3) % 5 {
            0 => {}
            1 => page.fill(0x42),
            _ => {
                for (at, byte) in page.iter_mut().enumerate() {
                    *byte = (number * 31 + at / 7) as u8 ^ seed;
                }
                page[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
            }
        }
    }
    bytes.truncate(pages * PAGE - 1000);
    bytes
}

struct Fixture {
    directory: tempfile::TempDir,
    memory: Vec<u8>,
    packed: Packed,
    node: Node,
    mount: Option<Mount>,
}

impl Fixture {
    fn new(pages: usize) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let url = url(directory.path());
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        runtime.block_on(Store::init(&url)).expect("store");
        drop(runtime);
        let memory = content(pages, 0);
        let packed = pack_as(directory.path(), "one:v1", &memory);
        let node = Node::start(&NodeConfig::reader(&url)).expect("node");
        let config =
            MountConfig { mount_point: directory.path().join("mnt"), refuse_write_open: false };
        let mount = Mount::start(node.clone(), &config).expect("mounts");
        Self { directory, memory, packed, node, mount: Some(mount) }
    }

    fn path(&self, rest: &str) -> PathBuf {
        self.directory.path().join("mnt").join(rest)
    }

    fn memory_path(&self) -> PathBuf {
        self.path("snapshots/one:v1/memory")
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if let Some(mount) = self.mount.take() {
            mount.stop(Duration::from_secs(1));
        }
        // Also what a killed holder or a failed test left.
        let path = self.directory.path().join("mnt");
        while rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH).is_ok() {}
    }
}

fn url(directory: &Path) -> String {
    format!("file://{}/store", directory.display())
}

fn pack_as(directory: &Path, name: &str, memory: &[u8]) -> Packed {
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let path = directory.join("input");
    std::fs::write(&path, memory).expect("input");
    let store = runtime.block_on(Store::open(&url(directory))).expect("store");
    let request = Request {
        level: 1,
        ..Request::new(
            name.parse().expect("name"),
            vec![Input { name: "memory".into(), kind: FileKind::Memory, path }],
        )
    };
    pack(&store, &runtime, &request, &mut |_| ControlFlow::Continue(())).expect("packs")
}

/// Whoever records a restore is told what of a disk is read, and nothing of memory.
#[test]
fn reads_of_a_disk_are_told_to_whoever_watches() {
    let fixture = Fixture::new(100);
    let input = |name: &str, kind| {
        let path = fixture.directory.path().join(name);
        std::fs::write(&path, content(100, name.len() as u8)).expect("input");
        Input { name: name.into(), kind, path }
    };
    let files = vec![input("memory", FileKind::Memory), input("root", FileKind::Disk)];
    let request = Request { level: 1, ..Request::new("two".parse().expect("name"), files) };
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let packed = pack(fixture.node.store(), &runtime, &request, &mut |_| ControlFlow::Continue(()));
    let id = packed.expect("packs").id;
    let snapshot = fixture.node.block_on(fixture.node.open_id(id)).expect("opens");
    let began = std::time::Instant::now();
    let log = snapshot.watch_reads();
    let mut page = [0; PAGE];
    for name in ["memory", "root"] {
        let file = std::fs::File::open(fixture.path("snapshots/two").join(name)).expect("opens");
        file.read_exact_at(&mut page, 40 * PAGE as u64).expect("reads");
    }
    let touches = log.touches(&snapshot, began);
    assert!(touches.iter().any(|touch| touch.page == 40), "{touches:?}");
    assert!(touches.iter().all(|touch| touch.file == 1), "{touches:?}");
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn every_byte_is_right_and_reads_past_the_end_are_short() {
    let fixture = Fixture::new(3000);
    assert!(std::fs::read(fixture.memory_path()).expect("reads") == fixture.memory);
    let file = std::fs::File::open(fixture.memory_path()).expect("opens");
    let end = fixture.memory.len() as u64;
    let mut buffer = [0; 100];
    assert_eq!(file.read_at(&mut buffer, end - 10).expect("reads"), 10);
    assert_eq!(file.read_at(&mut buffer, end).expect("reads"), 0);
    assert_eq!(file.read_at(&mut buffer, end + 100_000).expect("reads"), 0);
    let metadata = file.metadata().expect("metadata");
    assert_eq!(metadata.len(), end);
    assert!(metadata.blocks() * 512 < end, "holes take no blocks");
    assert_eq!(metadata.mode() & 0o777, 0o444);
}

#[test]
fn random_reads_by_many_threads_agree() {
    let fixture = Fixture::new(2000);
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let fixture = &fixture;
            scope.spawn(move || {
                let file = std::fs::File::open(fixture.memory_path()).expect("opens");
                let mut state = thread + 1;
                let mut buffer = vec![0; 70_000];
                for _ in 0..300 {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let at = (state >> 20) as usize % fixture.memory.len();
                    let length = (state >> 50) as usize % buffer.len() + 1;
                    let read = file.read_at(&mut buffer[..length], at as u64).expect("reads");
                    let expected = &fixture.memory[at..fixture.memory.len().min(at + length)];
                    assert!(read > 0 && buffer[..read] == expected[..read]);
                }
            });
        }
    });
}

#[test]
fn holes_are_found_where_zeros_are() {
    let fixture = Fixture::new(300);
    let file = std::fs::File::open(fixture.memory_path()).expect("opens");
    let is_zero = |page: usize| {
        let end = fixture.memory.len().min((page + 1) * PAGE);
        fixture.memory[page * PAGE..end].iter().all(|byte| *byte == 0)
    };
    let (mut at, mut data_pages) = (0u64, 0);
    while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data)).expect("a hole");
        for page in at as usize / PAGE..data as usize / PAGE {
            assert!(is_zero(page), "page {page} lies in a hole");
        }
        for page in data as usize / PAGE..(hole as usize).div_ceil(PAGE) {
            assert!(!is_zero(page), "page {page} is data");
            data_pages += 1;
        }
        at = hole;
    }
    assert_eq!(data_pages, (0..300).filter(|page| !is_zero(*page)).count());
    let past = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(fixture.memory.len() as u64));
    assert_eq!(past, Err(rustix::io::Errno::NXIO));
    let copy = fixture.directory.path().join("copy");
    let status =
        Command::new("cp").arg("--sparse=always").arg(fixture.memory_path()).arg(&copy).status();
    assert!(status.expect("cp runs").success());
    assert!(std::fs::read(&copy).expect("copy") == fixture.memory);
}

#[test]
fn names_and_ids_share_one_inode_and_names_can_move() {
    let fixture = Fixture::new(100);
    let by_id = fixture.path(&format!("by-id/{}/memory", fixture.packed.id));
    let ino = std::fs::metadata(fixture.memory_path()).expect("by name").ino();
    assert_eq!(std::fs::metadata(&by_id).expect("by id").ino(), ino);
    let list = |path: &str| -> Vec<String> {
        let entries = std::fs::read_dir(fixture.path(path)).expect("lists");
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("entry").file_name().into_string().expect("text"))
            .collect();
        names.sort();
        names
    };
    assert_eq!(list(""), ["by-id", "snapshots"]);
    assert_eq!(list("snapshots"), ["one:v1"]);
    assert_eq!(list("by-id"), [fixture.packed.id.to_string()]);
    assert_eq!(list("snapshots/one:v1"), ["memory"]);
    let mut open = std::fs::File::open(fixture.memory_path()).expect("opens");
    let other = content(120, 9);
    pack_as(fixture.directory.path(), "one:v1", &other);
    std::thread::sleep(Duration::from_millis(1200));
    assert!(std::fs::read(fixture.memory_path()).expect("reads") == other, "the name has moved");
    open.seek(SeekFrom::Start(0)).expect("seeks");
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).expect("reads");
    assert!(bytes == fixture.memory, "what was open is what it was");
    assert!(std::fs::read(by_id).expect("reads") == fixture.memory);
}

#[test]
fn what_is_not_there_is_enoent() {
    let fixture = Fixture::new(10);
    for path in [
        "x",
        "snapshots/x",
        "snapshots/a b",
        "snapshots/one:v1/x",
        "by-id/x",
        "by-id/00000000000000000000000000000000",
    ] {
        assert_eq!(errno(std::fs::metadata(fixture.path(path))), Some(libc::ENOENT), "{path}");
    }
}

#[test]
fn opening_for_writing_passes_and_every_change_is_refused() {
    let fixture = Fixture::new(50);
    let path = fixture.memory_path();
    // As QEMU 7.2 opens the memory file of a private mapping.
    let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).expect("opens");
    assert_eq!(errno(file.write_at(b"x", 0)), Some(libc::EROFS));
    assert_eq!(errno(file.set_len(10)), Some(libc::EROFS));
    assert_eq!(errno(std::fs::write(&path, "x")), Some(libc::EROFS));
    assert_eq!(errno(std::fs::remove_file(&path)), Some(libc::EROFS));
    assert_eq!(errno(std::fs::create_dir(fixture.path("snapshots/new"))), Some(libc::EROFS));
    let new = fixture.path("snapshots/one:v1/new");
    assert_eq!(errno(std::fs::write(&new, "x")), Some(libc::EROFS));
    assert_eq!(errno(std::fs::hard_link(&path, &new)), Some(libc::EROFS));
    assert_eq!(errno(std::os::unix::fs::symlink("x", &new)), Some(libc::EROFS));
    assert_eq!(errno(std::fs::rename(&path, &new)), Some(libc::EROFS));
    let mode = std::fs::Permissions::from_mode(0o666);
    assert_eq!(errno(std::fs::set_permissions(&path, mode)), Some(libc::EROFS));
    let attribute = rustix::fs::setxattr(&path, "user.x", b"x", rustix::fs::XattrFlags::empty());
    assert_eq!(attribute, Err(rustix::io::Errno::ROFS));
    let space = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 4096);
    assert_eq!(space, Err(rustix::io::Errno::ROFS));
    assert!(std::fs::read(&path).expect("reads") == fixture.memory);
}

/// A process that maps a file shared and writes to it must not change what others read.
#[test]
fn writes_through_a_shared_mapping_do_not_reach_others() {
    let fixture = Fixture::new(50);
    let path = fixture.memory_path();
    let script = "import mmap, sys\n\
        file = open(sys.argv[1], 'r+b')\n\
        memory = mmap.mmap(file.fileno(), 0)\n\
        memory[20480:20484] = b'evil'\n\
        try: memory.flush()\n\
        except OSError: pass\n";
    let status = Command::new("python3").args(["-c", script]).arg(&path).status();
    status.expect("python3 runs");
    let began = std::time::Instant::now();
    while std::fs::read(&path).expect("reads") != fixture.memory {
        assert!(began.elapsed() < Duration::from_secs(10), "the page cache stays poisoned");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Scattered pages come back as one write each: more than any queue holds.
#[test]
fn a_flood_of_writes_through_a_shared_mapping_hangs_nobody() {
    let fixture = Fixture::new(24_000);
    let path = fixture.memory_path();
    let script = "import mmap, sys\n\
        file = open(sys.argv[1], 'r+b')\n\
        memory = mmap.mmap(file.fileno(), 0)\n\
        for at in range(0, len(memory), 8192): memory[at:at + 4] = b'evil'\n\
        try: memory.flush()\n\
        except OSError: pass\n";
    let mut writer = Command::new("python3").args(["-c", script]).arg(&path).spawn().expect("runs");
    let began = std::time::Instant::now();
    while writer.try_wait().expect("waits").is_none() {
        assert!(began.elapsed() < Duration::from_secs(60), "the writer hangs");
        std::thread::sleep(Duration::from_millis(20));
    }
    while std::fs::read(&path).expect("reads") != fixture.memory {
        assert!(began.elapsed() < Duration::from_secs(60), "the page cache stays poisoned");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// As a VMM reads its guest memory.
#[test]
fn a_private_mapping_reads_every_byte_and_keeps_its_writes() {
    let fixture = Fixture::new(1500);
    let script = "import mmap, sys\n\
        file = open(sys.argv[1], 'r+b')\n\
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)\n\
        ok = bytes(memory) == open(sys.argv[2], 'rb').read()\n\
        memory[20480:20484] = b'mine'\n\
        sys.exit(0 if ok and memory[20480:20484] == b'mine' else 1)\n";
    let mut python = Command::new("python3");
    python.args(["-c", script]).arg(fixture.memory_path());
    let status = python.arg(fixture.directory.path().join("input")).status().expect("runs");
    assert!(status.success());
    assert!(std::fs::read(fixture.memory_path()).expect("reads") == fixture.memory);
}

#[test]
fn a_read_only_mount_refuses_to_open_for_writing() {
    let mut fixture = Fixture::new(10);
    fixture.mount.take().expect("a mount").stop(Duration::from_secs(1));
    let config = MountConfig { mount_point: fixture.path(""), refuse_write_open: true };
    fixture.mount = Some(Mount::start(fixture.node.clone(), &config).expect("mounts"));
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(fixture.memory_path());
    assert_eq!(errno(opened), Some(libc::EROFS));
    assert!(std::fs::read(fixture.memory_path()).expect("reads") == fixture.memory);
}

#[test]
fn a_damaged_frame_is_eio_and_the_others_are_right() {
    let fixture = Fixture::new(2000);
    for entry in std::fs::read_dir(fixture.directory.path().join("store/pack")).expect("packs") {
        let path = entry.expect("entry").path();
        let mut bytes = std::fs::read(&path).expect("pack");
        bytes[5000] ^= 4;
        std::fs::write(&path, bytes).expect("pack");
    }
    let file = std::fs::File::open(fixture.memory_path()).expect("opens");
    let mut failed = 0;
    for (number, expected) in fixture.memory.chunks(PAGE).enumerate() {
        let mut page = vec![0; expected.len()];
        match file.read_exact_at(&mut page, (number * PAGE) as u64) {
            Ok(()) => assert!(page == expected, "page {number}"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EIO));
                failed += 1;
            }
        }
    }
    assert!(failed > 0 && failed < 600, "{failed} pages failed");
}

#[test]
fn mount_points_in_use_are_refused() {
    let fixture = Fixture::new(10);
    let start = |path: PathBuf| {
        let config = MountConfig { mount_point: path, refuse_write_open: false };
        Mount::start(fixture.node.clone(), &config).err()
    };
    assert!(matches!(start(fixture.path("")), Some(MountError::InUse(_))));
    let full = fixture.directory.path().join("full");
    std::fs::create_dir_all(full.join("x")).expect("directory");
    assert!(matches!(start(full), Some(MountError::NotEmpty(_))));
    let file = fixture.directory.path().join("file");
    std::fs::write(&file, "x").expect("file");
    assert!(matches!(start(file), Some(MountError::NotADirectory(_))));
    assert!(reap_fs::is_under(&fixture.path("cache/new"), &fixture.path("")));
    assert!(!reap_fs::is_under(&fixture.directory.path().join("cache"), &fixture.path("")));
}

#[test]
fn a_stop_waits_for_users_and_then_takes_the_mount_away() {
    let mut fixture = Fixture::new(10);
    let mut open = std::fs::File::open(fixture.memory_path()).expect("opens");
    let mount = fixture.mount.take().expect("a mount");
    let began = std::time::Instant::now();
    assert_eq!(mount.stop(Duration::from_millis(300)), StopOutcome::Aborted);
    assert!(began.elapsed() >= Duration::from_millis(300));
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mount table");
    assert!(!table.contains(&fixture.path("").display().to_string()));
    // What was in the page cache may still be read; nothing hangs.
    let _either = open.read_to_end(&mut Vec::new());
}

const HOLDER: &str = "REAP_TEST_MOUNT_HOLDER";

/// Not a test of its own: the body of a process that mounts, and is killed.
#[test]
fn mount_holder_process() {
    let Ok(directory) = std::env::var(HOLDER) else { return };
    let node = Node::start(&NodeConfig::reader(&url(Path::new(&directory)))).expect("node");
    let mount_point = Path::new(&directory).join("mnt");
    let config = MountConfig { mount_point, refuse_write_open: false };
    let _mount = Mount::start(node, &config).expect("mounts");
    std::fs::write(Path::new(&directory).join("mounted"), "").expect("says so");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_dead_mount_is_cleared_away_also_behind_a_symbolic_link() {
    let mut fixture = Fixture::new(10);
    fixture.mount.take().expect("a mount").stop(Duration::from_secs(1));
    let mut holder = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "mount_holder_process"])
        .env(HOLDER, fixture.directory.path())
        .spawn()
        .expect("starts");
    let began = std::time::Instant::now();
    while !fixture.directory.path().join("mounted").exists() {
        assert!(began.elapsed() < Duration::from_secs(20), "the holder mounts");
        std::thread::sleep(Duration::from_millis(10));
    }
    holder.kill().expect("killed");
    holder.wait().expect("ended");
    assert_eq!(errno(std::fs::metadata(fixture.path("x"))), Some(libc::ENOTCONN));
    // As /var/run is one.
    let link = fixture.directory.path().join("link");
    std::os::unix::fs::symlink(fixture.directory.path(), &link).expect("link");
    let config = MountConfig { mount_point: link.join("mnt"), refuse_write_open: false };
    fixture.mount = Some(Mount::start(fixture.node.clone(), &config).expect("mounts"));
    assert!(std::fs::read(fixture.memory_path()).expect("reads") == fixture.memory);
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mount table");
    let ours = fixture.path("").display().to_string();
    let line = table.lines().find(|line| line.contains(ours.trim_end_matches('/')));
    assert!(line.expect("is mounted").contains(" - fuse.reap reap "));
}

/// Not a test: prints the figures of `docs/decisions/0002-mount-readahead.md`. Every line is a new
/// node and a new mount, so that neither has anything cached; the packs are in the page cache.
#[cfg(feature = "measure")]
#[test]
#[allow(clippy::print_stdout, reason = "prints figures")]
fn measure_readahead() {
    let mut fixture = Fixture::new(65_536);
    fixture.mount.take().expect("a mount").stop(Duration::from_secs(1));
    let sequential = "import sys, time\n\
        began = time.monotonic()\n\
        file = open(sys.argv[1], 'rb', buffering=0)\n\
        total = 0\n\
        while (piece := file.read(1 << 20)): total += len(piece)\n\
        print(f'{total / (time.monotonic() - began) / 1e6:.0f} MB/s')\n";
    let random = "import mmap, random, sys, time\n\
        file = open(sys.argv[1], 'rb')\n\
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)\n\
        pages = random.Random(1).sample(range(len(memory) // 4096), int(sys.argv[2]))\n\
        began = time.monotonic()\n\
        for page in pages: memory[page * 4096]\n\
        print(f'{(time.monotonic() - began) / len(pages) * 1e6:.0f} us a touch')\n";
    for round in 1..=5 {
        for kib in [128, 256, 512, 1024] {
            // Dense touches load the whole file either way; those of a guest are sparse.
            let kinds =
                [("sequential", sequential), ("100", random), ("1000", random), ("4000", random)];
            for (what, script) in kinds {
                let node = Node::start(&NodeConfig::reader(&url(fixture.directory.path())));
                let config =
                    MountConfig { mount_point: fixture.path(""), refuse_write_open: false };
                let mount = Mount::start(node.expect("node"), &config).expect("mounts");
                let device = std::fs::metadata(mount.path()).expect("metadata").dev();
                let minor = rustix::fs::minor(device);
                let control = format!("/sys/class/bdi/0:{minor}/read_ahead_kb");
                std::fs::write(&control, kib.to_string()).expect("sets");
                let path = fixture.memory_path();
                let mut python = Command::new("python3");
                let output =
                    python.args(["-c", script]).arg(&path).arg(what).output().expect("runs");
                let resident = Command::new("fincore").args(["-nbo", "RES"]).arg(&path).output();
                println!(
                    "round {round}, {kib} KiB, {what}: {}, {} MB in the page cache",
                    String::from_utf8_lossy(&output.stdout).trim(),
                    String::from_utf8_lossy(&resident.expect("fincore").stdout)
                        .trim()
                        .parse::<u64>()
                        .unwrap_or(0)
                        / 1_000_000
                );
                mount.stop(Duration::from_secs(1));
            }
        }
    }
}
