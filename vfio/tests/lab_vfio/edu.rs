//! A device that does DMA into memory while rounds read it: no page that it wrote may be lost.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use vmferry_vfio::{
    Dirty, DmaLog, Iommu, IovaRange, Passthrough, Pins, RateInterval, Region, Regions, Watch,
};

use crate::pci;

const PAGE: u64 = 4096;
const PAGES: u64 = 96;
/// The device's addresses have 28 bits.
const BASE: u64 = 0x10_0000;
const BAR: Region = Region(0);
/// The device's own buffer.
const BUFFER: u64 = 0x4_0000;
const FROM: u64 = 0x80;
const TO: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
const RUN: u64 = 1;
const TO_MEMORY: u64 = 2;

/// QEMU's teaching device: copies a page into its buffer, and out of it.
struct Edu {
    regions: Regions,
    device: Passthrough,
}

impl Edu {
    fn open() -> Edu {
        let path = pci::find("1234:11e8").pop().unwrap();
        let device = Passthrough::open("edu", &path, &Iommu::container().unwrap()).unwrap();
        let edu = Edu { regions: device.regions(), device };
        edu.may_do_dma(true);
        edu
    }

    /// The bus master bit, and memory accesses.
    fn may_do_dma(&self, may: bool) {
        let mut word = [0; 2];
        self.regions.read(Region::CONFIG, 4, &mut word).unwrap();
        let command = (u16::from_le_bytes(word) & !4) | 2 | if may { 4 } else { 0 };
        self.regions.write(Region::CONFIG, 4, &command.to_le_bytes()).unwrap();
    }

    fn copy(&self, from: u64, to: u64, how: u64) {
        for (at, value) in [(FROM, from), (TO, to), (COUNT, PAGE), (COMMAND, how | RUN)] {
            let value = u32::try_from(value).unwrap();
            self.regions.write(BAR, at, &value.to_le_bytes()).unwrap();
        }
        loop {
            let mut word = [0; 4];
            self.regions.read(BAR, COMMAND, &mut word).unwrap();
            if u64::from(word[0]) & RUN == 0 {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Page 0, as it is, into `page`, by DMA in both directions.
    fn write_page(&self, page: u64) {
        self.copy(BASE, BUFFER, 0);
        self.copy(BUFFER, BASE + page * PAGE, TO_MEMORY);
    }
}

fn read_pages(memory: &File, range: IovaRange) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(range.len).unwrap()];
    memory.read_exact_at(&mut bytes, range.iova - BASE).unwrap();
    bytes
}

fn send(source: &File, target: &File, ranges: &[IovaRange]) {
    for range in ranges {
        target.write_all_at(&read_pages(source, *range), range.iova - BASE).unwrap();
    }
}

fn whole() -> IovaRange {
    IovaRange { iova: BASE, len: PAGES * PAGE }
}

#[test]
fn no_page_that_dma_wrote_during_the_rounds_is_lost() {
    let edu = Edu::open();
    let (source, target) = (pci::memory(PAGES), pci::memory(PAGES));
    edu.device.iommu().map(whole(), &source, 0).unwrap();
    let iommu_log = edu.device.iommu().log().map(|log| Box::new(log) as Box<dyn DmaLog>);
    let mut watch = Watch::best(Some(Box::new(edu.device.log())), iommu_log, edu.device.iommu().maps());
    // The device keeps no log, and type1's knows only the maps of such a device: nobody can tell.
    let Watch::Nobody { why, .. } = &watch else { panic!("told by the {}", watch.teller()) };
    println!("lab: edu: {why}");
    let bytes = watch.pinned().iter().map(|range| range.len).sum();
    let pins = Pins { device: "edu".into(), kind: "device".into(), bytes };
    println!("lab: {}", pins.sentence(RateInterval { low: 3e7, high: 4e7 }));
    assert_eq!(watch.pinned(), [whole()]);

    send(&source, &target, &[whole()]);
    for round in 1..=5_u8 {
        source.write_all_at(&vec![round; 4096], 0).unwrap();
        let told = watch.collect().ranges(&edu.device.iommu().maps());
        edu.write_page(u64::from(round) * 17);
        send(&source, &target, &told);
    }
    let stale = read_pages(&source, whole()) != read_pages(&target, whole());
    assert!(stale, "DMA wrote while the rounds read, or this test shows nothing");
    // The stop, and then what the logs say for the last time and what is pinned.
    edu.may_do_dma(false);
    let told = watch.collect().ranges(&edu.device.iommu().maps());
    send(&source, &target, &told);
    send(&source, &target, watch.pinned());
    assert!(read_pages(&source, whole()) == read_pages(&target, whole()), "a page was lost");
    for round in 1..=5_u8 {
        let page = IovaRange { iova: BASE + u64::from(round) * 17 * PAGE, len: PAGE };
        assert!(
            read_pages(&target, page).iter().all(|byte| *byte == round),
            "DMA did not write page {}",
            page.iova
        );
    }
}

#[test]
fn type1s_log_covers_every_page_that_dma_wrote_and_fails_to_the_safe_side() {
    let edu = Edu::open();
    let memory = pci::memory(PAGES);
    let iommu = edu.device.iommu();
    iommu.map(whole(), &memory, 0).unwrap();
    let mut log = vmferry_vfio::WatchedLog::start(iommu.log().unwrap(), iommu.maps()).unwrap();
    assert!(log.knows_only_maps());
    for page in [5, 70] {
        edu.write_page(page);
        let told = log.collect().ranges(&iommu.maps());
        let at = BASE + page * PAGE;
        assert!(told.iter().any(|range| range.iova <= at && at < range.end()), "page {page} is not told");
    }
    // Another map lies across the end of what is watched: the report is refused, and that means everything.
    iommu.unmap(whole()).unwrap();
    iommu.map(IovaRange { iova: BASE + PAGES / 2 * PAGE, len: PAGES * PAGE }, &memory, 0).unwrap();
    let dirty = log.collect();
    assert!(matches!(dirty, Dirty::Everything(_)), "{dirty:?}");
}
