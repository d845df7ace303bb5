//! A real vCPU over the memory of a pretend VM: a few instructions of guest code read pages and say what
//! they hold on a port.

#![expect(unsafe_code, reason = "gives the guest memory of this process")]

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::content::PAGE_BYTES;
use crate::memory::PretendVm;

/// Where the guest's code lies, above all memory that it reads.
const CODE: u64 = 0x4000_0000;
/// 32 bits, flat: from page ESI to before EDI, the first and the last word of each go to port 0x10.
const READ_PAGES: &[u8] = &[
    0x66, 0xba, 0x10, 0x00, // mov dx, 0x10
    0x8b, 0x06, // again: mov eax, [esi]
    0xef, // out dx, eax
    0x8b, 0x86, 0xfc, 0x0f, 0x00, 0x00, // mov eax, [esi + 4092]
    0xef, // out dx, eax
    0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // add esi, 4096
    0x39, 0xfe, // cmp esi, edi
    0x72, 0xec, // jb again
    0xf4, // hlt
];

/// Whether this machine has KVM.
pub fn has_kvm() -> bool {
    Path::new("/dev/kvm").exists()
}

/// One vCPU.
pub struct Vcpu {
    vcpu: VcpuFd,
    _vm: VmFd,
    code: PretendVm,
}

impl Vcpu {
    /// A guest whose physical memory is that of `memory`, by offset in the memory file.
    pub fn new(memory: &PretendVm) -> Result<Self> {
        let kvm = Kvm::new().context("/dev/kvm")?;
        let vm = kvm.create_vm()?;
        let code = PretendVm::unserved(1)?;
        let of_code = [(code.regions()[0].0, PAGE_BYTES as u64, CODE)];
        for (slot, (address, bytes, physical)) in
            memory.regions().iter().chain(&of_code).enumerate()
        {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                guest_phys_addr: *physical,
                memory_size: *bytes,
                userspace_addr: *address,
                flags: 0,
            };
            // SAFETY: the mappings live at least as long as the vCPU is used: `code` is its own, and
            // who runs it holds `memory`.
            unsafe { vm.set_user_memory_region(region) }?;
        }
        for (at, byte) in READ_PAGES.iter().enumerate() {
            code.write(code.regions()[0].0 + at as u64, *byte);
        }
        let vcpu = vm.create_vcpu(0)?;
        let mut system = vcpu.get_sregs()?;
        // Protected mode without paging: every segment is all of 4 GiB.
        system.cr0 |= 1;
        for (segment, kind) in
            [(&mut system.cs, 11), (&mut system.ds, 3), (&mut system.es, 3), (&mut system.ss, 3)]
        {
            (segment.base, segment.limit, segment.selector) = (0, u32::MAX, 8);
            (segment.type_, segment.present, segment.s) = (kind, 1, 1);
            (segment.db, segment.g, segment.dpl) = (1, 1, 0);
        }
        vcpu.set_sregs(&system)?;
        Ok(Self { vcpu, _vm: vm, code })
    }

    /// Lets the guest read the pages of physical memory from `first` to before `end`; answers with the first and the
    /// last word of each, as the guest read them.
    pub fn read_pages(&mut self, first: u64, end: u64) -> Result<Vec<(u32, u32)>> {
        ensure!(first < end && self.code.regions().len() == 1, "no pages to read");
        let mut registers = self.vcpu.get_regs()?;
        registers.rip = CODE;
        registers.rflags = 2;
        registers.rsi = first * PAGE_BYTES as u64;
        registers.rdi = end * PAGE_BYTES as u64;
        self.vcpu.set_regs(&registers)?;
        let mut words = Vec::new();
        loop {
            match self.vcpu.run()? {
                VcpuExit::IoOut(0x10, data) => {
                    words.push(u32::from_le_bytes(data.try_into().context("a word")?));
                }
                VcpuExit::Hlt => break,
                other => bail!("the guest ended with {other:?}"),
            }
        }
        Ok(words.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
    }
}
