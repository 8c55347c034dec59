//! One CPU's registers, in the orders that KVM needs.
//!
//! Read: MP state first, because reading it lets pending INITs and SIPIs arrive. Written: CPUID before all (it decides
//! which bits are legal), the local APIC before the MSRs, the time stamp counter before its deadline, events last.

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_sregs};
use kvm_ioctls::Kvm;

use super::{VcpuState, xsave};
use crate::KvmError;
use crate::clock::MSR_TSC;
use crate::vcpu::Vcpu;

/// Armed only once the counter that it is compared with is right.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// MSRs that one call reads or writes.
const MSRS_PER_CALL: usize = 128;

pub(super) fn save(kvm: &Kvm, vcpu: &Vcpu) -> Result<VcpuState, KvmError> {
    let read = |what: &str| KvmError::refused(format!("read the {what} of virtual CPU {}", vcpu.number));
    let fd = &vcpu.fd;
    let mp_state = fd.get_mp_state().map_err(read("MP state"))?;
    Ok(VcpuState {
        mp_state,
        regs: fd.get_regs().map_err(read("registers"))?,
        sregs: fd.get_sregs().map_err(read("system registers"))?,
        xsave: xsave::save(kvm, fd)?,
        xcrs: fd.get_xcrs().map_err(read("XCRs"))?,
        debugregs: fd.get_debug_regs().map_err(read("debug registers"))?,
        lapic: fd.get_lapic().map_err(read("local APIC"))?,
        msrs: save_msrs(kvm, vcpu)?,
        events: fd.get_vcpu_events().map_err(read("pending events"))?,
        tsc: 0,
    })
}

pub(super) fn load(kvm: &Kvm, vcpu: &Vcpu, saved: &VcpuState) -> Result<(), KvmError> {
    let write = |what: &str| KvmError::refused(format!("write the {what} of virtual CPU {}", vcpu.number));
    let fd = &vcpu.fd;
    fd.set_mp_state(saved.mp_state).map_err(write("MP state"))?;
    fd.set_regs(&saved.regs).map_err(write("registers"))?;
    fd.set_sregs(&saved.sregs).map_err(write(&system_registers(&saved.sregs)))?;
    xsave::load(kvm, fd, &saved.xsave)?;
    fd.set_xcrs(&saved.xcrs).map_err(write("XCRs"))?;
    fd.set_debug_regs(&saved.debugregs).map_err(write("debug registers"))?;
    fd.set_lapic(&saved.lapic).map_err(write("local APIC"))?;
    let known = known_msrs(kvm)?;
    let now = saved.msrs.iter().filter(|msr| !is_late(msr.index));
    load_msrs(vcpu, now.copied(), &known)
}

/// KVM refuses these as a whole: which of them it meant is for a person to see.
fn system_registers(sregs: &kvm_sregs) -> String {
    let kvm_sregs { cr0, cr3, cr4, efer, apic_base, cs, .. } = sregs;
    format!(
        "system registers (cr0 {cr0:#x}, cr3 {cr3:#x}, cr4 {cr4:#x}, efer {efer:#x}, apic base {apic_base:#x}, \
         64-bit code {})",
        cs.l
    )
}

/// What waits for the clock: the deadline of the timer, then the pending events.
pub(super) fn load_after_clock(vcpu: &Vcpu, saved: &VcpuState) -> Result<(), KvmError> {
    let late = saved.msrs.iter().filter(|msr| msr.index == MSR_TSC_DEADLINE);
    load_msrs(vcpu, late.copied(), &[MSR_TSC_DEADLINE])?;
    let what = format!("write the pending events of virtual CPU {}", vcpu.number);
    vcpu.fd.set_vcpu_events(&saved.events).map_err(KvmError::refused(what))?;
    // Tells a guest that it stood still, so its watchdog says nothing. One that uses no KVM clock cannot be told.
    let _ = vcpu.fd.kvmclock_ctrl();
    Ok(())
}

fn is_late(msr: u32) -> bool {
    msr == MSR_TSC || msr == MSR_TSC_DEADLINE
}

fn known_msrs(kvm: &Kvm) -> Result<Vec<u32>, KvmError> {
    let list = kvm.get_msr_index_list().map_err(KvmError::refused("list its MSRs"))?;
    Ok(list.as_slice().to_vec())
}

fn entries(list: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(list).map_err(|_| KvmError::state("more MSRs than KVM takes at once"))
}

/// Every MSR that KVM names and gives; one that it names and does not give is no part of this CPU.
fn save_msrs(kvm: &Kvm, vcpu: &Vcpu) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let wanted = known_msrs(kvm)?.into_iter().filter(|msr| *msr != MSR_TSC);
    let wanted: Vec<_> = wanted.map(|index| kvm_msr_entry { index, ..kvm_msr_entry::default() }).collect();
    let (mut rest, mut saved) = (wanted.as_slice(), Vec::with_capacity(wanted.len()));
    while !rest.is_empty() {
        let some = &rest[..rest.len().min(MSRS_PER_CALL)];
        let mut list = entries(some)?;
        let read = vcpu.fd.get_msrs(&mut list).map_err(KvmError::refused("read MSRs"))?;
        saved.extend_from_slice(&list.as_slice()[..read]);
        // The call ends at the first that it cannot read.
        rest = &rest[(read + usize::from(read < some.len()))..];
    }
    Ok(saved)
}

fn load_msrs(vcpu: &Vcpu, msrs: impl Iterator<Item = kvm_msr_entry>, known: &[u32]) -> Result<(), KvmError> {
    // One that holds nothing is the same as one that is not there.
    let msrs: Vec<_> = msrs.filter(|msr| msr.data != 0 || known.contains(&msr.index)).collect();
    let unknown = |msr: &&kvm_msr_entry| !known.contains(&msr.index);
    if let Some(msr) = msrs.iter().find(unknown) {
        return Err(lacks(msr));
    }
    let mut rest = msrs.as_slice();
    while let Some(first) = rest.first() {
        let some = &rest[..rest.len().min(MSRS_PER_CALL)];
        let written = vcpu.fd.set_msrs(&entries(some)?).map_err(KvmError::refused("write MSRs"))?;
        if written < some.len() {
            let refused = some.get(written).unwrap_or(first);
            if refused.data != 0 {
                return Err(lacks(refused));
            }
        }
        rest = &rest[(written + usize::from(written < some.len()))..];
    }
    Ok(())
}

fn lacks(msr: &kvm_msr_entry) -> KvmError {
    KvmError::state(format!(
        "the guest's MSR {:#x} holds {:#x}, which this host's CPU does not take: choose a target with the same CPU and kernel",
        msr.index, msr.data
    ))
}
