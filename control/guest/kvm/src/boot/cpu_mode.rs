//! The first CPU's mode, set from outside: no code has to switch it.

use kvm_bindings::{kvm_regs, kvm_segment};

use super::write;
use crate::KvmError;
use crate::machine::Blank;
use crate::vcpu::Vcpu;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit that is always set.
const RFLAGS: u64 = 2;

/// What the Linux boot protocol names its segments: code and data.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const GDT: u64 = 0x500;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORY: u64 = 0xb000;
const STACK: u64 = 0x8ff0;
const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;

/// A segment over all 4 GiB.
fn flat_segment(selector: u16, is_code: bool, is_long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        // Accessed, readable code or writable data.
        type_: if is_code { 0xb } else { 0x3 },
        present: 1,
        dpl: 0,
        db: u8::from(!is_long),
        s: 1,
        l: u8::from(is_long),
        g: 1,
        ..kvm_segment::default()
    }
}

/// The same as eight bytes of a table.
fn descriptor(segment: &kvm_segment) -> u64 {
    let flags = u64::from(segment.g) << 55 | u64::from(segment.db) << 54 | u64::from(segment.l) << 53;
    let kind = u64::from(segment.present) << 47 | u64::from(segment.s) << 44 | u64::from(segment.type_) << 40;
    flags | kind | 0xf << 48 | 0xffff
}

/// 32-bit protected mode without paging, at `entry`.
pub(super) fn enter_flat(vcpu: &Vcpu, entry: u64) -> Result<(), KvmError> {
    let mut sregs = vcpu.fd.get_sregs().map_err(KvmError::refused("read system registers"))?;
    sregs.cs = flat_segment(CODE, true, false);
    let data = flat_segment(DATA, false, false);
    (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.cr0 = CR0_PE | CR0_ET;
    vcpu.fd.set_sregs(&sregs).map_err(KvmError::refused("write system registers"))?;
    let regs = kvm_regs { rip: entry, rflags: RFLAGS, rsp: STACK, ..kvm_regs::default() };
    vcpu.fd.set_regs(&regs).map_err(KvmError::refused("write registers"))
}

/// 64-bit mode over an identity map of the first gigabyte, at `entry`, with `rsi` as the boot protocol wants it.
pub(super) fn enter_long(blank: &Blank, entry: u64, rsi: u64) -> Result<(), KvmError> {
    let what = "the boot page tables";
    write(blank, PML4, &(PDPT | PRESENT_WRITABLE).to_le_bytes(), what)?;
    write(blank, PDPT, &(PAGE_DIRECTORY | PRESENT_WRITABLE).to_le_bytes(), what)?;
    let entries: Vec<u8> =
        (0..512_u64).flat_map(|n| (n << 21 | LARGE | PRESENT_WRITABLE).to_le_bytes()).collect();
    write(blank, PAGE_DIRECTORY, &entries, what)?;
    let (code, data) = (flat_segment(CODE, true, true), flat_segment(DATA, false, false));
    let table = [0, 0, descriptor(&code), descriptor(&data)].map(u64::to_le_bytes).concat();
    write(blank, GDT, &table, "the boot descriptors")?;
    let vcpu = &blank.vcpus[0];
    let mut sregs = vcpu.fd.get_sregs().map_err(KvmError::refused("read system registers"))?;
    (sregs.cs, sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (code, data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 31);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr3 = PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.cr0 |= CR0_PE | CR0_PG | CR0_ET;
    sregs.efer |= EFER_LME | EFER_LMA;
    vcpu.fd.set_sregs(&sregs).map_err(KvmError::refused("write system registers"))?;
    let regs = kvm_regs { rip: entry, rsi, rflags: RFLAGS, rsp: STACK, rbp: STACK, ..kvm_regs::default() };
    vcpu.fd.set_regs(&regs).map_err(KvmError::refused("write registers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_that_kernels_boot_with() {
        assert_eq!(descriptor(&flat_segment(CODE, true, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&flat_segment(DATA, false, false)), 0x00cf_9300_0000_ffff);
    }
}
