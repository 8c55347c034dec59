//! Dirty pages by KVM's bitmap: read it, then clear exactly what was read.
//!
//! ```text
//!   guest writes ──► bit in the slot's bitmap ──GET──► words ──► the caller's set
//!                        ▲                              │
//!                        └───────── CLEAR ◄─────────────┘   (and the page is write-protected again)
//! ```
//!
//! With `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` reading does not clear: a bit that is set between the two steps stays,
//! unless its page was in the words already, and that page is read by the lanes only afterwards. `INITIALLY_SET`
//! spares the kernel from protecting every page at the start; the first harvest does it. Kernels without the
//! capability clear as they read.
//!
//! KVM answers only the process that made the VM, so a VMM harvests its own log and hands the set on. What must
//! never happen: a slot whose tracking outlives its log, which would slow the guest for ever.

use std::os::fd::{AsRawFd, OwnedFd};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};
use rustix::io::Errno;

use super::kvm_sys::{self, KvmSlot};
use super::{DirtyLog, TrackError};
use crate::page_set::PageSet;

/// Pages that one CLEAR takes: the kernel counts them in 32 bits, and holds its lock meanwhile.
const PAGES_PER_CLEAR: u64 = 1 << 20;

/// The bitmap of all slots of a VM.
pub struct KvmLog {
    vm: OwnedFd,
    slots: Vec<KvmSlot>,
    words: Vec<u64>,
    manual: bool,
    first: bool,
}

impl KvmLog {
    /// Starts to track `slots` of `vm`; dropping the log ends it. Only in the process that made the VM, and not on one
    /// whose rings are enabled.
    pub fn start(vm: &impl AsRawFd, slots: Vec<KvmSlot>) -> Result<KvmLog, TrackError> {
        let vm = kvm_sys::share(vm).map_err(refused("share the VM's descriptor"))?;
        let wanted = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
        let offered = kvm_sys::check(&vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) & wanted;
        let manual = offered & u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) != 0;
        if manual {
            kvm_sys::enable_manual_protect(&vm, offered).map_err(refused("make KVM's dirty log manual"))?;
        }
        let largest = slots.iter().map(|slot| slot.pages().0.div_ceil(64)).max().unwrap_or(0);
        let words = vec![0; usize::try_from(largest).unwrap_or(usize::MAX)];
        let log = KvmLog { vm, slots, words, manual, first: true };
        // A slot that refuses leaves `log`, which takes back what the others were told.
        log.slots.iter().try_for_each(|slot| {
            kvm_sys::set_tracking(&log.vm, slot, true).map_err(refused("track a VM's memory slot"))
        })?;
        Ok(log)
    }

    fn collect_slot(&mut self, slot: KvmSlot, into: &mut PageSet) -> Result<(), TrackError> {
        let pages = slot.pages().0;
        let words = &mut self.words[..usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX)];
        words.fill(0);
        kvm_sys::get_dirty_log(&self.vm, &slot, words).map_err(refused("read KVM's dirty log"))?;
        into.insert_words(slot.first_page(), words);
        if !self.manual {
            return Ok(());
        }
        let mut at = 0;
        while at < pages {
            let count = PAGES_PER_CLEAR.min(pages - at);
            let begin = usize::try_from(at / 64).unwrap_or(usize::MAX);
            let piece = &mut words[begin..];
            // Nothing to clear costs nothing.
            let here = usize::try_from(count.div_ceil(64)).unwrap_or(usize::MAX);
            if piece[..here].iter().any(|word| *word != 0) {
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                kvm_sys::clear_dirty_log(&self.vm, &slot, at, count, piece)
                    .map_err(refused("clear KVM's dirty log"))?;
            }
            at += count;
        }
        Ok(())
    }
}

pub(super) fn refused(service: &'static str) -> impl FnOnce(Errno) -> TrackError {
    move |errno| TrackError::HostRefused { service, errno }
}

/// Every page of the slots: what the first harvest returns, and what is true after an error.
pub(super) fn insert_all(into: &mut PageSet, slots: &[KvmSlot]) {
    slots.iter().for_each(|slot| into.insert_range(slot.first_page(), slot.pages()));
}

impl DirtyLog for KvmLog {
    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        if std::mem::take(&mut self.first) {
            insert_all(into, &self.slots);
        }
        (0..self.slots.len()).try_for_each(|number| self.collect_slot(self.slots[number], into))
    }

    fn name(&self) -> &'static str {
        "kvm-bitmap"
    }
}

impl Drop for KvmLog {
    fn drop(&mut self) {
        for slot in &self.slots {
            // A VM that is gone needs no tracking ended.
            let _ = kvm_sys::set_tracking(&self.vm, slot, false);
        }
    }
}
