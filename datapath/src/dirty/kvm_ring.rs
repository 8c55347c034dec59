//! Dirty pages by KVM's rings: every vCPU tells each page that it wrote, one entry a page.
//!
//! ```text
//!   vCPU 0 ──► ring ─┐                                        ┌─► the caller's set
//!   vCPU 1 ──► ring ─┼─ harvest (in order) ─► pending ─ collect┘
//!                    └─ RESET: the kernel takes the entries back and protects their pages again
//! ```
//!
//! The cost follows the pages that were written, not the size of the guest. A ring that is full stops its vCPU with
//! [`EXIT_DIRTY_RING_FULL`]; the vCPU's own thread then calls [`KvmRings::relieve`] and goes on. What a vCPU still has in a
//! hardware buffer (PML) shows up in the ring when it leaves the guest, so after a pause nothing is missing. On x86
//! a write by the kernel outside of any vCPU has no ring to go to and KVM makes none; where a kernel offers a bitmap
//! beside the rings (arm64), a VM with them is not this log's to track.
//!
//! What must never happen: an entry harvested and dropped. It goes into `pending` under the lock that also does the
//! reset, and when anything in between fails, every page is dirty.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_EXIT_DIRTY_RING_FULL};
use rustix::io::Errno;

use super::kvm_log::{insert_all, refused};
use super::kvm_sys::{self, KvmSlot, RingEntry, RingMap};
use super::{DirtyLog, TrackError};
use crate::page::{ByteLen, PageCount};
use crate::page_set::PageSet;

/// Why a vCPU leaves the guest when its ring is full, by the number in `kvm_run.exit_reason`.
pub const EXIT_DIRTY_RING_FULL: u32 = KVM_EXIT_DIRTY_RING_FULL;

/// The rings of a VM that were asked for and not mapped yet: they come with its vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingRequest {
    bytes: ByteLen,
}

impl RingRequest {
    /// Asks for a ring of `bytes` bytes for each vCPU (16 an entry), at most what the kernel offers. Before the first
    /// vCPU is made.
    pub fn enable(vm: &impl AsRawFd, bytes: ByteLen) -> Result<RingRequest, TrackError> {
        let ordered = kvm_sys::check(vm, KVM_CAP_DIRTY_LOG_RING_ACQ_REL);
        let offered = if ordered > 0 { ordered } else { kvm_sys::check(vm, KVM_CAP_DIRTY_LOG_RING) };
        let no_rings = TrackError::HostRefused { service: "track by dirty rings", errno: Errno::NOSYS };
        let bytes = bytes.0.min(offered);
        if bytes == 0 {
            return Err(no_rings);
        }
        kvm_sys::enable_ring(vm, ordered > 0, bytes).map_err(refused("enable KVM's dirty rings"))?;
        Ok(RingRequest { bytes: ByteLen(bytes) })
    }

    /// Maps the rings of all vCPUs of the VM, which also keep them mapped while no log tracks.
    pub fn map(
        self,
        vm: &impl AsRawFd,
        vcpus: &[&impl AsRawFd],
        slots: Vec<KvmSlot>,
    ) -> Result<Arc<KvmRings>, TrackError> {
        let vm = kvm_sys::share(vm).map_err(refused("share the VM's descriptor"))?;
        let maps = vcpus.iter().map(|vcpu| RingMap::of(*vcpu, self.bytes.0)).collect::<Result<Vec<_>, _>>();
        let maps = maps.map_err(refused("map a vCPU's dirty ring"))?;
        let pages = slots.iter().map(|slot| slot.first_page().plus(slot.pages()).0).max().unwrap_or(0);
        let pending = PageSet::with_chunks(pages.div_ceil(64));
        Ok(Arc::new(KvmRings { vm, slots, inner: Mutex::new(Inner { maps, pending, lost: None, full: 0 }) }))
    }
}

/// The rings of a VM, shared by the log and the vCPUs' threads.
pub struct KvmRings {
    vm: OwnedFd,
    slots: Vec<KvmSlot>,
    inner: Mutex<Inner>,
}

struct Inner {
    maps: Vec<RingMap>,
    pending: PageSet,
    /// A harvest that failed in a vCPU's thread, kept for the log.
    lost: Option<TrackError>,
    full: u64,
}

impl KvmRings {
    /// For a vCPU's thread whose run ended with [`EXIT_DIRTY_RING_FULL`]: makes room in all rings. A failure is kept
    /// and given to the log, because from then on every page is dirty; the vCPU cannot go on either.
    pub fn relieve(&self) -> Result<(), TrackError> {
        let mut inner = self.lock();
        inner.full += 1;
        let outcome = self.harvest(&mut inner);
        if let Err(error) = &outcome {
            inner.lost = Some(error.clone());
        }
        outcome
    }

    /// How often a full ring stopped a vCPU.
    pub fn full_exits(&self) -> u64 {
        self.lock().full
    }

    /// Starts to track; dropping the log ends it.
    pub fn start(self: &Arc<Self>) -> Result<KvmRingLog, TrackError> {
        let log = KvmRingLog { rings: Arc::clone(self), first: true };
        self.slots.iter().try_for_each(|slot| {
            kvm_sys::set_tracking(&self.vm, slot, true).map_err(refused("track a VM's memory slot"))
        })?;
        Ok(log)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn harvest(&self, inner: &mut Inner) -> Result<(), TrackError> {
        let Inner { maps, pending, .. } = inner;
        let mut harvested = false;
        for map in maps {
            while let Some(entry) = map.take() {
                harvested = true;
                insert_entry(pending, &self.slots, entry)?;
            }
        }
        if harvested {
            kvm_sys::reset_rings(&self.vm).map_err(refused("reset KVM's dirty rings"))?;
        }
        Ok(())
    }
}

/// The upper half of an entry's slot is the address space, 0 outside of system management mode.
fn insert_entry(into: &mut PageSet, slots: &[KvmSlot], entry: RingEntry) -> Result<(), TrackError> {
    let slot = slots.iter().find(|slot| slot.number() == entry.slot && entry.page < slot.pages().0);
    let slot = slot.ok_or(TrackError::HostRefused {
        service: "name a known slot in a dirty ring",
        errno: Errno::RANGE,
    })?;
    into.insert_range(slot.first_page().plus(PageCount(entry.page)), PageCount(1));
    Ok(())
}

/// The log over a VM's rings.
pub struct KvmRingLog {
    rings: Arc<KvmRings>,
    first: bool,
}

impl DirtyLog for KvmRingLog {
    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        if std::mem::take(&mut self.first) {
            insert_all(into, &self.rings.slots);
        }
        let mut inner = self.rings.lock();
        let outcome = self.rings.harvest(&mut inner);
        into.union_with(&inner.pending);
        inner.pending.clear();
        outcome.and(inner.lost.take().map_or(Ok(()), Err))
    }

    fn name(&self) -> &'static str {
        "kvm-ring"
    }
}

impl Drop for KvmRingLog {
    fn drop(&mut self) {
        for slot in &self.rings.slots {
            // A VM that is gone needs no tracking ended.
            let _ = kvm_sys::set_tracking(&self.rings.vm, slot, false);
        }
    }
}
