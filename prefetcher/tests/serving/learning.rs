//! What a restore shows of what it touches, and what it says of its working set.

use super::*;

fn learning_fixture(pages: u64) -> Fixture {
    let config = ServerConfig { settle: Duration::from_millis(150), ..ServerConfig::default() };
    Fixture::with_config(pages, config)
}

type Seen = mpsc::Receiver<Vec<Touch>>;

impl Fixture {
    /// Binds a socket of restores that are watched in the mode that `mode` makes.
    fn watched(
        &self,
        mode: impl Fn(reap_prefetcher::OnRecorded) -> Mode + Send + Sync + 'static,
    ) -> (PathBuf, Seen) {
        let (sender, receiver) = mpsc::channel();
        let socket = self.bind(move || {
            let sender = sender.clone();
            mode(Box::new(move |touches| sender.send(touches).expect("receiver")))
        });
        (socket, receiver)
    }
}

fn pages_of(seen: &Seen) -> Vec<u64> {
    let touches = seen.recv_timeout(Duration::from_secs(10)).expect("it settles");
    touches.iter().map(|touch| touch.page).collect()
}

#[test]
fn installed_pages_are_never_recorded_and_misses_are() {
    let fixture = learning_fixture(1000);
    let set = fixture.published_pages(0..300);
    let (socket, seen) = fixture.watched(move |done| Mode::Learn(set.clone(), done));
    let mut vm = whole(1000);
    vm.connect(&socket).expect("connects");
    fixture.wait_for(|report| report.prefetched_pages + report.prefetched_zero_pages == 300);
    vm.check(&vm.pages()[200..350]).expect("every byte");
    assert_eq!(pages_of(&seen), (300..350).collect::<Vec<_>>());
    // A shutdown touches what the function does not.
    vm.check(&vm.pages()[900..950]).expect("every byte");
    assert!(seen.recv_timeout(Duration::from_millis(300)).is_err());
    let report = fixture.wait_for(|report| report.settled);
    assert_eq!(report.missed_pages + report.missed_zero_pages, 50, "{report:?}");
    let fit = report.fit.expect("there was a set");
    assert!(fit.estimated && !report.inert);
    assert_eq!((fit.precision, fit.wasted_bytes), (1.0, 0), "by its weights");
    assert!((fit.recall - 300.0 / 350.0).abs() < 1e-9, "{fit:?}");
}

#[test]
fn a_sample_installs_nothing_and_sees_everything() {
    let fixture = learning_fixture(1000);
    let set = fixture.published_pages(0..300);
    let (socket, seen) = fixture.watched(move |done| Mode::Sample(set.clone(), done));
    let mut vm = whole(1000);
    vm.connect(&socket).expect("connects");
    vm.check(&vm.pages()[100..320]).expect("every byte");
    assert_eq!(pages_of(&seen), (100..320).collect::<Vec<_>>());
    let report = fixture.wait_for(|report| report.settled);
    assert_eq!(report.mode, "sample");
    assert_eq!((report.prefetched_pages, report.hit_pages, report.late_pages), (0, 200, 0));
    let fit = report.fit.expect("there was a set");
    assert!(!fit.estimated);
    assert!((fit.precision - 200.0 / 300.0).abs() < 1e-9, "{fit:?}");
    assert!((fit.recall - 200.0 / 220.0).abs() < 1e-9, "{fit:?}");
    let (_, timeline) = fixture.server.timeline(report.id).expect("it is remembered");
    assert_eq!(timeline.events.len(), 220, "a fault a page");
    assert_eq!(timeline.events.iter().filter(|event| event.planned).count(), 200);
}

#[test]
fn a_set_of_which_nothing_is_installed_is_an_error() {
    let fixture = learning_fixture(1000);
    let set = fixture.published_pages(100..300);
    for entry in std::fs::read_dir(fixture.directory.path().join("store/ws")).expect("sets") {
        let sets = std::fs::read_dir(entry.expect("entry").path()).expect("sets");
        sets.for_each(|set| std::fs::write(set.expect("entry").path(), "").expect("emptied"));
    }
    let (socket, seen) = fixture.watched(move |done| Mode::Learn(set.clone(), done));
    let mut vm = whole(1000);
    vm.connect(&socket).expect("connects");
    vm.check(&vm.pages()[100..140]).expect("every byte");
    let late = pages_of(&seen);
    assert!(late.len() >= 20 && late.iter().all(|page| (100..140).contains(page)), "{late:?}");
    let report = fixture.wait_for(|report| report.settled);
    assert!(report.inert && report.prefetched_pages == 0, "{report:?}");
}

/// A disk is read through the mount: the store tells whoever records.
#[test]
fn reads_of_a_disk_are_on_the_same_timeline_and_are_kept_in_memory_ahead() {
    let fixture = learning_fixture(600);
    let disk: Vec<u8> = (0..400 * PAGE_SIZE).map(|at| (at / 7 % 253) as u8).collect();
    let snapshot = fixture.with_disk(&disk);
    let (sender, seen) = mpsc::channel();
    let socket = fixture.socket();
    let bound = fixture.server.bind(&socket, snapshot.clone(), move || {
        let sender = sender.clone();
        Mode::Record(Box::new(move |touches| sender.send(touches).expect("receiver")))
    });
    bound.expect("binds");
    let mut vm = whole(600);
    vm.connect(&socket).expect("connects");
    fixture.wait_for(|_| true);
    vm.check(&vm.pages()[0..20]).expect("every byte");
    snapshot.note_read(1, 40..42);
    snapshot.note_read(0, 500..510);
    vm.check(&vm.pages()[50..60]).expect("every byte");
    let touches: Vec<Touch> = seen.recv_timeout(Duration::from_secs(10)).expect("it settles");
    let order: Vec<u32> = touches.iter().map(|touch| touch.file).collect();
    let disk_pages: Vec<u64> =
        touches.iter().filter(|touch| touch.file == 1).map(|touch| touch.page).collect();
    assert_eq!(disk_pages, (32..48).collect::<Vec<_>>(), "the frame, whole");
    let first = order.iter().position(|file| *file == 1);
    assert_eq!((first, order.len()), (Some(20), 46), "between the faults, and no read of memory");

    // A node that has nothing in memory.
    let content = WorkingSetContent::of_recording(&touches);
    fixture
        .node
        .block_on(fixture.node.publish_working_set(&snapshot, &content))
        .expect("published");
    let url = format!("file://{}/store", fixture.directory.path().display());
    let node = Node::start(&NodeConfig::reader(&url)).expect("node");
    let again = node.block_on(node.open_id(snapshot.id())).expect("opens");
    let set = node.block_on(node.working_set(&again)).expect("lists").expect("is there");
    fixture.server.unbind(&socket);
    let chosen = set.clone();
    let bound = fixture.server.bind(&socket, again.clone(), move || Mode::Prefetch(chosen.clone()));
    bound.expect("binds");
    let frames = again.frames_of(1, 40..42);
    assert!(frames.iter().all(|frame| again.cached(*frame).is_none()));
    let mut second = whole(600);
    second.connect(&socket).expect("connects");
    let began = Instant::now();
    while frames.iter().any(|frame| again.cached(*frame).is_none()) {
        assert!(began.elapsed() < Duration::from_secs(10), "the disk's frame never came");
        std::thread::sleep(Duration::from_millis(2));
    }
    let frame = again.cached(frames[0]).expect("is there");
    assert_eq!(frame.pages(8, 1), &disk[40 * PAGE_SIZE..41 * PAGE_SIZE]);
    drop(second);
    fixture.server.stop(Duration::from_secs(30));
}
