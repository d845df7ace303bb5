//! Memory that the VMM splits into several mappings: the kernel fills one mapping at a time.

use std::time::Duration;

use reap_prefetcher::End;
use reap_vmm::{PretendVm, true_page};

use crate::{Fixture, whole};

/// Borders in the middle of runs that are installed at once.
fn split(vm: &PretendVm) {
    for page in [5u64, 100, 333, 777, 1490] {
        vm.split(vm.pages()[page as usize].0, 7);
    }
}

#[test]
fn a_prefetch_reaches_every_page_of_split_memory() {
    let (fixture, socket) = Fixture::prefetched(1500);
    let mut vm = whole(1500);
    split(&vm);
    vm.connect(&socket).expect("connects");
    let report = fixture.wait_for(|report| {
        report.prefetched_pages == report.planned_pages
            && report.prefetched_zero_pages == report.planned_zero_pages
    });
    assert_eq!(report.planned_pages + report.planned_zero_pages, 1500);
    vm.check(&vm.pages()).expect("every byte");
}

/// A page that counts as installed and is not would be zeros after the hand-over.
#[test]
fn split_memory_is_handed_over_whole() {
    let (fixture, socket) = Fixture::prefetched(1500);
    let mut vm = whole(1500);
    split(&vm);
    vm.connect(&socket).expect("connects");
    fixture.wait_for(|report| report.prefetched_pages > 0);
    assert_eq!(fixture.server.stop(Duration::from_secs(20)), (1, 0));
    assert_eq!(fixture.server.restores()[0].end, Some(End::HandedOver));
    for (address, page) in vm.pages() {
        assert!(vm.read(address) == true_page(page), "page {page}");
    }
}
