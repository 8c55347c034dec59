//! What KVM's dirty tracking takes that kvm-ioctls does not wrap: flags of a slot, CLEAR, the ring's capability, its
//! map and its reset.
//!
//! What must never happen: a slot that is *changed* here. `KVM_SET_USER_MEMORY_REGION` with another address would
//! let a guest write whatever lies there, so a [`KvmSlot`] can only be made by who vouches for it.
#![expect(unsafe_code, reason = "ioctls and the shared ring of a vCPU have no safe wrapper")]

use std::ffi::{c_int, c_ulong, c_void};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_PAGE_OFFSET, KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_gfn, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::page::{ByteLen, PAGE_BYTES, PageCount, PageIndex};

/// The macros of vmm-sys-util make public functions without docs; they stay in here.
mod nr {
    use super::*;

    ioctl_io_nr!(KVM_CHECK_EXTENSION, KVMIO, 0x03);
    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    ioctl_iow_nr!(KVM_SET_USER_MEMORY_REGION, KVMIO, 0x46, kvm_userspace_memory_region);
    ioctl_iow_nr!(KVM_ENABLE_CAP, KVMIO, 0xa3, kvm_enable_cap);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
}

/// A memory slot of a VM, as it was given to `KVM_SET_USER_MEMORY_REGION`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmSlot {
    number: u32,
    guest_addr: u64,
    host_addr: u64,
    len: ByteLen,
    first_page: PageIndex,
}

impl KvmSlot {
    /// The slot `number`, which maps `len` bytes at `host_addr` of this process to `guest_addr`. Its first page is
    /// `first_page` of the flat page space.
    ///
    /// # Safety
    ///
    /// Exactly this was registered with the VM whose log it is given to, and it stays registered and mapped while
    /// that log lives: the log sets the slot again, with other flags.
    #[must_use]
    pub const unsafe fn new(
        number: u32,
        guest_addr: u64,
        host_addr: u64,
        len: ByteLen,
        first_page: PageIndex,
    ) -> KvmSlot {
        KvmSlot { number, guest_addr, host_addr, len, first_page }
    }

    /// Its number.
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// How many pages it has.
    pub const fn pages(&self) -> PageCount {
        self.len.pages_ceil()
    }

    /// Where it begins in the flat page space.
    pub const fn first_page(&self) -> PageIndex {
        self.first_page
    }
}

/// A descriptor of our own for a VM: the crates of rust-vmm lend theirs as a number only.
pub(super) fn share(vm: &impl AsRawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: whoever lends `vm` holds it open for the time of this call.
    let vm = unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) };
    rustix::io::fcntl_dupfd_cloexec(vm, 3)
}

fn outcome(answer: c_int) -> Result<c_int, Errno> {
    if answer >= 0 {
        return Ok(answer);
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// A capability's value; 0 where the kernel has none.
pub(super) fn check(vm: &impl AsRawFd, capability: u32) -> u64 {
    // SAFETY: asks a number and changes nothing.
    let answer = unsafe { ioctl_with_val(vm, nr::KVM_CHECK_EXTENSION(), c_ulong::from(capability)) };
    u64::try_from(answer).unwrap_or(0)
}

fn enable(vm: &impl AsRawFd, cap: u32, argument: u64) -> Result<(), Errno> {
    let request = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..kvm_enable_cap::default() };
    // SAFETY: the structure is the one that this call takes.
    outcome(unsafe { ioctl_with_ref(vm, nr::KVM_ENABLE_CAP(), &request) }).map(drop)
}

/// Asks for CLEAR as a step of its own. `flags` are those that the kernel offers.
pub(super) fn enable_manual_protect(vm: &impl AsRawFd, flags: u64) -> Result<(), Errno> {
    enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags)
}

/// Gives every vCPU that is made later a ring of `bytes` bytes.
pub(super) fn enable_ring(vm: &impl AsRawFd, ordered: bool, bytes: u64) -> Result<(), Errno> {
    let cap = if ordered { KVM_CAP_DIRTY_LOG_RING_ACQ_REL } else { KVM_CAP_DIRTY_LOG_RING };
    enable(vm, cap, bytes)
}

/// Starts or ends the tracking of a slot.
pub(super) fn set_tracking(vm: &impl AsRawFd, slot: &KvmSlot, on: bool) -> Result<(), Errno> {
    let region = kvm_userspace_memory_region {
        slot: slot.number,
        flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
        guest_phys_addr: slot.guest_addr,
        memory_size: slot.len.0,
        userspace_addr: slot.host_addr,
    };
    // SAFETY: who made the slot vouches that exactly this is registered already, so only its flags change.
    outcome(unsafe { ioctl_with_ref(vm, nr::KVM_SET_USER_MEMORY_REGION(), &region) }).map(drop)
}

/// Reads a slot's bitmap. `words` has a bit for every page, in whole words.
pub(super) fn get_dirty_log(vm: &impl AsRawFd, slot: &KvmSlot, words: &mut [u64]) -> Result<(), Errno> {
    if (words.len() as u64) < slot.pages().0.div_ceil(64) {
        return Err(Errno::INVAL);
    }
    let place = kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast::<c_void>() };
    let request = kvm_dirty_log { slot: slot.number, padding1: 0, __bindgen_anon_1: place };
    // SAFETY: the kernel writes one bit a page of the slot, rounded up to words: checked above. Were the slot larger
    // than its maker vouches for, that promise would be broken.
    outcome(unsafe { ioctl_with_ref(vm, nr::KVM_GET_DIRTY_LOG(), &request) }).map(drop)
}

/// Clears the pages of `words` in a slot's bitmap and protects them again, from page `first` on.
pub(super) fn clear_dirty_log(
    vm: &impl AsRawFd,
    slot: &KvmSlot,
    first: u64,
    num_pages: u32,
    words: &mut [u64],
) -> Result<(), Errno> {
    if (words.len() as u64) < u64::from(num_pages).div_ceil(64) {
        return Err(Errno::INVAL);
    }
    let place = kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast::<c_void>() };
    let mut request =
        kvm_clear_dirty_log { slot: slot.number, num_pages, first_page: first, __bindgen_anon_1: place };
    // SAFETY: the kernel reads one bit for each of `num_pages`: checked above.
    outcome(unsafe { ioctl_with_mut_ref(vm, nr::KVM_CLEAR_DIRTY_LOG(), &mut request) }).map(drop)
}

/// Lets the kernel take back every entry that was harvested, and protect its page again.
pub(super) fn reset_rings(vm: &impl AsRawFd) -> Result<(), Errno> {
    // SAFETY: takes no argument and touches no memory of ours.
    outcome(unsafe { ioctl(vm, nr::KVM_RESET_DIRTY_RINGS()) }).map(drop)
}

const DIRTY: u32 = 1;
const HARVESTED: u32 = 2;

/// One vCPU's ring, mapped: the kernel fills it in order, we empty it in order.
pub(super) struct RingMap {
    base: NonNull<kvm_dirty_gfn>,
    entries: usize,
    next: usize,
}

// SAFETY: plain shared memory without thread affinity, reached through atomics and raw reads only.
unsafe impl Send for RingMap {}

/// A page that the guest wrote, as a ring tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingEntry {
    pub(super) slot: u32,
    pub(super) page: u64,
}

impl RingMap {
    /// Maps the ring of a vCPU of a VM whose rings were enabled with `bytes` bytes.
    pub(super) fn of(vcpu: &impl AsRawFd, bytes: u64) -> Result<RingMap, Errno> {
        let len = usize::try_from(bytes).map_err(|_| Errno::INVAL)?;
        let entries = len / size_of::<kvm_dirty_gfn>();
        if entries == 0 || !len.is_multiple_of(PAGE_BYTES) {
            return Err(Errno::INVAL);
        }
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_BYTES as u64;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let vcpu = share(vcpu)?;
        // SAFETY: a fresh shared mapping at an address that the kernel picks touches no memory of ours.
        let base = unsafe { mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, vcpu, offset) }?;
        let base = NonNull::new(base.cast::<kvm_dirty_gfn>()).ok_or(Errno::FAULT)?;
        Ok(RingMap { base, entries, next: 0 })
    }

    /// Takes the next entry, or nothing when the guest wrote no further page.
    pub(super) fn take(&mut self) -> Option<RingEntry> {
        // SAFETY: `next` is smaller than the number of entries that the mapping holds.
        let entry = unsafe { self.base.as_ptr().add(self.next) };
        // SAFETY: inside the mapping; only the place is computed.
        let flags = unsafe { &raw mut (*entry).flags };
        // SAFETY: aligned and mapped as long as `self`; both sides use it as an atomic only.
        let flags = unsafe { AtomicU32::from_ptr(flags) };
        // Acquire: the kernel wrote slot and offset before it set the flag.
        if flags.load(Ordering::Acquire) & DIRTY == 0 {
            return None;
        }
        // SAFETY: inside the mapping; the kernel leaves an entry alone between DIRTY and the reset.
        let kvm_dirty_gfn { slot, offset, .. } = unsafe { entry.read_volatile() };
        // Release: the kernel may use the entry anew as soon as it sees this.
        flags.store(HARVESTED, Ordering::Release);
        self.next = (self.next + 1) % self.entries;
        Some(RingEntry { slot, page: offset })
    }
}

impl Drop for RingMap {
    fn drop(&mut self) {
        let len = self.entries * size_of::<kvm_dirty_gfn>();
        // SAFETY: mapped in `of`, and no entry is borrowed. An error leaves address space behind, nothing else.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), len) };
    }
}
