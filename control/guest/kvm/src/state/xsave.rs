//! The XSAVE area, whose size only the kernel knows.
#![expect(
    unsafe_code,
    reason = "KVM reads and writes as many bytes as its XSAVE area has, wherever it is told to"
)]

use kvm_bindings::Xsave;
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use zerocopy::{FromBytes, IntoBytes};

use crate::KvmError;

/// What every kernel has; larger areas go on behind it.
const FIXED_BYTES: usize = 4096;

/// The size of this host's area.
fn area_bytes(kvm: &Kvm) -> usize {
    usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(FIXED_BYTES).next_multiple_of(4)
}

fn empty_area(kvm: &Kvm) -> Result<Xsave, KvmError> {
    let extra = (area_bytes(kvm) - FIXED_BYTES) / 4;
    Xsave::new(extra).map_err(|_| KvmError::state("the XSAVE area is larger than this vmferry can hold"))
}

pub(super) fn save(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u8>, KvmError> {
    let mut area = empty_area(kvm)?;
    if area_bytes(kvm) == FIXED_BYTES {
        let fixed = vcpu.get_xsave().map_err(KvmError::refused("read a virtual CPU's XSAVE area"))?;
        return Ok(fixed.region.as_bytes().to_vec());
    }
    // SAFETY: the area was made as large as KVM says that it is.
    let answer = unsafe { vcpu.get_xsave2(&mut area) };
    answer.map_err(KvmError::refused("read a virtual CPU's XSAVE area"))?;
    let mut bytes = area.as_fam_struct_ref().xsave.region.as_bytes().to_vec();
    bytes.extend_from_slice(area.as_slice().as_bytes());
    Ok(bytes)
}

pub(super) fn load(kvm: &Kvm, vcpu: &VcpuFd, bytes: &[u8]) -> Result<(), KvmError> {
    let mut area = empty_area(kvm)?;
    let room = area_bytes(kvm);
    let fits = bytes.len() >= FIXED_BYTES && bytes.len().is_multiple_of(4) && bytes.len() <= room;
    if !fits {
        return Err(KvmError::state(format!(
            "the guest's XSAVE area has {} bytes and this host's CPU takes {FIXED_BYTES} to {room}: choose a target with the same CPU features",
            bytes.len()
        )));
    }
    let (fixed, extra) = bytes.split_at(FIXED_BYTES);
    let words = |bytes: &[u8]| {
        bytes.chunks_exact(4).map(|word| u32::read_from_bytes(word).unwrap_or(0)).collect::<Vec<_>>()
    };
    for (to, from) in area.as_mut_slice().iter_mut().zip(words(extra)) {
        *to = from;
    }
    // SAFETY: only the fixed part is written, not the length beside it.
    let whole = unsafe { area.as_mut_fam_struct() };
    whole.xsave.region.iter_mut().zip(words(fixed)).for_each(|(to, from)| *to = from);
    // SAFETY: the area is as large as KVM says that it is.
    let answer = unsafe { vcpu.set_xsave2(&area) };
    answer.map_err(KvmError::refused("write a virtual CPU's XSAVE area"))
}
