//! Hot pages are held back: two bits a page.
//!
//! A page that is dirty in two rounds running will be dirty again before its copy is of any use. It is held, and
//! travels when it cools down or in the last round.
//!
//! ```text
//!   D = dirty now, P = dirty in the round before, H = held
//!   send = (D | H) & !(D & P)        H' = D & P
//! ```
//!
//! What must never happen: a page in neither `send` nor `H'` that was in `D` or `H`. The formulas leave no such
//! page, and a test tries.

use crate::page::PageCount;
use crate::page_set::PageSet;

/// Remembers which pages were dirty last round and which are held back.
#[derive(Debug)]
pub struct HotLedger {
    before: PageSet,
    held: PageSet,
}

impl HotLedger {
    /// A ledger for a page space of so many chunks.
    pub fn with_chunks(chunks: u64) -> HotLedger {
        HotLedger { before: PageSet::with_chunks(chunks), held: PageSet::with_chunks(chunks) }
    }

    /// Takes this round's dirty pages and gives the pages to send.
    pub fn advance(&mut self, mut dirty: PageSet) -> PageSet {
        let pasts = self.before.words_mut().iter_mut().zip(self.held.words_mut());
        for (now, (before, held)) in dirty.words_mut().iter_mut().zip(pasts) {
            let hot = *now & *before;
            let send = (*now | *held) & !hot;
            *before = *now;
            *held = hot;
            *now = send;
        }
        dirty
    }

    /// How many pages are held back.
    pub fn held_count(&self) -> PageCount {
        self.held.count()
    }

    /// The held pages, for the last round; none is held afterwards.
    pub fn take_all(&mut self) -> PageSet {
        let empty = PageSet::with_chunks(self.held.chunk_count());
        std::mem::replace(&mut self.held, empty)
    }

    /// Pages whose sending failed: they are held, so that the next round or the last one sends them.
    pub fn put_back(&mut self, pages: &PageSet) {
        self.held.union_with(pages);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::ChunkIndex;

    fn set(word: u64) -> PageSet {
        let mut set = PageSet::with_chunks(1);
        set.set_word(ChunkIndex(0), word);
        set
    }

    #[test]
    fn a_page_dirty_twice_running_waits_until_it_cools() {
        let mut ledger = HotLedger::with_chunks(1);
        assert_eq!(ledger.advance(set(0b01)), set(0b01));
        assert_eq!(ledger.advance(set(0b11)), set(0b10), "page 0 is hot now");
        assert_eq!(ledger.held_count(), PageCount(1));
        assert_eq!(ledger.advance(set(0)), set(0b01), "page 0 cooled");
        assert_eq!(ledger.held_count(), PageCount(0));
    }

    proptest! {
        #[test]
        fn every_write_is_sent_after_it_happened(rounds in prop::collection::vec(any::<u64>(), 1..12)) {
            let mut ledger = HotLedger::with_chunks(1);
            let mut owed = 0;
            for dirty in rounds {
                owed |= dirty;
                owed &= !ledger.advance(set(dirty)).word(ChunkIndex(0));
            }
            prop_assert_eq!(ledger.take_all().word(ChunkIndex(0)), owed);
        }
    }
}
