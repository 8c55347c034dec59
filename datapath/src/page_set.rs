//! A set of pages: one `u64` word for each chunk of the flat page space.
//!
//! This is the only container that grows with the guest: one bit a page, 128 KiB for 4 GiB. Its size is fixed when
//! it is made; a page past the end is left out, never an allocation and never a panic.

use std::fmt;

use crate::guest_ram::runs;
use crate::layout::RamLayout;
use crate::page::{CHUNK_PAGES, ChunkIndex, PageCount, PageIndex};

/// A set of pages of one [`RamLayout`].
#[derive(Clone, PartialEq, Eq, Default)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// The empty set over a layout.
    pub fn new(layout: &RamLayout) -> PageSet {
        PageSet::with_chunks(layout.chunk_count())
    }

    /// The empty set over so many chunks.
    pub fn with_chunks(chunks: u64) -> PageSet {
        PageSet { words: vec![0; index(chunks)] }
    }

    /// Every page that exists in a layout.
    pub fn full(layout: &RamLayout) -> PageSet {
        PageSet { words: (0..layout.chunk_count()).map(|c| layout.valid_pages(ChunkIndex(c))).collect() }
    }

    /// How many chunks the set spans.
    pub fn chunk_count(&self) -> u64 {
        self.words.len() as u64
    }

    /// Adds a range of pages; what lies past the end is left out.
    pub fn insert_range(&mut self, first: PageIndex, count: PageCount) {
        let end = first.plus(count).0.min(self.chunk_count() * CHUNK_PAGES as u64);
        let mut page = first.0;
        while page < end {
            let bit = page % 64;
            let here = (64 - bit).min(end - page);
            let run = if here == 64 { u64::MAX } else { ((1 << here) - 1) << bit };
            self.words[index(page / 64)] |= run;
            page += here;
        }
    }

    /// Adds pages given as words of 64, bit n of word m being page `first + 64 m + n`; what lies past the end is left out.
    pub fn insert_words(&mut self, first: PageIndex, words: &[u64]) {
        for (word, number) in words.iter().zip(0_u64..).filter(|(word, _)| **word != 0) {
            for (start, count) in runs(*word) {
                let page = first.plus(PageCount(number * 64 + u64::from(start)));
                self.insert_range(page, PageCount(u64::from(count)));
            }
        }
    }

    /// Whether a page is in the set.
    pub fn contains(&self, page: PageIndex) -> bool {
        self.word(page.chunk()) >> page.bit() & 1 == 1
    }

    /// The word of a chunk: bit n is its page n. Zero past the end.
    pub fn word(&self, chunk: ChunkIndex) -> u64 {
        self.words.get(index(chunk.0)).copied().unwrap_or(0)
    }

    /// Replaces the word of a chunk; past the end nothing happens.
    pub fn set_word(&mut self, chunk: ChunkIndex, word: u64) {
        if let Some(place) = self.words.get_mut(index(chunk.0)) {
            *place = word;
        }
    }

    /// Takes the word of a chunk out of the set.
    pub fn take_word(&mut self, chunk: ChunkIndex) -> u64 {
        self.words.get_mut(index(chunk.0)).map_or(0, std::mem::take)
    }

    /// Adds every page of `other`.
    pub fn union_with(&mut self, other: &PageSet) {
        self.words.iter_mut().zip(&other.words).for_each(|(mine, theirs)| *mine |= theirs);
    }

    /// Takes out every page of `other`.
    pub fn subtract(&mut self, other: &PageSet) {
        self.words.iter_mut().zip(&other.words).for_each(|(mine, theirs)| *mine &= !theirs);
    }

    /// Keeps only the pages of `other`; what `other` does not span is taken out.
    pub fn intersect_with(&mut self, other: &PageSet) {
        let theirs = other.words.iter().copied().chain(std::iter::repeat(0));
        self.words.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine &= theirs);
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// How many pages are in the set.
    pub fn count(&self) -> PageCount {
        PageCount(self.words.iter().map(|word| u64::from(word.count_ones())).sum())
    }

    /// Every chunk that has a page in the set, with its word.
    pub fn iter_chunks(&self) -> impl Iterator<Item = (ChunkIndex, u64)> + '_ {
        let numbered = self.words.iter().enumerate();
        numbered.filter(|(_, word)| **word != 0).map(|(chunk, word)| (ChunkIndex(chunk as u64), *word))
    }

    /// Takes every page out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The words, one for each chunk.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// The words, to be changed in place.
    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }
}

impl fmt::Debug for PageSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSet({} pages in {} chunks)", self.count(), self.words.len())
    }
}

/// A chunk's place in the vector. This crate runs on 64-bit hosts only; elsewhere the place is past any end.
fn index(chunk: u64) -> usize {
    usize::try_from(chunk).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn past_the_end_is_left_out() {
        let mut set = PageSet::with_chunks(2);
        set.insert_range(PageIndex(120), PageCount(u64::MAX));
        assert_eq!(set.count(), PageCount(8));
        set.insert_range(PageIndex(u64::MAX), PageCount(1));
        assert_eq!(set.count(), PageCount(8));
        assert_eq!(set.word(ChunkIndex(7)), 0);
        assert_eq!(set.take_word(ChunkIndex(1)), 0xff << 56);
        assert!(set.is_empty());
    }

    #[test]
    fn words_land_where_they_begin() {
        for first in [0, 64, 70] {
            let mut set = PageSet::with_chunks(5);
            set.insert_words(PageIndex(first), &[1 | 1 << 63, 0, u64::MAX]);
            let found: Vec<u64> = (0..320).filter(|page| set.contains(PageIndex(*page))).collect();
            let wanted: Vec<u64> = [0, 63].into_iter().chain(128..192).map(|page| page + first).collect();
            assert_eq!(found, wanted, "words that begin at page {first}");
        }
    }

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(
            ranges in prop::collection::vec((0_u64..400, 0_u64..150), 0..12),
            others in prop::collection::vec((0_u64..400, 0_u64..150), 0..12),
        ) {
            let build = |ranges: &[(u64, u64)]| {
                let mut set = PageSet::with_chunks(5);
                let mut model = BTreeSet::new();
                for &(first, count) in ranges {
                    set.insert_range(PageIndex(first), PageCount(count));
                    model.extend((first..first + count).filter(|&page| page < 320));
                }
                (set, model)
            };
            let members = |set: &PageSet| (0..320).filter(|&p| set.contains(PageIndex(p))).collect::<BTreeSet<u64>>();
            let ((a, model_a), (b, model_b)) = (build(&ranges), build(&others));
            prop_assert_eq!(&members(&a), &model_a);
            prop_assert_eq!(a.count().0, model_a.len() as u64);
            let mut union = a.clone();
            union.union_with(&b);
            prop_assert_eq!(members(&union), &model_a | &model_b);
            let mut minus = a.clone();
            minus.subtract(&b);
            prop_assert_eq!(members(&minus), &model_a - &model_b);
            let mut both = a.clone();
            both.intersect_with(&b);
            prop_assert_eq!(members(&both), &model_a & &model_b);
        }
    }
}
