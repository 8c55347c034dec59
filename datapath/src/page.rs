//! Pages, chunks and bytes are four different numbers.
//!
//! A migration counts pages, addresses pages, counts bytes and addresses chunks, all in `u64`, and the classic
//! bug of this field is to mix two of them. Each has its own type here, and every conversion has a name.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes in one page of the flat page space: the unit in which pages are tracked and sent.
pub const PAGE_BYTES: usize = 4096;
/// Pages in one chunk: one bit each of a `u64` word.
pub const CHUNK_PAGES: usize = 64;
/// Bytes in one chunk: the largest body of one record.
pub const CHUNK_BYTES: usize = PAGE_BYTES * CHUNK_PAGES;

const PAGE_BYTES_U64: u64 = 4096;
const CHUNK_PAGES_U64: u64 = 64;
const _: () = assert!(PAGE_BYTES == 4096 && CHUNK_PAGES == 64 && CHUNK_BYTES == 262_144);

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// The number of a page in the flat page space of a [`RamLayout`](crate::RamLayout).
    PageIndex
}
number! {
    /// How many pages.
    PageCount
}
number! {
    /// How many bytes.
    ByteLen
}
number! {
    /// The number of a chunk of 64 pages in the flat page space.
    ChunkIndex
}

impl PageIndex {
    /// The chunk that holds this page.
    pub const fn chunk(self) -> ChunkIndex {
        ChunkIndex(self.0 / CHUNK_PAGES_U64)
    }

    /// The bit of this page in its chunk's word, 0 to 63.
    pub const fn bit(self) -> u64 {
        self.0 % CHUNK_PAGES_U64
    }

    /// The page `count` pages further on, at most the last number there is.
    pub const fn plus(self, count: PageCount) -> PageIndex {
        PageIndex(self.0.saturating_add(count.0))
    }
}

impl ChunkIndex {
    /// The first page of this chunk.
    pub const fn first_page(self) -> PageIndex {
        PageIndex(self.0.saturating_mul(CHUNK_PAGES_U64))
    }
}

impl PageCount {
    /// The bytes that this many pages hold.
    pub const fn bytes(self) -> ByteLen {
        ByteLen(self.0.saturating_mul(PAGE_BYTES_U64))
    }

    /// The sum, at most the largest number there is.
    pub const fn plus(self, other: PageCount) -> PageCount {
        PageCount(self.0.saturating_add(other.0))
    }

    /// The difference, at least none.
    pub const fn minus(self, other: PageCount) -> PageCount {
        PageCount(self.0.saturating_sub(other.0))
    }
}

impl ByteLen {
    /// The pages that these bytes touch when they start on a page boundary.
    pub const fn pages_ceil(self) -> PageCount {
        PageCount(self.0.div_ceil(PAGE_BYTES_U64))
    }

    /// The chunks that these bytes touch when they start on a chunk boundary.
    pub const fn chunks_ceil(self) -> u64 {
        self.0.div_ceil(PAGE_BYTES_U64 * CHUNK_PAGES_U64)
    }

    /// The sum, at most the largest number there is.
    pub const fn plus(self, other: ByteLen) -> ByteLen {
        ByteLen(self.0.saturating_add(other.0))
    }

    /// The difference, at least none.
    pub const fn minus(self, other: ByteLen) -> ByteLen {
        ByteLen(self.0.saturating_sub(other.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_lies_in_its_chunk() {
        let page = PageIndex(130);
        assert_eq!((page.chunk(), page.bit()), (ChunkIndex(2), 2));
        assert_eq!(ChunkIndex(2).first_page(), PageIndex(128));
    }

    #[test]
    fn conversions_round_up_and_saturate() {
        assert_eq!(ByteLen(4097).pages_ceil(), PageCount(2));
        assert_eq!(PageCount(2).bytes(), ByteLen(8192));
        assert_eq!(PageCount(u64::MAX).bytes(), ByteLen(u64::MAX));
        assert_eq!(PageCount(1).minus(PageCount(2)), PageCount(0));
    }
}
