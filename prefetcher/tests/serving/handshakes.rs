//! Handshakes that break the rules: refused, nothing leaks, nobody else is disturbed.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use reap_prefetcher::{Mode, ServerError};
use reap_vmm::{is_refused, send};

use crate::{Fixture, whole};

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("descriptors").count()
}

/// Runs a test of this file in a process of its own, where nobody else opens descriptors; whether this is it.
fn alone(test: &str) -> bool {
    const ALONE: &str = "REAP_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let status = std::process::Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", &format!("handshakes::{test}"), "--nocapture"])
        .env(ALONE, "1")
        .status()
        .expect("starts");
    assert!(status.success(), "{test}: {status}");
    false
}

#[test]
fn broken_handshakes_are_refused_and_leak_nothing() {
    if !alone("broken_handshakes_are_refused_and_leak_nothing") {
        return;
    }
    let fixture = Fixture::new(1000);
    let socket = fixture.bind(|| Mode::Demand);
    let mut good = whole(1000);
    good.connect(&socket).expect("connects");
    let pages = good.pages();
    good.check(&pages[..500]).expect("every byte");
    let other = whole(1000);
    let message = other.message();
    let file = std::fs::File::open("/dev/null").expect("a file");
    let before = open_descriptors();
    let far = message.replace("\"offset\":0", "\"offset\":4096");
    for _ in 0..100 {
        let broken: [(&[u8], Vec<std::os::fd::BorrowedFd<'_>>); 6] = [
            (b"{}", vec![other.uffd()]),
            (b"[]", vec![other.uffd()]),
            (b"not JSON", vec![]),
            (message.as_bytes(), vec![file.as_fd()]),
            (message.as_bytes(), vec![other.uffd(), other.uffd()]),
            (far.as_bytes(), vec![other.uffd()]),
        ];
        for (bytes, fds) in broken {
            let stream = UnixStream::connect(&socket).expect("connects");
            send(&stream, bytes, &fds).expect("sends");
            assert!(is_refused(stream), "{}", String::from_utf8_lossy(bytes));
        }
    }
    assert_eq!(fixture.server.restores().len(), 1);
    assert!(open_descriptors() <= before + 2, "{} then, {} now", before, open_descriptors());
    good.check(&pages).expect("the other VM is not disturbed");
}

#[test]
fn a_message_in_pieces_with_a_late_descriptor_is_accepted() {
    let fixture = Fixture::new(1000);
    let socket = fixture.bind(|| Mode::Demand);
    let vm = whole(1000);
    let message = vm.message();
    let stream = UnixStream::connect(&socket).expect("connects");
    for piece in message.as_bytes().chunks(20) {
        send(&stream, piece, &[]).expect("sends");
        std::thread::sleep(Duration::from_millis(5));
    }
    send(&stream, b" ", &[vm.uffd()]).expect("sends");
    vm.check(&vm.pages()).expect("every byte");
    drop(stream);
    // VMMs before Firecracker 1.12 close the socket after the handshake.
    assert!(fixture.wait_for(|_| true).end.is_none());
}

#[test]
fn a_stalled_handshake_stalls_nobody_and_ends() {
    let fixture = Fixture::new(1000);
    let socket = fixture.bind(|| Mode::Demand);
    let stalled = UnixStream::connect(&socket).expect("connects");
    send(&stalled, b"[{", &[]).expect("sends");
    let mut vm = whole(1000);
    vm.connect(&socket).expect("connects");
    vm.check(&vm.pages()).expect("every byte");
    assert!(is_refused(stalled), "after two seconds");
}

#[test]
fn only_our_own_stale_socket_is_replaced() {
    let fixture = Fixture::new(10);
    let path = fixture.bind(|| Mode::Demand);
    let again = fixture.server.bind(&path, fixture.snapshot.clone(), || Mode::Demand);
    assert!(matches!(again, Err(ServerError::InUse(_))));
    fixture.server.unbind(&path);
    assert!(!path.exists());
    drop(std::os::unix::net::UnixListener::bind(&path).expect("a listener that goes"));
    assert!(path.exists(), "a stale socket");
    fixture.server.bind(&path, fixture.snapshot.clone(), || Mode::Demand).expect("replaced");
    let file = fixture.directory.path().join("file");
    std::fs::write(&file, "x").expect("file");
    let refused = fixture.server.bind(&file, fixture.snapshot.clone(), || Mode::Demand);
    assert!(matches!(refused, Err(ServerError::NotASocket(_))));
    let long = fixture.directory.path().join("x".repeat(120));
    let refused = fixture.server.bind(&long, fixture.snapshot.clone(), || Mode::Demand);
    assert!(matches!(refused, Err(ServerError::TooLong(_))));
}

/// Who stalls must not keep others out: the oldest handshake gives way.
#[test]
fn more_stalled_handshakes_than_there_is_room_for_keep_nobody_out() {
    let fixture = Fixture::new(1000);
    let socket = fixture.bind(|| Mode::Demand);
    let stalled: Vec<_> = (0..400)
        .map(|_| {
            let stream = UnixStream::connect(&socket).expect("connects");
            send(&stream, b"[{", &[]).expect("sends");
            stream
        })
        .collect();
    let mut vm = whole(1000);
    vm.connect(&socket).expect("connects");
    vm.check(&vm.pages()).expect("every byte");
    assert!(stalled.into_iter().all(is_refused));
}

/// One byte at a time, and gone in the middle: at every length of the message.
#[test]
fn a_peer_that_vanishes_anywhere_leaves_nothing() {
    if !alone("a_peer_that_vanishes_anywhere_leaves_nothing") {
        return;
    }
    let fixture = Fixture::new(100);
    let socket = fixture.bind(|| Mode::Demand);
    let vm = whole(100);
    let message = vm.message();
    let before = open_descriptors();
    for length in 0..message.len() {
        let stream = UnixStream::connect(&socket).expect("connects");
        for (number, byte) in message.as_bytes()[..length].iter().enumerate() {
            let fds = [vm.uffd()];
            send(&stream, &[*byte], if number == 0 { &fds } else { &[] }).expect("sends");
        }
        drop(stream);
    }
    let mut good = whole(100);
    good.connect(&socket).expect("connects");
    good.check(&good.pages()).expect("every byte");
    assert_eq!(fixture.server.restores().len(), 1);
    // Some of the last are on their way to being closed.
    let began = std::time::Instant::now();
    while open_descriptors() > before + 6 {
        assert!(began.elapsed().as_secs() < 10, "{before} then, {} now", open_descriptors());
        std::thread::sleep(Duration::from_millis(5));
    }
}
