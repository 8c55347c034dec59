//! Pages that an O_DIRECT read may still be writing.
//!
//! The kernel marks a page dirty when such a read *pins* it, and writes it later: a scan in between clears the mark
//! too early, and the write that follows is not seen. So for guests with such disks every page that was seen dirty
//! within the horizon is looked at again in the blackout, when `stop` has drained all I/O, and sent again where it
//! differs from what was sent.
//!
//! ```text
//!   scans:   …  |  old  |  young  | now      a page leaves after one to two half horizons
//! ```
//!
//! What must never happen: a page dropped while an I/O that was in flight when it was seen may still run. The bound on
//! that is [`IO_HORIZON`]: block layers give up on a request after 30 s by default.

use std::time::Duration;

use vmferry_datapath::PageSet;

/// The longest that a disk read is assumed to be in flight.
const IO_HORIZON: Duration = Duration::from_secs(30);

/// Two generations of pages that were seen dirty.
pub(super) struct IoHorizon {
    old: PageSet,
    young: PageSet,
    turned: Duration,
}

impl IoHorizon {
    /// Nothing seen yet.
    #[must_use]
    pub(super) fn new(chunks: u64) -> Self {
        Self {
            old: PageSet::with_chunks(chunks),
            young: PageSet::with_chunks(chunks),
            turned: Duration::ZERO,
        }
    }

    /// Adds what a scan at `now` found.
    pub(super) fn saw(&mut self, dirty: &PageSet, now: Duration) {
        if now.saturating_sub(self.turned) >= IO_HORIZON {
            std::mem::swap(&mut self.old, &mut self.young);
            self.young.clear();
            self.turned = now;
        }
        self.young.union_with(dirty);
    }

    /// Every page that a read may have written unseen.
    #[must_use]
    pub(super) fn suspects(&self) -> PageSet {
        let mut suspects = self.old.clone();
        suspects.union_with(&self.young);
        suspects
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmferry_datapath::{PageCount, PageIndex};

    fn page(number: u64) -> PageSet {
        let mut set = PageSet::with_chunks(1);
        set.insert_range(PageIndex(number), PageCount(1));
        set
    }

    #[test]
    fn a_page_stays_at_least_one_horizon_and_then_goes() {
        let mut horizon = IoHorizon::new(1);
        horizon.saw(&page(1), Duration::from_secs(29));
        horizon.saw(&page(2), Duration::from_secs(30));
        assert!(horizon.suspects().contains(PageIndex(1)), "seen a second ago");
        horizon.saw(&page(3), Duration::from_secs(59));
        assert!(horizon.suspects().contains(PageIndex(1)), "seen exactly a horizon ago");
        horizon.saw(&page(3), Duration::from_secs(91));
        assert!(!horizon.suspects().contains(PageIndex(1)));
        assert!(horizon.suspects().contains(PageIndex(3)));
    }
}
