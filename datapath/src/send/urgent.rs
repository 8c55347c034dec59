//! The urgent path: single pages beside the bulk of them, over a link of its own.
//!
//! ```text
//!   bulk:    rest of the guest ─► queue ─► slots ─► lane 0..n ─┐ each page once, by the path that takes it first
//!   urgent:  one page ──────────────────► its own link ────────┘
//! ```
//!
//! Post-copy needs this: the guest runs on the target already, and waits for one page while the others are on their way. A page
//! that is urgent waits behind no page that is only queued; it cannot overtake what a lane has taken into its slots, at
//! most [`SEND_SLOTS`](crate::limits::SEND_SLOTS) records and what the link holds.
//!
//! *Order*: the path may be opened only while the guest is paused here for good, and opening it waits until everything older is
//! through. From then on each page is taken by exactly one path, and sent by it once: so no older copy can come after a newer
//! one, whichever link is faster, and nothing that came late overwrites what the guest wrote on the target meanwhile. What
//! must never happen: a page that was urgent sent again by a lane.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::lane::{Batch, Order};
use super::{Compression, LaneTotals, SendPlan, Sender};
use crate::error::DataError;
use crate::lane::LaneEnd;
use crate::layout::RamLayout;
use crate::limits::{CREDIT_BYTES, URGENT_SLOT_BYTES, URGENT_SLOTS};
use crate::link::LinkPlan;
use crate::meter::Meter;
use crate::page::{ChunkIndex, PageIndex};
use crate::page_set::PageSet;

/// The buffers of the urgent path's link: a page each.
const URGENT_LINK: LinkPlan =
    LinkPlan { send_slots: URGENT_SLOTS, slot_bytes: URGENT_SLOT_BYTES, receive_bytes: CREDIT_BYTES };

/// Which pages a path has taken: a word a chunk, for all threads.
pub(crate) struct Taken(Vec<AtomicU64>);

impl Taken {
    fn none(layout: &RamLayout) -> Taken {
        Taken((0..layout.chunk_count()).map(|_| AtomicU64::new(0)).collect())
    }

    /// Takes what is left of these pages: they are the caller's to send, and nobody else's.
    pub(crate) fn take(&self, chunk: ChunkIndex, pages: u64) -> u64 {
        let word = usize::try_from(chunk.0).ok().and_then(|at| self.0.get(at));
        word.map_or(0, |word| pages & !word.fetch_or(pages, Ordering::AcqRel))
    }
}

/// The urgent path, made by [`Sender::open_urgent`].
pub struct UrgentSender {
    path: Sender,
    taken: Arc<Taken>,
}

impl Sender {
    /// Opens the urgent path over a link of its own, once everything sent so far is through. The guest must be paused, and must
    /// not run here again while this transfer lasts. From now on only [`Sender::send_rest`] sends pages on the lanes.
    pub fn open_urgent(&mut self, end: LaneEnd) -> Result<UrgentSender, DataError> {
        self.flush()?;
        let plan = SendPlan {
            cipher: self.cipher,
            compression: Compression::Off,
            keep_hashes: false,
            rate_limit: None,
        };
        let path = Sender::start_on(Arc::clone(&self.ram), vec![end], plan, URGENT_LINK)?;
        let taken = Arc::new(Taken::none(self.ram.layout()));
        self.taken = Some(Arc::clone(&taken));
        Ok(UrgentSender { path, taken })
    }

    /// Sends those pages of a set that neither this nor the urgent path has sent since the latter was opened; `go_on` as for
    /// [`Sender::send`]. Whether a page is left is looked at when its lane comes to it.
    pub fn send_rest(&mut self, pages: &PageSet, go_on: &mut dyn FnMut() -> bool) -> Result<bool, DataError> {
        let Some(taken) = self.taken.clone() else {
            return Err(DataError::Bug("the rest was sent before the urgent path was opened"));
        };
        self.deal(pages, |batch| Order::Rest(batch, Arc::clone(&taken)), go_on)
    }
}

impl UrgentSender {
    /// Sends a page at once. `Ok(false)` when a lane has taken it already: then it is on its way, or there.
    pub fn send(&mut self, page: PageIndex) -> Result<bool, DataError> {
        let (chunk, bit) = (page.chunk(), 1 << page.bit());
        if self.path.ram.layout().valid_pages(chunk) & bit == 0 {
            return Err(DataError::Bug("an urgent page is none of the guest's"));
        }
        if self.taken.take(chunk, bit) == 0 {
            return Ok(false);
        }
        let mut batch = Batch::EMPTY;
        batch.push(chunk, bit);
        self.path.order(0, Order::Pages(batch), &mut || true)
    }

    /// Returns when the receiver has taken in every urgent page.
    pub fn flush(&mut self) -> Result<(), DataError> {
        self.path.flush()
    }

    /// Ends the path, and gives what it carried.
    pub fn finish(&mut self) -> Result<Vec<LaneTotals>, DataError> {
        self.path.finish()
    }

    /// What was sent on it so far.
    pub fn meter(&self) -> Meter {
        self.path.meter()
    }

    /// Its failure, if it failed.
    pub fn failure(&self) -> Option<DataError> {
        self.path.failure()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::empty_ram;

    #[test]
    fn each_page_is_taken_once_whoever_comes_first() {
        let taken = Taken::none(empty_ram(&[128]).layout());
        assert_eq!(taken.take(ChunkIndex(1), 0b0110), 0b0110);
        assert_eq!(taken.take(ChunkIndex(1), 0b1111), 0b1001);
        assert_eq!(taken.take(ChunkIndex(1), 0b1111), 0);
        assert_eq!(taken.take(ChunkIndex(9), 0b1111), 0, "no such chunk");
    }
}
