//! Direct mode: the target's memory, open to the source's card region by region.
//!
//! ```text
//!   source ── Want(region) ──► target registers 4 MiB of its guest, once for all lanes
//!          ◄─ Region(where, key) ──
//!          ── WRITE pages ──► guest memory    ── record: «these pages lie there» ──► ring
//! ```
//!
//! A region is registered when the first page of it comes: what stays empty is neither locked nor allocated. How much is
//! locked at a time may be limited (the module `lease`), or all of it is registered before the first page comes. Where the
//! card faults pages in by itself (on-demand paging), nothing is locked.
//!
//! The source's guest is *not* registered: its pages are copied into a slot as they are read. A card holds on to the
//! page that it once looked up; a guest that gives memory back (a balloon, free page reporting) and gets another page in
//! its place would be sent as it was before. A copy through the page table cannot be wrong in that way, and costs a tenth of
//! what sealing does.
//!
//! *Trust*: page bodies are neither encrypted nor authenticated by vmferry, only by the fabric, if it does so. Records
//! are sealed as ever, so counts, order and device state are authenticated. The source can write to any region that it
//! asked for, at any time, until the region or the lanes are closed; so can whoever forges packets on the fabric. What must never
//! happen: a region open to a peer with whom direct mode was not agreed on both sides.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;

use super::cm::Connection;
use super::error::FIX_LOCKED;
use super::lease::{Leases, Ledger, Share, Turn};
use super::verbs::{Key, Reach};
use super::wire::{Note, Window};
use super::{Mode, Posted, RdmaLink, SENDS_RESERVED};
use crate::guest_ram::{GuestRam, runs};
use crate::limits::{RDMA_REGION_BYTES, RDMA_SENDS};
use crate::link::LinkTrouble;
use crate::page::{CHUNK_BYTES, ChunkIndex, PAGE_BYTES};

/// Notes that may wait to be sent; a peer that asks for more than it listens to is none.
const NOTES_MAX: usize = 64;

/// How much of the target's guest is registered, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pin {
    /// What pages come for, all of it in the end.
    AsNeeded,
    /// What pages come for, at most so many bytes at a time.
    AtMost(u64),
    /// All of it, before the first page.
    All,
}

/// The target's guest, as the lanes of one transfer open it to the source.
pub struct OpenRam {
    ram: Arc<GuestRam>,
    regions: Regions,
    /// Regions that each lane may hold.
    share: usize,
    pin: Pin,
    held: Mutex<Held>,
}

/// What is registered. The keys go before the connection that they were made on.
struct Held {
    ledger: Ledger<Key>,
    on_demand: bool,
    keeper: Option<Arc<Connection>>,
}

impl OpenRam {
    /// Opens nothing yet. Each of so many lanes may hold its share of what may be open at a time.
    #[must_use]
    pub fn new(ram: Arc<GuestRam>, pin: Pin, lanes: usize) -> Arc<OpenRam> {
        let regions = Regions::of(&ram);
        let all = usize::try_from(regions.count).unwrap_or(usize::MAX);
        let most = match pin {
            Pin::AtMost(bytes) => usize::try_from(bytes / RDMA_REGION_BYTES).unwrap_or(usize::MAX),
            Pin::AsNeeded | Pin::All => usize::MAX,
        };
        let share = (most / lanes.max(1)).min(all);
        let (room, keeper) = (most.min(all), None);
        let held = Mutex::new(Held { ledger: Ledger::new(room), on_demand: false, keeper });
        Arc::new(OpenRam { ram, regions, share, pin, held })
    }

    /// What a lane may hold. Where all of the guest is to be registered, it is when this returns.
    pub(super) fn admit(&self, connection: &Arc<Connection>) -> Result<Share, Errno> {
        if self.share == 0 {
            return Err(Errno::NOSPC);
        }
        if self.pin == Pin::All {
            for region in 0..self.regions.count {
                self.open(connection, region)?;
            }
        }
        Ok(Share::of(self.share))
    }

    /// Opens a region to the peer of `connection`, for one more lane; the same window for every lane. `None` when there is
    /// no such region, or no room for it.
    pub(super) fn open(&self, connection: &Arc<Connection>, region: u32) -> Result<Option<Window>, Errno> {
        let mut held = self.lock();
        let Held { ledger, on_demand, keeper } = &mut *held;
        if keeper.is_none() {
            *on_demand = connection.writes_on_demand();
        }
        let keeper = keeper.get_or_insert_with(|| Arc::clone(connection));
        if !keeper.queue_pair.shares_keys_with(&connection.queue_pair) {
            // Lanes over two cards: a key of one is none of the other.
            return Err(Errno::XDEV);
        }
        let Some((block, at, len)) = self.regions.locate(region) else { return Ok(None) };
        let Some(range) = self.ram.span(block, at, len) else { return Ok(None) };
        let reach = if *on_demand { Reach::PeerWritesOnDemand } else { Reach::PeerWrites };
        let key = ledger.hold(region, || Key::of_guest(&keeper.queue_pair, &range, reach))?;
        Ok(key.map(Key::window))
    }

    /// A lane gives a region back: none of its writes there is on its way.
    pub(super) fn give_back(&self, region: u32) {
        self.lock().ledger.give_back(region);
    }

    /// Regions that are open.
    #[must_use]
    pub fn opened(&self) -> usize {
        self.lock().ledger.opened()
    }

    /// Regions that were closed to make room for others.
    #[must_use]
    pub fn closed(&self) -> u64 {
        self.lock().ledger.closed()
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a guest's blocks fall into regions: a pure function of the layout, the same on both hosts.
pub(super) struct Regions {
    /// The length of each block, and the number of its first region.
    blocks: Vec<(u64, u32)>,
    count: u32,
}

impl Regions {
    pub(super) fn of(ram: &GuestRam) -> Regions {
        Regions::new(ram.layout().blocks().iter().map(|block| block.len.0))
    }

    fn new(lengths: impl Iterator<Item = u64>) -> Regions {
        let mut regions = Regions { blocks: Vec::new(), count: 0 };
        for len in lengths {
            regions.blocks.push((len, regions.count));
            let more = u32::try_from(len.div_ceil(RDMA_REGION_BYTES)).unwrap_or(u32::MAX);
            regions.count = regions.count.saturating_add(more);
        }
        regions
    }

    /// A region's block, and which bytes of it.
    fn locate(&self, region: u32) -> Option<(usize, u64, usize)> {
        if region >= self.count {
            return None;
        }
        let block = self.blocks.iter().rposition(|(_, first)| *first <= region)?;
        let (len, first) = self.blocks[block];
        let at = u64::from(region - first) * RDMA_REGION_BYTES;
        let len = len.checked_sub(at)?.min(RDMA_REGION_BYTES);
        Some((block, at, usize::try_from(len).ok()?))
    }

    /// The region that holds a chunk, and where in it the chunk begins. A chunk lies in one region, because both are
    /// counted from the start of the block.
    pub(super) fn of_chunk(&self, ram: &GuestRam, chunk: ChunkIndex) -> Option<(u32, u64)> {
        let (block, offset) = ram.layout().locate(chunk)?;
        let (_, first) = self.blocks.get(block)?;
        let number = u32::try_from(offset / RDMA_REGION_BYTES).ok()?;
        Some((first.checked_add(number)?, offset % RDMA_REGION_BYTES))
    }
}

const _: () = assert!(RDMA_REGION_BYTES.is_multiple_of(CHUNK_BYTES as u64), "a chunk lies in one region");

/// What the source knows of the target's regions.
pub(super) struct Placer {
    pub(super) ram: Arc<GuestRam>,
    regions: Regions,
    pub(super) leases: Leases,
}

/// Where a chunk's pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// There, in this region.
    There(u32, Spot),
    /// Its region must be asked for, and another one given back before.
    Ask { region: u32, instead_of: Option<u32> },
    /// Its region was asked for, or cannot be yet.
    Soon,
    /// The guest has no such chunk.
    Nowhere,
}

/// An address in the target's memory, and the key that opens it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    address: u64,
    key: u32,
}

impl Placer {
    pub(super) fn new(ram: Arc<GuestRam>) -> Placer {
        let regions = Regions::of(&ram);
        Placer { ram, regions, leases: Leases::default() }
    }

    /// Where the first page of a chunk goes.
    pub(super) fn place_of(&mut self, chunk: ChunkIndex) -> Place {
        let Some((region, offset)) = self.regions.of_chunk(&self.ram, chunk) else { return Place::Nowhere };
        match self.leases.want(region) {
            Turn::Write(window) => {
                let spot = Spot { address: window.address.saturating_add(offset), key: window.key };
                Place::There(region, spot)
            }
            Turn::Ask { instead_of } => Place::Ask { region, instead_of },
            Turn::Wait => Place::Soon,
        }
    }

    /// The target says where a region is; `false` when it was not asked for, or is not as long as it must be.
    pub(super) fn told(&mut self, region: u32, window: Window) -> bool {
        let wanted = self.regions.locate(region).map(|(_, _, len)| len as u64);
        wanted == Some(window.len) && self.leases.told(region, window)
    }
}

impl RdmaLink {
    /// The peer lets this end hold so many regions; `None` when it agreed to direct mode and allows none.
    pub(super) fn allow(&mut self, regions: u32) -> Option<bool> {
        match &mut self.mode {
            Mode::Placing(placer) => placer.leases.allow(regions).then_some(true),
            Mode::Sealed | Mode::Open(..) => Some(false),
        }
    }

    /// Takes in what the peer says about regions: whether it lets the lane go on, `None` when the peer may not say that.
    pub(super) fn note_of_regions(&mut self, note: Note) -> Result<Option<bool>, LinkTrouble> {
        match (note, &mut self.mode) {
            (Note::Want(region), Mode::Open(ram, share)) => {
                if self.notes.len() >= NOTES_MAX || !share.take(region) {
                    return Ok(None);
                }
                let window = ram.open(&self.connection, region).map_err(cannot_open)?;
                Ok(window.map(|window| {
                    self.notes.push_back(Note::Region(region, window));
                    false
                }))
            }
            (Note::GiveBack(region), Mode::Open(ram, share)) => Ok(share.give_back(region).then(|| {
                ram.give_back(region);
                false
            })),
            (Note::Region(region, window), Mode::Placing(placer)) => {
                Ok(placer.told(region, window).then_some(true))
            }
            (Note::Ring(..) | Note::Want(_) | Note::Region(..) | Note::GiveBack(_), _) => Ok(None),
        }
    }

    /// A free slot that the lane is not filling, to copy pages into.
    fn spare_slot(&self) -> Option<usize> {
        let count = self.buffers.as_ref().map_or(0, |buffers| buffers.slot_count);
        (0..count).rev().find(|slot| self.lent != Some(*slot) && self.is_free(*slot))
    }

    /// Copies the pages into a slot, run after run, and posts a write for each. They read the slot until they complete.
    pub(super) fn post_pages(
        &mut self,
        chunk: ChunkIndex,
        pages: u64,
        region: u32,
        to: Spot,
    ) -> Result<bool, Errno> {
        let runs_count = runs(pages).count();
        let Some(slot) = self.spare_slot().filter(|_| {
            self.posted.len() + runs_count + SENDS_RESERVED <= RDMA_SENDS && self.established && !self.over
        }) else {
            return Ok(false);
        };
        let (Mode::Placing(placer), Some(buffers)) = (&mut self.mode, self.buffers.as_mut()) else {
            return Err(Errno::INVAL);
        };
        let start = slot * buffers.slot_bytes;
        placer.ram.gather(chunk, pages, buffers.slots.bytes_mut(start, buffers.slot_bytes));
        let mut at = start;
        for (first, count) in runs(pages) {
            let len = count as usize * PAGE_BYTES;
            let piece = buffers.slots.key().piece(at, len);
            let there = to.address + u64::from(first) * PAGE_BYTES as u64;
            self.connection.queue_pair.post_write(Some(piece), there, to.key, None)?;
            placer.leases.posted(region);
            self.posted.push_back(Posted::Placed { slot, region });
            self.counts.requests.add(1);
            self.counts.placed.add(1);
            at += len;
        }
        Ok(true)
    }
}

/// Guest memory that cannot be opened to the peer.
pub(super) fn cannot_open(errno: Errno) -> LinkTrouble {
    let service = "open guest memory to the RDMA card";
    let fix = match errno {
        Errno::XDEV => "let all lanes use one card: name one of its addresses",
        Errno::NOSPC => "let the target pin 4 MiB or more for each lane (--rdma-pin-max), or use fewer lanes",
        _ => FIX_LOCKED,
    };
    LinkTrouble::Refused { service, fix, errno }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::empty_ram;

    const MIB: u64 = 1 << 20;

    #[test]
    fn blocks_fall_into_regions_that_no_chunk_crosses() {
        let regions = Regions::new([4096, 9 * MIB, 4 * MIB].into_iter());
        assert_eq!(regions.count, 1 + 3 + 1);
        assert_eq!(regions.locate(0), Some((0, 0, 4096)));
        assert_eq!(regions.locate(1), Some((1, 0, 4 << 20)));
        assert_eq!(regions.locate(3), Some((1, 8 * MIB, 1 << 20)));
        assert_eq!(regions.locate(4), Some((2, 0, 4 << 20)));
        assert_eq!(regions.locate(5), None);
    }

    #[test]
    fn a_chunk_goes_into_its_region_once_that_was_told_as_long_as_it_is() {
        let ram = Arc::new(empty_ram(&[1, 64 * 20]));
        let mut placer = Placer::new(ram);
        assert!(placer.leases.allow(8));
        // Chunk 0 is the tiny block; chunk 18 is the 18th of the second block's, in its second region.
        assert_eq!(placer.place_of(ChunkIndex(18)), Place::Ask { region: 2, instead_of: None });
        assert_eq!(placer.place_of(ChunkIndex(18)), Place::Soon);
        assert_eq!(placer.place_of(ChunkIndex(99)), Place::Nowhere);
        let window = Window { address: 0x1000_0000, key: 5, len: MIB };
        assert!(!placer.told(2, Window { len: 2 * MIB, ..window }), "too long");
        assert!(placer.told(2, window));
        let spot = Spot { address: 0x1000_0000 + 262_144, key: 5 };
        assert_eq!(placer.place_of(ChunkIndex(18)), Place::There(2, spot));
    }

    #[test]
    fn what_may_be_open_is_shared_out_among_the_lanes() {
        let ram = || Arc::new(empty_ram(&[64 * 16 * 10]));
        let share = |pin, lanes| OpenRam::new(ram(), pin, lanes).share;
        assert_eq!(share(Pin::AtMost(RDMA_REGION_BYTES * 6), 4), 1);
        assert_eq!(share(Pin::AtMost(RDMA_REGION_BYTES * 3), 4), 0, "refused when the first lane comes");
        assert_eq!((share(Pin::AsNeeded, 4), share(Pin::All, 4)), (10, 10));
    }
}
