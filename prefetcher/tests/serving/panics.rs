//! A panic is our bug: it ends the VM that it hits, with the reason, and nobody else notices.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reap_prefetcher::{Cause, End, Mode, ServerConfig};

use crate::child::VmmProcess;
use crate::{Fixture, whole};

#[test]
fn a_panic_on_the_accept_thread_refuses_one_vm() {
    let fixture = Fixture::new(100);
    let asked = AtomicU64::new(0);
    let socket = fixture.bind(move || {
        assert!(asked.fetch_add(1, Ordering::Relaxed) > 0, "on purpose");
        Mode::Demand
    });
    let mut refused = whole(100);
    refused.connect(&socket).expect("connects");
    // Not before the thread goes on: what is in progress when it panics ends with it.
    let began = std::time::Instant::now();
    loop {
        let mut vm = whole(100);
        vm.connect(&socket).expect("connects");
        std::thread::sleep(Duration::from_millis(50));
        if !fixture.server.restores().is_empty() {
            vm.check(&vm.pages()).expect("every byte");
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "nobody is served any more");
    }
}

#[test]
fn a_panic_while_a_vm_is_served_ends_that_vm() {
    let config = ServerConfig { settle: Duration::from_millis(100), ..ServerConfig::default() };
    let fixture = Fixture::with_config(1000, config);
    let asked = AtomicU64::new(0);
    fixture.bind(move || match asked.fetch_add(1, Ordering::Relaxed) {
        0 => Mode::Record(Box::new(|_| panic!("on purpose"))),
        _ => Mode::Demand,
    });
    let mut hit = VmmProcess::start(&fixture);
    // The recording settles on the fault thread.
    assert_eq!(hit.check(0, 10).as_deref(), Some("right"));
    let mut other = VmmProcess::start(&fixture);
    assert_eq!(other.check(0, 500).as_deref(), Some("right"));
    assert!(hit.ends_within(Duration::from_secs(10)));
    let first = fixture.server.restores().remove(0);
    let Some(End::Killed { cause: Cause::Bug, reason }) = first.end else { panic!("{first:?}") };
    assert!(reason.contains("panicked"), "{reason}");
    assert_eq!(other.check(500, 1000).as_deref(), Some("right"));
}
