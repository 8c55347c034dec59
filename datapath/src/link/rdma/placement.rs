//! Direct mode: the target's memory, open to the source's card region by region.
//!
//! ```text
//!   source ── Want(region) ──► target registers 4 MiB of its guest, once for all lanes
//!          ◄─ Region(where, key) ──
//!          ── WRITE pages ──► guest memory    ── record: «these pages lie there» ──► ring
//! ```
//!
//! A region is registered when the first page of it comes: what stays empty is neither locked nor allocated. Where the
//! card faults pages in by itself (on-demand paging), nothing is locked.
//!
//! The source's guest is *not* registered: its pages are copied into a slot as they are read. A card holds on to the
//! page that it once looked up; a guest that gives memory back (a balloon, free page reporting) and gets another page in
//! its place would be sent as it was before. A copy through the page table cannot be wrong in that way, and costs a tenth of
//! what sealing does.
//!
//! *Trust*: page bodies are neither encrypted nor authenticated by vmferry, only by the fabric, if it does so. Records
//! are sealed as ever, so counts, order and device state are authenticated. The source can write to any region that it
//! asked for, at any time, until the lanes are closed; so can whoever forges packets on the fabric. What must never
//! happen: a region open to a peer with whom direct mode was not agreed on both sides.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;

use super::cm::Connection;
use super::error::FIX_LOCKED;
use super::verbs::{Key, Reach};
use super::wire::Window;
use super::{Mode, Posted, RdmaLink, SENDS_RESERVED};
use crate::guest_ram::{GuestRam, runs};
use crate::limits::{RDMA_REGION_BYTES, RDMA_SENDS};
use crate::link::LinkTrouble;
use crate::page::{CHUNK_BYTES, ChunkIndex, PAGE_BYTES};

/// The target's guest, as the lanes of one transfer open it to the source.
pub struct OpenRam {
    ram: Arc<GuestRam>,
    regions: Regions,
    held: Mutex<Held>,
}

/// What is registered. The keys go before the connection that they were made on.
#[derive(Default)]
struct Held {
    keys: HashMap<u32, Key>,
    on_demand: bool,
    keeper: Option<Arc<Connection>>,
}

impl OpenRam {
    /// Opens nothing yet.
    #[must_use]
    pub fn new(ram: Arc<GuestRam>) -> Arc<OpenRam> {
        let regions = Regions::of(&ram);
        Arc::new(OpenRam { ram, regions, held: Mutex::default() })
    }

    /// Opens a region to the peer of `connection`; the same window for every lane. `None` when there is no such region.
    pub(super) fn open(&self, connection: &Arc<Connection>, region: u32) -> Result<Option<Window>, Errno> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let first = held.keeper.is_none();
        if first {
            held.on_demand = connection.writes_on_demand();
        }
        let keeper = Arc::clone(held.keeper.get_or_insert_with(|| Arc::clone(connection)));
        if !keeper.queue_pair.shares_keys_with(&connection.queue_pair) {
            // Lanes over two cards: a key of one is none of the other.
            return Err(Errno::XDEV);
        }
        if let Some(key) = held.keys.get(&region) {
            return Ok(Some(key.window()));
        }
        let Some((block, at, len)) = self.regions.locate(region) else { return Ok(None) };
        let Some(range) = self.ram.span(block, at, len) else { return Ok(None) };
        let reach = if held.on_demand { Reach::PeerWritesOnDemand } else { Reach::PeerWrites };
        let key = Key::of_guest(&keeper.queue_pair, &range, reach)?;
        let window = key.window();
        held.keys.insert(region, key);
        Ok(Some(window))
    }

    /// Regions that are open.
    #[must_use]
    pub fn opened(&self) -> usize {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).keys.len()
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
    /// A region that was asked for, and where it is once that was told.
    windows: HashMap<u32, Option<Window>>,
}

/// Where a chunk's pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// To this address, under this key.
    There(u64, u32),
    /// Its region must be asked for.
    Ask(u32),
    /// It was asked for.
    Soon,
    /// The guest has no such chunk.
    Nowhere,
}

impl Placer {
    pub(super) fn new(ram: Arc<GuestRam>) -> Placer {
        let regions = Regions::of(&ram);
        Placer { ram, regions, windows: HashMap::new() }
    }

    /// Where the first page of a chunk goes. A region that must be asked for counts as asked for.
    pub(super) fn place_of(&mut self, chunk: ChunkIndex) -> Place {
        let Some((region, offset)) = self.regions.of_chunk(&self.ram, chunk) else { return Place::Nowhere };
        match self.windows.get(&region) {
            Some(Some(window)) => Place::There(window.address.saturating_add(offset), window.key),
            Some(None) => Place::Soon,
            None => {
                self.windows.insert(region, None);
                Place::Ask(region)
            }
        }
    }

    /// The target says where a region is; `false` when it was not asked for, or is not as long as it must be.
    pub(super) fn told(&mut self, region: u32, window: Window) -> bool {
        let wanted = self.regions.locate(region).map(|(_, _, len)| len as u64);
        match self.windows.get_mut(&region) {
            Some(place @ None) if wanted == Some(window.len) => {
                *place = Some(window);
                true
            }
            Some(_) | None => false,
        }
    }
}

impl RdmaLink {
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
        address: u64,
        key: u32,
    ) -> Result<bool, Errno> {
        let runs_count = runs(pages).count();
        let Some(slot) = self.spare_slot().filter(|_| {
            self.posted.len() + runs_count + SENDS_RESERVED <= RDMA_SENDS && self.established && !self.over
        }) else {
            return Ok(false);
        };
        let (Mode::Placing(placer), Some(buffers)) = (&self.mode, self.buffers.as_mut()) else {
            return Err(Errno::INVAL);
        };
        let start = slot * buffers.slot_bytes;
        placer.ram.gather(chunk, pages, buffers.slots.bytes_mut(start, buffers.slot_bytes));
        let mut at = start;
        for (first, count) in runs(pages) {
            let len = count as usize * PAGE_BYTES;
            let piece = buffers.slots.key().piece(at, len);
            let there = address + u64::from(first) * PAGE_BYTES as u64;
            self.connection.queue_pair.post_write(Some(piece), there, key, None)?;
            self.posted.push_back(Posted::Placed(slot));
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
    fn a_region_is_asked_for_once_and_believed_once() {
        let ram = Arc::new(empty_ram(&[1, 64 * 20]));
        let mut placer = Placer::new(ram);
        // Chunk 0 is the tiny block; chunk 18 is the 18th of the second block's, in its second region.
        assert_eq!(placer.place_of(ChunkIndex(18)), Place::Ask(2));
        assert_eq!(placer.place_of(ChunkIndex(18)), Place::Soon);
        assert_eq!(placer.place_of(ChunkIndex(99)), Place::Nowhere);
        let window = Window { address: 0x1000_0000, key: 5, len: MIB };
        assert!(!placer.told(1, window), "nobody asked");
        assert!(!placer.told(2, Window { len: 2 * MIB, ..window }), "too long");
        assert!(placer.told(2, window));
        assert!(!placer.told(2, window), "a region does not move");
        assert_eq!(placer.place_of(ChunkIndex(18)), Place::There(0x1000_0000 + 262_144, 5));
    }
}
