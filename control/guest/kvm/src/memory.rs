//! The guest's memory: one memfd, mapped here and by the mover, in one or two slots.
//!
//! ```text
//!   memfd   |0 ............ 3 GiB|3 GiB ........ end|      the flat page space of the lanes
//!   guest   |0 ............ 3 GiB|  (gap)  |4 GiB ........ |
//!   slot     0                              1
//! ```
//!
//! vm-memory marks in a bitmap what the VMM itself writes (a loader, an emulated device), which KVM's log does not see;
//! [`GuestMemory::take_written`] gives those pages to the log. What must never happen: a write of the VMM past that
//! bitmap, so the mapping leaves this file as numbers for `KVM_SET_USER_MEMORY_REGION` and for DMA maps only.
#![expect(unsafe_code, reason = "a memory slot is registered by the address of its mapping")]

use std::fs::File;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmferry_datapath::{ByteLen, KvmSlot, PAGE_BYTES, PageIndex, PageSet, RamBlock, RamLayout};

use crate::KvmError;

/// The guest addresses between 3 and 4 GiB belong to devices.
pub const GAP_START: u64 = 3 << 30;
/// Where memory goes on behind the gap.
pub const GAP_END: u64 = 4 << 30;
/// The smallest guest: a kernel's first megabyte and a little.
const RAM_BYTES_MIN: u64 = 2 << 20;
/// The one block of this machine's layout.
const BLOCK_NAME: &str = "ram";

/// One contiguous piece of guest memory, for whoever maps it for DMA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Its slot number.
    pub slot: u32,
    /// Where the guest sees it.
    pub guest_addr: u64,
    /// Where this process has it mapped, as a number: to be handed to the kernel, not to be followed.
    pub host_addr: u64,
    /// Its length.
    pub len: ByteLen,
    /// Where it begins in the file, and so in the flat page space.
    pub file_offset: u64,
}

/// All memory of a guest.
pub struct GuestMemory {
    file: Arc<File>,
    map: GuestMemoryMmap<AtomicBitmap>,
    regions: Vec<MemoryRegion>,
    layout: RamLayout,
}

impl GuestMemory {
    /// `len` bytes of zero memory, in a file of its own.
    pub fn new(len: ByteLen) -> Result<GuestMemory, KvmError> {
        if len.0 < RAM_BYTES_MIN || !len.0.is_multiple_of(PAGE_BYTES as u64) {
            return Err(KvmError::mistake(format!(
                "a guest cannot have {len} bytes of memory: give at least {RAM_BYTES_MIN}, in whole pages of {PAGE_BYTES}"
            )));
        }
        let what = "make a memory file for the guest";
        let file = memfd_create("vmferry-microvm", MemfdFlags::CLOEXEC).map_err(KvmError::refused(what))?;
        let file = File::from(file);
        file.set_len(len.0).map_err(KvmError::refused(what))?;
        let file = Arc::new(file);
        let below = len.0.min(GAP_START);
        let pieces = [(0, below, 0), (GAP_END, len.0 - below, below)];
        let pieces: Vec<_> = pieces.into_iter().filter(|(_, len, _)| *len > 0).collect();
        let ranges = pieces.iter().map(|(addr, len, offset)| {
            let place = FileOffset::from_arc(Arc::clone(&file), *offset);
            (GuestAddress(*addr), usize::try_from(*len).unwrap_or(usize::MAX), Some(place))
        });
        let map = GuestMemoryMmap::from_ranges_with_files(ranges.collect::<Vec<_>>())
            .map_err(|error| KvmError::refused("map the guest's memory")(std::io::Error::other(error)))?;
        let regions =
            map.iter().zip(0_u32..).zip(&pieces).map(|((region, slot), (guest_addr, len, file_offset))| {
                let host_addr = region.as_ptr().expose_provenance() as u64;
                MemoryRegion {
                    slot,
                    guest_addr: *guest_addr,
                    host_addr,
                    len: ByteLen(*len),
                    file_offset: *file_offset,
                }
            });
        let regions = regions.collect();
        let page_bytes = u32::try_from(PAGE_BYTES).unwrap_or(u32::MAX);
        let layout = RamLayout::new(vec![RamBlock { name: BLOCK_NAME.to_owned(), len, page_bytes }])?;
        Ok(GuestMemory { file, map, regions, layout })
    }

    /// The file, to be mapped by the mover.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The memory as the lanes see it.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// The pieces, for DMA maps.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// The memory as rust-vmm's loaders and devices see it; what they write through it is in [`GuestMemory::take_written`].
    pub fn map(&self) -> &GuestMemoryMmap<AtomicBitmap> {
        &self.map
    }

    /// Adds the pages that this VMM itself wrote since the last call.
    pub fn take_written(&self, into: &mut PageSet) {
        for (region, place) in self.map.iter().zip(&self.regions) {
            let words = region.get_mmap().bitmap().get_and_reset();
            let first = PageIndex(place.file_offset / PAGE_BYTES as u64);
            into.insert_words(first, &words);
        }
    }

    /// Registers every piece with a VM, which must not outlive this memory.
    pub(crate) fn register(&self, vm: &VmFd) -> Result<(), KvmError> {
        for region in &self.regions {
            let region = kvm_userspace_memory_region {
                slot: region.slot,
                flags: 0,
                guest_phys_addr: region.guest_addr,
                memory_size: region.len.0,
                userspace_addr: region.host_addr,
            };
            // SAFETY: exactly this is mapped, and the VM's owner keeps this memory as long as the VM.
            let answer = unsafe { vm.set_user_memory_region(region) };
            answer.map_err(KvmError::refused("give the guest's memory to KVM"))?;
        }
        Ok(())
    }

    /// The slots of a VM that this memory was registered with.
    pub(crate) fn slots(&self) -> Vec<KvmSlot> {
        let slot = |region: &MemoryRegion| {
            let first = PageIndex(region.file_offset / PAGE_BYTES as u64);
            // SAFETY: `register` gave exactly this to the VM, and the caller tracks no other with it.
            unsafe { KvmSlot::new(region.slot, region.guest_addr, region.host_addr, region.len, first) }
        };
        self.regions.iter().map(slot).collect()
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;
    use vmferry_datapath::PageCount;

    use super::*;

    #[test]
    fn what_the_vmm_writes_is_told_once() {
        let memory = GuestMemory::new(ByteLen(4 << 20)).unwrap();
        memory.map().write_slice(&[7; 5000], GuestAddress(0x20_0000 - 100)).unwrap();
        let mut set = PageSet::new(memory.layout());
        memory.take_written(&mut set);
        let found: Vec<u64> = (0..1024).filter(|page| set.contains(PageIndex(*page))).collect();
        assert_eq!(found, [511, 512, 513]);
        set.clear();
        memory.take_written(&mut set);
        assert!(set.is_empty());
    }

    #[test]
    fn memory_past_3_gib_lies_behind_the_gap() {
        let memory = GuestMemory::new(ByteLen((3 << 30) + (8 << 20))).unwrap();
        let places: Vec<_> =
            memory.regions().iter().map(|r| (r.guest_addr, r.len.0, r.file_offset)).collect();
        assert_eq!(places, [(0, 3 << 30, 0), (4 << 30, 8 << 20, 3 << 30)]);
        memory.map().write_obj(1_u8, GuestAddress((4 << 30) + 4096)).unwrap();
        let mut set = PageSet::new(memory.layout());
        memory.take_written(&mut set);
        assert!(set.contains(PageIndex((3 << 30) / 4096 + 1)) && set.count() == PageCount(1));
    }

    #[test]
    fn odd_sizes_are_refused() {
        for len in [0, 4096, (4 << 20) + 1] {
            assert!(matches!(GuestMemory::new(ByteLen(len)), Err(KvmError::UserMistake(_))), "{len}");
        }
    }
}
