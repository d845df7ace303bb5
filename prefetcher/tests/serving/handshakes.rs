//! Handshakes that break the rules: refused, nothing leaks, nobody else is disturbed.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use reap_prefetcher::{Mode, ServerError};

use crate::pretend::send;
use crate::{Fixture, whole};

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("descriptors").count()
}

/// The server closes without a word.
fn is_refused(mut socket: UnixStream) -> bool {
    socket.set_read_timeout(Some(Duration::from_secs(5))).expect("time-out");
    match socket.read(&mut [0; 1]) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    }
}

#[test]
fn broken_handshakes_are_refused_and_leak_nothing() {
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
