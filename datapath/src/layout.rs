//! The flat page space: a guest's RAM blocks one after the other, each starting on a chunk boundary.
//!
//! ```text
//!   block 0: 5 pages     block 1: 70 pages
//!   |chunk 0 .........|  |chunk 1 .........|chunk 2 .........|
//!    ^5 valid pages       ^64 valid pages   ^6 valid pages
//! ```
//!
//! A chunk never crosses a block, so one word of a page set, one record on the wire and one contiguous piece of
//! guest memory are always the same 64 pages. What must never happen: two hosts that read a layout differently.
//! It is therefore a pure function of the list of blocks, and the list is validated when it comes off the wire.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::page::{ByteLen, CHUNK_PAGES, ChunkIndex, PAGE_BYTES, PageIndex};

/// The most RAM blocks a guest may have.
pub const RAM_BLOCKS_MAX: usize = 64;
/// The longest name of a RAM block, in bytes.
pub const BLOCK_NAME_BYTES_MAX: usize = 255;
/// The most RAM a guest may have, all blocks together.
pub const RAM_BYTES_MAX: u64 = 64 << 40;

/// One block of guest RAM: one contiguous piece of one file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RamBlock {
    /// The VMM's name for it, the same on both hosts.
    pub name: String,
    /// Its length, a multiple of 4096.
    pub len: ByteLen,
    /// The page size of the memory behind it: 4096, or 2 MiB and up for huge pages.
    pub page_bytes: u32,
}

/// The list of a guest's RAM blocks, and the flat page space that follows from it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "SavedLayout", into = "SavedLayout")]
pub struct RamLayout {
    blocks: Vec<RamBlock>,
    /// The first chunk of each block, and behind them the number of chunks in all.
    first_chunks: Vec<u64>,
}

/// What a layout looks like on the wire: only the blocks, everything else follows.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedLayout {
    blocks: Vec<RamBlock>,
}

/// Why a list of blocks is no layout.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// No block at all.
    #[error("the guest has no RAM block; attach to a guest whose memory backend is shared")]
    NoBlocks,
    /// More blocks than [`RAM_BLOCKS_MAX`].
    #[error("the guest has {count} RAM blocks, more than {RAM_BLOCKS_MAX}; merge its memory backends")]
    TooManyBlocks {
        /// How many there were.
        count: usize,
    },
    /// A block without a name, or with an endless one.
    #[error("a RAM block's name has {bytes} bytes; it needs 1 to {BLOCK_NAME_BYTES_MAX}")]
    BadName {
        /// The length of the name.
        bytes: usize,
    },
    /// Two blocks of one name.
    #[error("two RAM blocks are named `{name}`; give each memory backend its own id")]
    SameName {
        /// The name.
        name: String,
    },
    /// A block of no pages, or with a part of one.
    #[error("RAM block `{name}` has {len} bytes; it must be a multiple of 4096 and not zero")]
    BadLength {
        /// The block.
        name: String,
        /// Its length.
        len: ByteLen,
    },
    /// A page size that is not a power of two from 4096 up.
    #[error("RAM block `{name}` has pages of {page_bytes} bytes; they must be a power of two from 4096 up")]
    BadPageSize {
        /// The block.
        name: String,
        /// Its page size.
        page_bytes: u32,
    },
    /// More RAM than [`RAM_BYTES_MAX`].
    #[error("the guest's RAM is larger than {RAM_BYTES_MAX} bytes")]
    TooLarge,
}

impl RamLayout {
    /// Lays the blocks out, in the order given.
    pub fn new(blocks: Vec<RamBlock>) -> Result<RamLayout, LayoutError> {
        if blocks.is_empty() {
            return Err(LayoutError::NoBlocks);
        }
        if blocks.len() > RAM_BLOCKS_MAX {
            return Err(LayoutError::TooManyBlocks { count: blocks.len() });
        }
        let mut first_chunks = Vec::with_capacity(blocks.len() + 1);
        let (mut chunks, mut bytes) = (0_u64, ByteLen(0));
        for (number, block) in blocks.iter().enumerate() {
            check_block(block)?;
            if blocks[..number].iter().any(|earlier| earlier.name == block.name) {
                return Err(LayoutError::SameName { name: block.name.clone() });
            }
            bytes = bytes.plus(block.len);
            if bytes.0 > RAM_BYTES_MAX {
                return Err(LayoutError::TooLarge);
            }
            first_chunks.push(chunks);
            chunks += block.len.chunks_ceil();
        }
        first_chunks.push(chunks);
        Ok(RamLayout { blocks, first_chunks })
    }

    /// The blocks, in order.
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// How many chunks the flat page space has.
    pub fn chunk_count(&self) -> u64 {
        self.first_chunks.last().copied().unwrap_or(0)
    }

    /// The bytes of all blocks, padding not counted.
    pub fn total_bytes(&self) -> ByteLen {
        self.blocks.iter().fold(ByteLen(0), |sum, block| sum.plus(block.len))
    }

    /// The first page of a block; a number past the last block gives the end of the page space.
    pub fn first_page(&self, block_no: usize) -> PageIndex {
        let chunk = self.first_chunks.get(block_no).copied().unwrap_or_else(|| self.chunk_count());
        ChunkIndex(chunk).first_page()
    }

    /// One bit for each page of the chunk that exists: all 64, except in the last chunk of a block.
    pub fn valid_pages(&self, chunk: ChunkIndex) -> u64 {
        let Some((block_no, offset)) = self.locate(chunk) else { return 0 };
        let left = self.blocks[block_no].len.minus(ByteLen(offset)).pages_ceil().0;
        if left >= CHUNK_PAGES as u64 { u64::MAX } else { (1 << left) - 1 }
    }

    /// The block that holds a chunk, and the chunk's byte offset in it; `None` past the end.
    pub fn locate(&self, chunk: ChunkIndex) -> Option<(usize, u64)> {
        if chunk.0 >= self.chunk_count() {
            return None;
        }
        let block_no = self.first_chunks.partition_point(|&first| first <= chunk.0).checked_sub(1)?;
        let within = ChunkIndex(chunk.0 - self.first_chunks[block_no]);
        Some((block_no, within.first_page().0 * PAGE_BYTES as u64))
    }
}

fn check_block(block: &RamBlock) -> Result<(), LayoutError> {
    let name = || block.name.clone();
    if block.name.is_empty() || block.name.len() > BLOCK_NAME_BYTES_MAX {
        return Err(LayoutError::BadName { bytes: block.name.len() });
    }
    if block.len.0 == 0 || !block.len.0.is_multiple_of(PAGE_BYTES as u64) {
        return Err(LayoutError::BadLength { name: name(), len: block.len });
    }
    if !block.page_bytes.is_power_of_two() || (block.page_bytes as usize) < PAGE_BYTES {
        return Err(LayoutError::BadPageSize { name: name(), page_bytes: block.page_bytes });
    }
    Ok(())
}

impl TryFrom<SavedLayout> for RamLayout {
    type Error = LayoutError;

    fn try_from(saved: SavedLayout) -> Result<RamLayout, LayoutError> {
        RamLayout::new(saved.blocks)
    }
}

impl From<RamLayout> for SavedLayout {
    fn from(layout: RamLayout) -> SavedLayout {
        SavedLayout { blocks: layout.blocks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(name: &str, len: u64) -> RamBlock {
        RamBlock { name: name.into(), len: ByteLen(len), page_bytes: 4096 }
    }

    #[test]
    fn a_chunk_never_crosses_a_block() {
        let layout = RamLayout::new(vec![block("a", 5 * 4096), block("b", 70 * 4096)]).unwrap();
        assert_eq!(layout.chunk_count(), 3);
        assert_eq!(layout.first_page(1), PageIndex(64));
        assert_eq!(layout.valid_pages(ChunkIndex(0)), 0b11111);
        assert_eq!(layout.valid_pages(ChunkIndex(1)), u64::MAX);
        assert_eq!(layout.valid_pages(ChunkIndex(2)), 0b11_1111);
        assert_eq!(layout.valid_pages(ChunkIndex(3)), 0);
        assert_eq!(layout.locate(ChunkIndex(0)), Some((0, 0)));
        assert_eq!(layout.locate(ChunkIndex(2)), Some((1, 262_144)));
        assert_eq!(layout.locate(ChunkIndex(3)), None);
        assert_eq!(layout.total_bytes(), ByteLen(75 * 4096));
    }

    #[test]
    fn a_bad_list_is_refused_by_name() {
        assert_eq!(RamLayout::new(vec![]), Err(LayoutError::NoBlocks));
        assert!(matches!(RamLayout::new(vec![block("a", 4097)]), Err(LayoutError::BadLength { .. })));
        assert!(matches!(
            RamLayout::new(vec![block("a", 4096), block("a", 4096)]),
            Err(LayoutError::SameName { .. })
        ));
        assert!(matches!(RamLayout::new(vec![block("", 4096)]), Err(LayoutError::BadName { .. })));
        let odd = RamBlock { page_bytes: 5000, ..block("a", 4096) };
        assert!(matches!(RamLayout::new(vec![odd]), Err(LayoutError::BadPageSize { .. })));
        let halves = vec![block("a", RAM_BYTES_MAX), block("b", 4096)];
        assert_eq!(RamLayout::new(halves), Err(LayoutError::TooLarge));
        let many = (0..=RAM_BLOCKS_MAX).map(|n| block(&n.to_string(), 4096)).collect();
        assert!(matches!(RamLayout::new(many), Err(LayoutError::TooManyBlocks { .. })));
    }

    #[test]
    fn the_wire_is_validated_like_everyone_else() {
        let layout = RamLayout::new(vec![block("ram0", 8192)]).unwrap();
        let text = serde_json::to_string(&layout).unwrap();
        assert_eq!(text, r#"{"blocks":[{"name":"ram0","len":8192,"page_bytes":4096}]}"#);
        assert_eq!(serde_json::from_str::<RamLayout>(&text).unwrap(), layout);
        let short = text.replace("8192", "8193");
        assert!(serde_json::from_str::<RamLayout>(&short).is_err());
    }
}
