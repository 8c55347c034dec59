//! What devices wrote into the guest's memory, as pages of its file.

use vmferry_datapath::{PAGE_BYTES, PageCount, PageIndex, PageSet};
use vmferry_kvm::GuestMemory;
use vmferry_kvm::memory::MemoryRegion;
use vmferry_vfio::dma::PAGE_BYTES as DMA_PAGE_BYTES;
use vmferry_vfio::{DeviceLog, Dirty, DmaLog, Iommu, IovaRange, Teller, Watch};

const _: () = assert!(DMA_PAGE_BYTES == PAGE_BYTES as u64);

/// The logs of all devices. Dropped, they end.
pub(in crate::kvm) struct Watches {
    watches: Vec<Watch>,
    regions: Vec<MemoryRegion>,
}

impl Watches {
    /// For a guest without devices.
    pub(super) fn none() -> Watches {
        Watches { watches: Vec::new(), regions: Vec::new() }
    }

    pub(super) fn start(
        logs: impl Iterator<Item = DeviceLog>,
        iommu: &Iommu,
        memory: &GuestMemory,
    ) -> Watches {
        let watch = |log: DeviceLog| {
            let iommu_log = iommu.log().map(|log| Box::new(log) as Box<dyn DmaLog>);
            Watch::best(Some(Box::new(log)), iommu_log, iommu.maps())
        };
        Watches { watches: logs.map(watch).collect(), regions: memory.regions().to_vec() }
    }

    /// Who tells, device by device.
    pub(super) fn tellers(&self) -> impl Iterator<Item = Teller> {
        self.watches.iter().map(Watch::teller)
    }

    /// Adds what was written since the last time. A log that failed has everything written.
    pub(in crate::kvm) fn collect(&mut self, into: &mut PageSet) {
        let Watches { watches, regions } = self;
        for watch in watches {
            match watch.collect() {
                Dirty::Ranges(ranges) => ranges.iter().for_each(|range| insert(regions, *range, into)),
                Dirty::Everything(why) => {
                    tracing::warn!("every page counts as written: {why}");
                    regions.iter().for_each(|region| insert(regions, whole(region), into));
                }
            }
        }
    }

    /// Adds what nobody can tell.
    pub(in crate::kvm) fn pin(&self, into: &mut PageSet) {
        let pinned = self.watches.iter().flat_map(|watch| watch.pinned());
        pinned.for_each(|range| insert(&self.regions, *range, into));
    }
}

fn whole(region: &MemoryRegion) -> IovaRange {
    IovaRange { iova: region.guest_addr, len: region.len.0 }
}

/// Devices count in the guest's addresses, the lanes in the file's pages.
fn insert(regions: &[MemoryRegion], range: IovaRange, into: &mut PageSet) {
    for region in regions {
        let (start, end) = (range.iova.max(region.guest_addr), range.end().min(whole(region).end()));
        if start < end {
            let first = (start - region.guest_addr + region.file_offset) / DMA_PAGE_BYTES;
            into.insert_range(PageIndex(first), PageCount((end - start).div_ceil(DMA_PAGE_BYTES)));
        }
    }
}

impl Drop for Watches {
    fn drop(&mut self) {
        for watch in self.watches.drain(..) {
            // A log that does not end costs the device time, and ends with this process.
            let stopped = match watch {
                Watch::Device(log) | Watch::Iommu(log) => log.stop(),
                Watch::Nobody { .. } => Ok(()),
            };
            stopped.unwrap_or_else(|error| tracing::warn!("a log of DMA does not end: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use vmferry_datapath::ByteLen;

    use super::*;

    #[test]
    fn addresses_of_devices_become_pages_of_the_file() {
        let memory = GuestMemory::new(ByteLen((3 << 30) + (8 << 20))).unwrap();
        let mut set = PageSet::new(memory.layout());
        // Over the end of the lower piece, over the gap, and into the upper one.
        let range = IovaRange { iova: (3 << 30) - 4096, len: (1 << 30) + 3 * 4096 };
        insert(memory.regions(), range, &mut set);
        let gap = (3 << 30) / 4096;
        let found: Vec<u64> = (gap - 3..gap + 5).filter(|page| set.contains(PageIndex(*page))).collect();
        assert_eq!((found, set.count()), (vec![gap - 1, gap, gap + 1], PageCount(3)));
    }
}
