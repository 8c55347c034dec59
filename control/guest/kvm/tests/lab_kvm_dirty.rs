//! The contract of dirty logs on a guest that really runs: KVM's bitmap and its rings.

use std::io;
use std::sync::Arc;

use vmferry_datapath::dirty::contract::{Scribe, check};
use vmferry_datapath::{ByteLen, PageIndex, RamLayout};
use vmferry_kvm::payload::FLAT_FREE_FROM;
use vmferry_kvm::{Config, FeatureSet, Flat, GuestMemory, RunningMachine, Tracking};

const BYTES: u64 = 16 << 20;

struct Guest {
    guest: Flat<RunningMachine>,
    layout: RamLayout,
}

impl Scribe for Guest {
    fn layout(&self) -> &RamLayout {
        &self.layout
    }

    fn span(&self) -> (PageIndex, PageIndex) {
        (PageIndex(FLAT_FREE_FROM / 4096), PageIndex(BYTES / 4096))
    }

    fn write(&mut self, pages: &[PageIndex]) -> Result<(), String> {
        let pages: Vec<u32> = pages.iter().filter_map(|page| u32::try_from(page.0).ok()).collect();
        self.guest.write(&pages).map_err(|error| error.to_string())
    }
}

fn keeps_the_contract(tracking: Tracking) {
    let memory = Arc::new(GuestMemory::new(ByteLen(BYTES)).expect("memory for a guest"));
    let layout = memory.layout().clone();
    let features = FeatureSet::of_host().expect("the lab has a KVM");
    let config = Config {
        memory,
        cpus: 1,
        tracking,
        features,
        console: Box::new(io::sink()),
        beat: Box::new(io::sink()),
    };
    let guest = Flat::boot(config).and_then(Flat::run).expect("a guest runs");
    let mut log = guest.machine.track().expect("KVM tracks it");
    check(&mut Guest { guest, layout }, &mut log).unwrap_or_else(|broken| panic!("{broken}"));
}

#[test]
fn the_bitmap_keeps_the_contract() {
    keeps_the_contract(Tracking::Bitmap);
}

#[test]
fn the_rings_keep_the_contract() {
    keeps_the_contract(Tracking::Ring);
}

#[test]
fn a_ring_that_is_always_full_keeps_the_contract() {
    keeps_the_contract(Tracking::RingOf(ByteLen(4096)));
}
