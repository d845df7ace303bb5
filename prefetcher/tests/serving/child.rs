//! VMMs in processes of their own: what ends, and what is ended.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reap_prefetcher::{Cause, End, Mode, ServerConfig};
use reap_vmm::PretendVm;

use crate::{Fixture, whole};

const SOCKET: &str = "REAP_TEST_PRETEND_VMM";
/// Somebody else connects for it.
const THROUGH_ANOTHER: &str = "REAP_TEST_THROUGH_ANOTHER";
const MESSAGE: &str = "REAP_TEST_MESSAGE";
const PAGES: u64 = 1000;

/// Not a test of its own: the body of the child process.
#[test]
fn pretend_vmm_process() {
    let Ok(socket) = std::env::var(SOCKET) else { return };
    let mut vm = whole(PAGES);
    match std::env::var(THROUGH_ANOTHER) {
        Ok(_) => connect_through_another(&vm),
        Err(_) => vm.connect(std::path::Path::new(&socket)).expect("connects"),
    }
    let pages = vm.pages();
    for line in std::io::stdin().lines() {
        let line = line.expect("a line");
        let (from, to) = line.split_once(' ').expect("a range");
        let range = from.parse().expect("from")..to.parse().expect("to");
        let answer = match vm.check(&pages[range]) {
            Ok(()) => "right".to_owned(),
            Err(why) => why,
        };
        println!("\nANSWER {answer}");
    }
}

/// Has another process shake hands, which ends then.
fn connect_through_another(vm: &PretendVm) {
    let went = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", "child::handshake_for_another"])
        .env(MESSAGE, vm.message())
        .stdin(vm.uffd().try_clone_to_owned().expect("a duplicate"))
        .stdout(Stdio::null())
        .status();
    assert!(went.expect("runs").success());
}

/// Not a test of its own: the body of that process. The userfaultfd is its standard input.
#[test]
fn handshake_for_another() {
    let Ok(message) = std::env::var(MESSAGE) else { return };
    let path = std::env::var(SOCKET).expect("a socket");
    let socket = std::os::unix::net::UnixStream::connect(path).expect("connects");
    reap_vmm::send(&socket, message.as_bytes(), &[std::io::stdin().as_fd()]).expect("sends");
}

pub struct VmmProcess(Child);

impl VmmProcess {
    pub fn start(fixture: &Fixture) -> Self {
        Self::start_with(fixture, &[])
    }

    fn start_with(fixture: &Fixture, variables: &[(&str, &str)]) -> Self {
        let child = Command::new(std::env::current_exe().expect("this binary"))
            .args(["--exact", "child::pretend_vmm_process", "--nocapture"])
            .env(SOCKET, fixture.socket())
            .envs(variables.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        Self(child)
    }

    /// Asks for a check of pages; `None` if the process ends instead.
    pub fn check(&mut self, from: u64, to: u64) -> Option<String> {
        writeln!(self.0.stdin.as_mut()?, "{from} {to}").ok()?;
        let lines = BufReader::new(self.0.stdout.as_mut()?).lines();
        lines.map_while(Result::ok).find_map(|line| line.strip_prefix("ANSWER ").map(str::to_owned))
    }

    pub fn ends_within(&mut self, limit: Duration) -> bool {
        let began = Instant::now();
        while began.elapsed() < limit {
            if self.0.try_wait().expect("waits").is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for VmmProcess {
    fn drop(&mut self) {
        self.0.kill().unwrap_or_default();
        self.0.wait().expect("waits");
    }
}

#[test]
fn a_vmm_that_dies_ends_its_restore_and_its_recording() {
    let fixture = Fixture::new(PAGES);
    let (sender, receiver) = std::sync::mpsc::channel();
    fixture.bind(move || {
        let sender = sender.clone();
        Mode::Record(Box::new(move |touches| sender.send(touches.len()).expect("receiver")))
    });
    let mut vmm = VmmProcess::start(&fixture);
    assert_eq!(vmm.check(0, 200).as_deref(), Some("right"));
    drop(vmm);
    let report = fixture.wait_for(|report| report.end.is_some());
    assert_eq!(report.end, Some(End::VmmEnded));
    assert_eq!(receiver.recv_timeout(Duration::from_secs(5)), Ok(200));
}

/// As after a VMM that is killed while a prefetch has its memory in hands: the memory may go later than the
/// process, and nothing says when.
#[test]
fn memory_that_outlives_its_process_is_served_until_it_goes() {
    let fixture = Fixture::new(PAGES);
    fixture.bind(|| Mode::Demand);
    let mut vmm = VmmProcess::start_with(&fixture, &[(THROUGH_ANOTHER, "yes")]);
    assert_eq!(vmm.check(0, PAGES).as_deref(), Some("right"));
    let report = fixture.wait_for(|_| true);
    assert!(report.end.is_none() && report.pid != vmm.0.id() as i32, "{report:?}");
    drop(vmm);
    assert_eq!(fixture.wait_for(|report| report.end.is_some()).end, Some(End::VmmEnded));
}

#[test]
fn a_page_that_cannot_be_had_ends_the_vmm_with_the_reason() {
    let fixture = Fixture::new(PAGES);
    fixture.bind(|| Mode::Demand);
    let mut vmm = VmmProcess::start(&fixture);
    assert_eq!(vmm.check(0, 100).as_deref(), Some("right"));
    fixture.ruin_the_store();
    assert_eq!(vmm.check(500, 1000), None, "it neither hangs nor reads anything");
    assert!(vmm.ends_within(Duration::from_secs(5)));
    let report = fixture.wait_for(|report| report.end.is_some());
    let Some(End::Killed { cause: Cause::Unservable, reason }) = report.end else {
        panic!("{report:?}")
    };
    assert!(reason.contains("does not match") || reason.contains("decompress"), "{reason}");
}

#[test]
fn a_stop_that_cannot_hand_over_ends_the_vmm() {
    let fixture = Fixture::new(PAGES);
    fixture.bind(|| Mode::Demand);
    let mut vmm = VmmProcess::start(&fixture);
    assert_eq!(vmm.check(0, 100).as_deref(), Some("right"));
    fixture.ruin_the_store();
    assert_eq!(fixture.server.stop(Duration::from_secs(5)), (0, 1));
    assert!(vmm.ends_within(Duration::from_secs(2)));
}

#[test]
fn a_vmm_goes_on_after_a_stop() {
    let fixture = Fixture::with_config(PAGES, ServerConfig::default());
    fixture.bind(|| Mode::Demand);
    let mut vmm = VmmProcess::start(&fixture);
    assert_eq!(vmm.check(0, 100).as_deref(), Some("right"));
    assert_eq!(fixture.server.stop(Duration::from_secs(20)), (1, 0));
    drop(fixture);
    assert_eq!(vmm.check(0, PAGES).as_deref(), Some("right"));
}

/// A VM that ends frees descriptor numbers, and the next one gets them: its faults are its own.
#[test]
fn a_descriptor_number_that_is_used_again_serves_its_new_vm() {
    let fixture = Fixture::new(PAGES);
    fixture.bind(|| Mode::Demand);
    for round in 0..20 {
        let mut vmm = VmmProcess::start(&fixture);
        let from = round * 40;
        assert_eq!(vmm.check(from, from + 100).as_deref(), Some("right"), "round {round}");
    }
    assert_eq!(fixture.server.restores().len(), 20);
}
