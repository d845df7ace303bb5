//! Pages that the guest gives back: zeros from then on, whatever is under way.

use std::sync::atomic::{AtomicBool, Ordering};

use reap_prefetcher::Mode;
use reap_store::PAGE_SIZE;
use reap_vmm::true_page;

use crate::{Fixture, whole};

#[test]
fn a_removed_page_is_zeros_for_ever() {
    let fixture = Fixture::new(500);
    let socket = fixture.bind(|| Mode::Demand);
    let mut vm = whole(500);
    vm.connect(&socket).expect("connects");
    let pages = vm.pages();
    vm.check(&pages).expect("every byte");
    vm.remove(pages[101].0, 3);
    for round in 0..3u8 {
        for (address, _) in &pages[101..104] {
            assert!(vm.read(*address).iter().all(|byte| *byte == 0), "round {round}");
            vm.write(*address, 7);
        }
        vm.remove(pages[101].0, 3);
    }
    vm.check(&pages[..101]).expect("the others are as they were");
    vm.check(&pages[104..]).expect("the others are as they were");
    // The guest goes on as soon as an event is read; it is counted a moment later.
    let report =
        fixture.wait_for(|report| report.faults_removed.count >= 9 && report.removed_pages >= 12);
    assert_eq!(report.removed_pages, 12);
    assert!(report.end.is_none());
}

/// A page that is removed while a prefetch runs over it must not come back with its old bytes.
#[test]
fn a_prefetch_does_not_bring_back_what_was_removed() {
    let (_fixture, socket) = Fixture::prefetched(4000);
    for round in 0..20 {
        let mut vm = whole(4000);
        vm.connect(&socket).expect("connects");
        let pages = vm.pages();
        // From the end, towards the prefetch; every other page, so that runs break.
        for (address, _) in pages.iter().rev().step_by(2) {
            vm.remove(*address, 1);
        }
        for (number, (address, page)) in pages.iter().rev().enumerate() {
            let read = vm.read(*address);
            if number % 2 == 0 {
                assert!(read.iter().all(|byte| *byte == 0), "round {round}: page {page} came back");
            } else {
                assert!(read == true_page(*page), "round {round}: page {page}");
            }
        }
    }
}

/// A guest that gives pages back and takes them again without end, against faults of its own
/// other threads: nobody hangs, nobody reads old bytes.
#[test]
fn a_flood_of_removals_leaves_faults_right() {
    let fixture = Fixture::new(2000);
    let socket = fixture.bind(|| Mode::Demand);
    let mut vm = whole(2000);
    vm.connect(&socket).expect("connects");
    let pages = vm.pages();
    let (flooded, steady) = pages.split_at(64);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for part in flooded.chunks(32) {
            let (vm, done) = (&vm, &done);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    vm.remove(part[0].0, part.len() as u64);
                    for (address, page) in part {
                        let read = vm.read(*address);
                        assert!(read.iter().all(|byte| *byte == 0), "page {page}");
                    }
                }
            });
        }
        let halves: Vec<_> = steady
            .chunks(steady.len() / 2)
            .map(|half| {
                let vm = &vm;
                scope.spawn(move || vm.check(half).expect("every byte"))
            })
            .collect();
        for half in halves {
            half.join().expect("steady");
        }
        std::thread::sleep(std::time::Duration::from_millis(300));
        done.store(true, Ordering::Relaxed);
    });
    let report = fixture.wait_for(|_| true);
    assert!(report.removed_pages > 1000, "the flood happened: {report:?}");
    assert!(report.end.is_none(), "{report:?}");
    assert_eq!(PAGE_SIZE, 4096);
}
