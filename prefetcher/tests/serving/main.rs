//! The server against a pretend VMM over real sockets, real userfaultfds and a real store.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test binary counts with small numbers, and may print"
)]
#![expect(missing_docs, unreachable_pub, reason = "a test binary")]

mod child;
mod handshakes;
mod learning;
mod panics;
mod removal;
mod split;
mod vcpu;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use reap_prefetcher::{End, Event, EventKind, Mode, RestoreReport, Server, ServerConfig};
use reap_store::pack::{Input, Request, pack};
use reap_store::{
    FileKind, Node, NodeConfig, PAGE_SIZE, Snapshot, Store, Touch, Urgency, WorkingSet,
    WorkingSetContent, WorkingSetRun,
};
use reap_vmm::{HugePool, PretendVm, true_memory, true_page};

/// A store with one snapshot of `true_memory`, and a server.
pub struct Fixture {
    pub directory: tempfile::TempDir,
    pub node: Node,
    pub snapshot: Arc<Snapshot>,
    pub server: Server,
}

impl Fixture {
    pub fn new(pages: u64) -> Self {
        Self::with_config(pages, ServerConfig::default())
    }

    pub fn with_config(pages: u64, config: ServerConfig) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let url = format!("file://{}/store", directory.path().display());
        let memory = directory.path().join("memory");
        std::fs::write(&memory, true_memory(pages)).expect("memory file");
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let store = runtime.block_on(Store::init(&url)).expect("store");
        let request = Request {
            level: 1,
            ..Request::new(
                "one".parse().expect("name"),
                vec![Input { name: "memory".into(), kind: FileKind::Memory, path: memory }],
            )
        };
        let packed = pack(&store, &runtime, &request, &mut |_| ControlFlow::Continue(()));
        let packed = packed.expect("packs");
        let node = Node::start(&NodeConfig::reader(&url)).expect("node");
        let snapshot = node.block_on(node.open_id(packed.id)).expect("opens");
        let server = Server::start(config).expect("server");
        Self { directory, node, snapshot, server }
    }

    /// One more snapshot of the same store: the same memory, and a disk.
    pub fn with_disk(&self, disk: &[u8]) -> Arc<Snapshot> {
        let path = self.directory.path().join("disk");
        std::fs::write(&path, disk).expect("disk file");
        let input = |name: &str, kind| {
            let path = self.directory.path().join(name);
            Input { name: name.into(), kind, path }
        };
        let files = vec![input("memory", FileKind::Memory), input("disk", FileKind::Disk)];
        let request = Request { level: 1, ..Request::new("two".parse().expect("name"), files) };
        let runtime = tokio::runtime::Runtime::new().expect("runtime");
        let go_on = &mut |_| ControlFlow::Continue(());
        let packed = pack(self.node.store(), &runtime, &request, go_on).expect("packs");
        self.node.block_on(self.node.open_id(packed.id)).expect("opens")
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("uffd.sock")
    }

    pub fn bind(&self, choose: impl Fn() -> Mode + Send + Sync + 'static) -> PathBuf {
        let path = self.socket();
        self.server.bind(&path, self.snapshot.clone(), choose).expect("binds");
        path
    }

    /// Publishes `touches` as a working set, and opens it.
    pub fn published(&self, touches: &[Touch]) -> Arc<WorkingSet> {
        let content = WorkingSetContent::of_recording(touches);
        let published = self.node.publish_working_set(&self.snapshot, &content);
        self.node.block_on(published).expect("publishes");
        let newest = self.node.block_on(self.node.working_set(&self.snapshot));
        newest.expect("lists").expect("is there")
    }

    /// The same of pages of memory, touched in their order.
    pub fn published_pages(&self, pages: std::ops::Range<u64>) -> Arc<WorkingSet> {
        let touches: Vec<_> = pages.map(|page| Touch { file: 0, page, at_us: page }).collect();
        self.published(&touches)
    }

    /// A snapshot of so many pages, all of them in its working set, and the socket at which it is prefetched.
    pub fn prefetched(pages: u64) -> (Self, PathBuf) {
        let fixture = Self::new(pages);
        let set = fixture.published_pages(0..pages);
        let socket = fixture.bind(move || Mode::Prefetch(set.clone()));
        (fixture, socket)
    }

    /// Waits until `wanted` is true of the newest restore.
    pub fn wait_for(&self, wanted: impl Fn(&RestoreReport) -> bool) -> RestoreReport {
        let began = Instant::now();
        loop {
            let newest = self.server.restores().pop();
            if let Some(report) = &newest
                && wanted(report)
            {
                return report.clone();
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{newest:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Damages every pack, so that nothing can be fetched any more.
    pub fn ruin_the_store(&self) {
        for entry in std::fs::read_dir(self.directory.path().join("store/pack")).expect("packs") {
            let path = entry.expect("entry").path();
            let mut bytes = std::fs::read(&path).expect("pack");
            bytes[32..].iter_mut().for_each(|byte| *byte ^= 0x55);
            std::fs::write(&path, bytes).expect("pack");
        }
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        // A VM of this very process that cannot be handed over would end it.
        self.server.stop(Duration::from_secs(30));
    }
}

pub fn whole(pages: u64) -> PretendVm {
    PretendVm::whole(pages).expect("maps")
}

#[test]
fn every_page_is_right_on_demand_from_many_threads() {
    let fixture = Fixture::new(3000);
    let socket = fixture.bind(|| Mode::Demand);
    let mut vm = whole(3000);
    vm.connect(&socket).expect("connects");
    let pages = vm.pages();
    std::thread::scope(|scope| {
        for thread in 0..8usize {
            let (vm, mut pages) = (&vm, pages.clone());
            pages.rotate_left(thread * 300);
            if thread % 2 == 1 {
                pages.reverse();
            }
            scope.spawn(move || vm.check(&pages).expect("every byte"));
        }
    });
    let report = fixture.wait_for(|report| report.faults_zero.count >= 600);
    assert_eq!(report.mode, "demand");
    assert!(report.faults_cached.count + report.faults_fetched.count >= 2000, "{report:?}");
    assert!(report.end.is_none());
}

#[test]
fn regions_with_gaps_and_offsets_get_their_own_pages() {
    let fixture = Fixture::new(1000);
    let socket = fixture.bind(|| Mode::Demand);
    let size = PAGE_SIZE as u64;
    // Out of order, with parts of the file that no region has.
    let mut vm =
        PretendVm::map(&[(500 * size, 400), (0, 300), (950 * size, 50)], size).expect("maps");
    vm.connect(&socket).expect("connects");
    vm.check(&vm.pages()).expect("every byte");
}

#[test]
fn a_recording_is_what_was_touched_and_then_it_is_there_before_it_is_touched() {
    let config = ServerConfig { settle: Duration::from_millis(150), ..ServerConfig::default() };
    let fixture = Fixture::with_config(3000, config);
    let (sender, receiver) = mpsc::channel();
    let socket = fixture.bind(move || {
        let sender = sender.clone();
        Mode::Record(Box::new(move |touches| sender.send(touches).expect("receiver")))
    });
    let mut vm = whole(3000);
    vm.connect(&socket).expect("connects");
    let touched: Vec<_> =
        (0..400u64).map(|number| vm.pages()[((number * 37) % 3000) as usize]).collect();
    vm.check(&touched).expect("every byte");
    let touches: Vec<Touch> = receiver.recv_timeout(Duration::from_secs(10)).expect("it settles");
    let order: Vec<u64> = touches.iter().map(|touch| touch.page).collect();
    assert_eq!(order, touched.iter().map(|(_, page)| *page).collect::<Vec<_>>());
    // After it settled nothing is recorded, such as the faults of a shutdown.
    let late = vm.pages()[2999];
    vm.check(&[late]).expect("every byte");
    assert!(receiver.recv_timeout(Duration::from_millis(300)).is_err());
    // Not dropped yet: the next VM must not get its addresses by chance.
    let former = vm;

    let set = fixture.published(&touches);
    assert!(set.zero_pages() > 0);
    fixture.server.unbind(&socket);
    let socket = fixture.bind(move || Mode::Prefetch(set.clone()));
    let mut vm = whole(3000);
    vm.connect(&socket).expect("connects");
    let complete = |report: &RestoreReport| {
        report.mode == "prefetch"
            && report.prefetched_pages == report.planned_pages
            && report.prefetched_zero_pages == report.planned_zero_pages
    };
    let report = fixture.wait_for(complete);
    assert_eq!(report.planned_pages + report.planned_zero_pages, 400);
    // This VM's own addresses: the first VM's mean nothing here.
    let pages = vm.pages();
    let again: Vec<_> = touched.iter().map(|(_, page)| pages[*page as usize]).collect();
    vm.check(&again).expect("every byte");
    let report = fixture.wait_for(complete);
    let faults = [report.faults_cached, report.faults_fetched, report.faults_zero];
    assert_eq!(faults.iter().map(|faults| faults.count).sum::<u64>(), 0, "no touch faults");
    assert_eq!((report.late_pages, report.missed_pages), (0, 0));
    vm.check(&vm.pages()).expect("every other page on demand");
    assert!(fixture.wait_for(|_| true).missed_pages > 1000);
    drop(former);
}

#[test]
fn a_damaged_working_set_costs_speed_and_nothing_else() {
    let fixture = Fixture::new(1000);
    let set = fixture.published_pages(0..1000);
    let sets = fixture.directory.path().join("store/ws").join(fixture.snapshot.id().to_string());
    let path = std::fs::read_dir(sets).expect("sets").next().expect("one").expect("entry").path();
    let mut bytes = std::fs::read(&path).expect("set");
    let length = bytes.len();
    bytes[length / 2] ^= 1;
    bytes.truncate(length - 1000);
    std::fs::write(&path, bytes).expect("set");
    let socket = fixture.bind(move || Mode::Prefetch(set.clone()));
    let mut vm = whole(1000);
    vm.connect(&socket).expect("connects");
    vm.check(&vm.pages()).expect("every byte");
    let report = fixture.wait_for(|report| report.failed_prefetch_frames >= 2);
    assert!(report.prefetched_pages > 0 && report.end.is_none(), "{report:?}");
}

#[test]
fn a_planned_page_waits_for_its_working_set_and_needs_no_pack() {
    let fixture = Fixture::new(1000);
    drop(fixture.published_pages(0..1000));
    fixture.ruin_the_store();
    // A node that has nothing in memory.
    let url = format!("file://{}/store", fixture.directory.path().display());
    let node = Node::start(&NodeConfig::reader(&url)).expect("node");
    let snapshot = node.block_on(node.open_id(fixture.snapshot.id())).expect("opens");
    let set = node.block_on(node.working_set(&snapshot)).expect("lists").expect("is there");
    let socket = fixture.directory.path().join("other.sock");
    let serve = move || Mode::Prefetch(set.clone());
    fixture.server.bind(&socket, snapshot, serve).expect("binds");
    let mut vm = whole(1000);
    vm.connect(&socket).expect("connects");
    // The last first: it cannot be there yet.
    let backwards: Vec<_> = vm.pages().into_iter().rev().collect();
    vm.check(&backwards).expect("every byte");
    assert!(fixture.wait_for(|_| true).end.is_none());
}

/// The threads that prefetch are kept busy, as by guests that are ahead of them.
#[test]
fn a_late_page_brings_those_that_are_touched_next() {
    let fixture = Fixture::new(1000);
    // From the last to the first.
    let touches: Vec<_> =
        (0..200).rev().map(|page| Touch { file: 0, page, at_us: 10 * (200 - page) }).collect();
    let set = fixture.published(&touches);
    let (sender, came) = mpsc::channel();
    set.fetch(Urgency::Prefetch, move |_, frame| sender.send(frame.is_ok()).expect("receiver"));
    assert!(
        (0..set.frame_count()).all(|_| came.recv().expect("comes")),
        "its frames are in memory"
    );
    let busy = fixture.snapshot.frames_of(0, 901..902);
    let (sender, came) = mpsc::channel();
    fixture.snapshot.fetch(&busy, Urgency::Demand, move |_, _| sender.send(()).expect("receiver"));
    came.recv().expect("comes");
    let gate = Arc::new(parking_lot::Mutex::new(()));
    let closed = gate.lock();
    for _ in 0..std::thread::available_parallelism().expect("known").get() {
        let gate = gate.clone();
        fixture.snapshot.fetch(&busy, Urgency::Prefetch, move |_, _| drop(gate.lock()));
    }
    // In the order of their touch.
    let pages_of = |frame| -> Vec<u64> {
        let pages = |run: &WorkingSetRun| run.first_page..run.first_page + u64::from(run.pages);
        let mut pages: Vec<u64> = set.runs(frame).iter().flat_map(pages).collect();
        pages.sort_unstable_by(|one, other| other.cmp(one));
        pages
    };
    let of_frame = (0..set.frame_count()).map(pages_of).max_by_key(Vec::len).expect("has frames");
    let socket = fixture.bind(move || Mode::Prefetch(set.clone()));
    let mut vm = whole(1000);
    vm.connect(&socket).expect("connects");
    vm.check(&[vm.pages()[of_frame[0] as usize]]).expect("every byte");
    let report = fixture.wait_for(|report| report.prefetched_pages == 16);
    assert_eq!(report.late_pages, 1);
    let (_, timeline) = fixture.server.timeline(report.id).expect("it is remembered");
    let installs = timeline.events.iter().filter(|event| event.kind == EventKind::Install);
    let pages = |event: &Event| event.page..event.page + u32::from(event.pages);
    let installed: Vec<u64> = installs.flat_map(pages).map(u64::from).collect();
    assert_eq!(installed.len(), 16);
    // Neighbours are one run, and of the last run only a part is taken.
    assert!(of_frame[1..16].iter().all(|page| installed.contains(page)), "{installed:?}");
    drop(closed);
    vm.check(&vm.pages()).expect("every byte");
}

#[test]
fn many_vms_at_once_and_prefetch_among_their_faults() {
    let fixture = Fixture::new(1500);
    let touches: Vec<Touch> =
        (0..1500).rev().map(|page| Touch { file: 0, page, at_us: 0 }).collect();
    let set = fixture.published(&touches);
    let socket = fixture.bind(move || Mode::Prefetch(set.clone()));
    std::thread::scope(|scope| {
        for _ in 0..50 {
            let socket = &socket;
            scope.spawn(move || {
                let mut vm = whole(1500);
                vm.connect(socket).expect("connects");
                vm.check(&vm.pages()).expect("every byte");
            });
        }
    });
    assert_eq!(fixture.server.restores().len(), 50);
}

#[test]
fn huge_pages_are_filled_from_all_their_frames() {
    let _pool = HugePool::of(8).expect("2 MiB pages; this needs root");
    let fixture = Fixture::new(4 * 512);
    let set = {
        let touches: Vec<Touch> =
            [3, 700].iter().map(|page| Touch { file: 0, page: *page, at_us: 0 }).collect();
        fixture.published(&touches)
    };
    let socket = fixture.bind(move || Mode::Prefetch(set.clone()));
    let mut vm = PretendVm::map(&[(0, 4 * 512)], 2 << 20).expect("maps");
    vm.connect(&socket).expect("connects");
    fixture.wait_for(|report| report.prefetched_pages == 1024);
    vm.check(&vm.pages()).expect("every byte");
    let address = vm.regions()[0].0;
    vm.remove(address, 512);
    assert!(vm.read(address + 4096).iter().all(|byte| *byte == 0));
}

#[test]
fn several_regions_of_huge_pages_and_a_removal() {
    let _pool = HugePool::of(4).expect("2 MiB pages; this needs root");
    let fixture = Fixture::new(2 * 512);
    let socket = fixture.bind(|| Mode::Demand);
    let regions = [(0, 512), (512 * PAGE_SIZE as u64, 512)];
    let mut vm = PretendVm::map(&regions, 2 << 20).expect("maps");
    vm.connect(&socket).expect("connects");
    vm.check(&vm.pages()).expect("two regions of 2 MiB pages");
    vm.remove(vm.regions()[1].0, 512);
    let address = vm.regions()[1].0;
    assert!(vm.read(address).iter().all(|byte| *byte == 0), "zeros after the removal");
    assert!(fixture.wait_for(|_| true).end.is_none());
}

#[test]
fn a_stop_gives_each_vm_all_its_memory() {
    let fixture = Fixture::new(2000);
    let socket = fixture.bind(|| Mode::Demand);
    let mut vm = whole(2000);
    vm.connect(&socket).expect("connects");
    let pages = vm.pages();
    vm.check(&pages[..100]).expect("every byte");
    vm.remove(pages[1500].0, 10);
    assert_eq!(fixture.server.stop(Duration::from_secs(20)), (1, 0));
    assert!(!socket.exists());
    assert_eq!(fixture.server.restores()[0].end, Some(End::HandedOver));
    for (address, page) in pages {
        let expected =
            if (1500..1510).contains(&page) { vec![0; PAGE_SIZE] } else { true_page(page) };
        assert!(vm.read(address) == expected, "page {page}");
    }
}
