//! What a lane in direct mode must remember: which pages it told to be zero, and was not yet answered.
//!
//! ```text
//!   record «page 7 is zero» ──► ring ──► target zeroes page 7      (when it gets there)
//!   WRITE page 7 ──► guest memory                                  (at once)
//! ```
//!
//! The write overtakes the record, and the record would then wipe out the newer page. So a page that was told to be
//! zero is not written before the target has said that it took in that record. What must never happen: a page placed
//! while a zero for it is on its way.

use crate::page::ChunkIndex;

/// The pages of one lane that were told to be zero since the last full answer.
pub(super) struct ToldZero {
    /// One word for each of the lane's chunks.
    words: Vec<u64>,
    lanes: u64,
    any: bool,
}

impl ToldZero {
    /// For a lane of so many, of a guest of so many chunks; none where nothing is ever placed.
    pub(super) fn new(places: bool, chunks: u64, lanes: u64) -> ToldZero {
        let mine = if places { usize::try_from(chunks.div_ceil(lanes.max(1))).unwrap_or(0) } else { 0 };
        ToldZero { words: vec![0; mine], lanes: lanes.max(1), any: false }
    }

    fn word(&mut self, chunk: ChunkIndex) -> Option<&mut u64> {
        self.words.get_mut(usize::try_from(chunk.0 / self.lanes).ok()?)
    }

    /// These pages were told to be zero.
    pub(super) fn add(&mut self, chunk: ChunkIndex, pages: u64) {
        if let Some(word) = self.word(chunk).filter(|_| pages != 0) {
            *word |= pages;
            self.any = true;
        }
    }

    /// Whether one of these pages may not be written yet.
    pub(super) fn holds(&mut self, chunk: ChunkIndex, pages: u64) -> bool {
        self.any && self.word(chunk).is_some_and(|word| *word & pages != 0)
    }

    /// The target has taken in everything.
    pub(super) fn clear(&mut self) {
        self.words.fill(0);
        self.any = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_told_pages_are_held_until_the_answer() {
        let mut told = ToldZero::new(true, 10, 3);
        told.add(ChunkIndex(4), 0b1100);
        assert!(told.holds(ChunkIndex(4), 0b0110) && !told.holds(ChunkIndex(4), 0b0011));
        assert!(!told.holds(ChunkIndex(7), u64::MAX), "another chunk of the same lane");
        told.clear();
        assert!(!told.holds(ChunkIndex(4), u64::MAX));
        let mut off = ToldZero::new(false, 10, 3);
        off.add(ChunkIndex(4), 1);
        assert!(!off.holds(ChunkIndex(4), 1));
    }
}
