//! A real vCPU whose memory is served: what the guest's own instructions read is what the snapshot holds.

use reap_prefetcher::Mode;
use reap_store::PAGE_SIZE;
use reap_vmm::{PretendVm, Vcpu, has_kvm, true_page};

use crate::{Fixture, whole};

fn words(page: u64) -> (u32, u32) {
    let bytes = true_page(page);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    (word(0), word(PAGE_SIZE - 4))
}

fn check(vcpu: &mut Vcpu, first: u64, end: u64) {
    let read = vcpu.read_pages(first, end).expect("the guest runs");
    let expected: Vec<_> = (first..end).map(words).collect();
    assert!(read == expected, "pages {first} to {end}");
}

/// `run.sh` says so where there is none.
fn no_kvm() -> bool {
    if !has_kvm() {
        eprintln!("there is no /dev/kvm: no vCPU was run");
    }
    !has_kvm()
}

#[test]
fn a_vcpu_reads_the_snapshot_on_demand_and_zeros_after_a_removal() {
    if no_kvm() {
        return;
    }
    let fixture = Fixture::new(600);
    let socket = fixture.bind(|| Mode::Demand);
    let mut vm = whole(600);
    vm.connect(&socket).expect("connects");
    let mut vcpu = Vcpu::new(&vm).expect("a vCPU");
    check(&mut vcpu, 0, 300);
    vm.remove(vm.pages()[101].0, 3);
    assert_eq!(vcpu.read_pages(101, 104).expect("runs"), vec![(0, 0); 3], "old bytes came back");
    check(&mut vcpu, 104, 600);
    assert!(fixture.wait_for(|report| report.faults_removed.count >= 3).end.is_none());
}

#[test]
fn a_vcpu_runs_over_regions_with_a_hole_while_a_prefetch_is_under_way() {
    if no_kvm() {
        return;
    }
    let (_fixture, socket) = Fixture::prefetched(1000);
    let size = PAGE_SIZE as u64;
    let mut vm = PretendVm::map(&[(600 * size, 400), (0, 500)], size).expect("maps");
    vm.connect(&socket).expect("connects");
    let mut vcpu = Vcpu::new(&vm).expect("a vCPU");
    check(&mut vcpu, 600, 1000);
    check(&mut vcpu, 0, 500);
}
