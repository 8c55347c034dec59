//! What one page must hold.
//!
//! ```text
//!   word 0..4      index, version, seed, check
//!   word 8n        head of line n: follows from index, version, seed     (a cache line of an older version shows)
//!   all others     follow from index and seed only                       (a page at a wrong place shows)
//! ```
//!
//! A new version therefore costs 67 stores, not 512: an emulated guest can still dirty memory faster than a link
//! carries it. Some versions are zero pages: data must turn into zero, and zero into data, across a move.

use crate::random::mix;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Words (u64) of a page.
pub const WORDS_PER_PAGE: usize = PAGE_BYTES / 8;
/// Words of a cache line, the smallest piece in which a page may tear.
pub(crate) const WORDS_PER_LINE: usize = 8;
/// Words of the header.
pub(crate) const HEADER_WORDS: usize = 4;

/// The content that follows from a page's index, its version and the plan's seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageImage {
    index: u64,
    version: u32,
    seed: u64,
    zero: bool,
    moving: u64,
    fixed: u64,
}

impl PageImage {
    /// The image of `version` of page `index`; `zero_permille` of all versions are zero pages, and so is version 0,
    /// which was never written.
    #[must_use]
    pub fn new(seed: u64, index: u64, version: u32, zero_permille: u16) -> Self {
        let fixed = mix(seed ^ mix(index));
        let moving = mix(fixed ^ (u64::from(version) << 20));
        let zero = version == 0 || moving % 1000 < u64::from(zero_permille);
        Self { index, version, seed, zero, moving, fixed }
    }

    /// True when every byte of the page is zero.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        self.zero
    }

    /// The word at place `word` of the page.
    #[must_use]
    #[inline]
    pub fn word(&self, word: usize) -> u64 {
        if self.zero {
            return 0;
        }
        match word {
            0 => self.index,
            1 => u64::from(self.version),
            2 => self.seed,
            3 => check(self.index, u64::from(self.version), self.seed),
            _ if word.is_multiple_of(WORDS_PER_LINE) => spread(self.moving, word),
            _ => spread(self.fixed, word),
        }
    }

    /// The version that a stored header claims, when its check word holds and it belongs to this page and seed.
    #[must_use]
    pub fn claimed_version(&self, header: [u64; HEADER_WORDS]) -> Option<u32> {
        let [index, version, seed, stored] = header;
        let own = index == self.index && seed == self.seed && stored == check(index, version, seed);
        if own { u32::try_from(version).ok() } else { None }
    }
}

fn check(index: u64, version: u64, seed: u64) -> u64 {
    mix(index ^ mix(version ^ mix(seed)))
}

/// Cheap and hard to compress: one multiplication, and the high half folded over the low.
#[inline]
fn spread(base: u64, word: usize) -> u64 {
    let product = base.wrapping_add(word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    product ^ (product >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_differ_in_every_line_and_only_there() {
        let (old, new) = (PageImage::new(7, 3, 1, 0), PageImage::new(7, 3, 2, 0));
        for word in HEADER_WORDS..WORDS_PER_PAGE {
            let differs = old.word(word) != new.word(word);
            assert_eq!(differs, word % WORDS_PER_LINE == 0, "word {word}");
        }
    }

    #[test]
    fn a_zero_share_of_all_is_all_zero_and_of_none_is_none() {
        for version in 1..200 {
            assert!(PageImage::new(1, 5, version, 1000).is_zero());
            assert!(!PageImage::new(1, 5, version, 0).is_zero());
        }
    }

    #[test]
    fn a_header_of_another_page_claims_nothing() {
        let here = PageImage::new(7, 3, 1, 0);
        let there = PageImage::new(7, 4, 9, 0);
        let header = |image: &PageImage| [0, 1, 2, 3].map(|word| image.word(word));
        assert_eq!(here.claimed_version(header(&here)), Some(1));
        assert_eq!(here.claimed_version(header(&there)), None);
    }
}
