//! The digest of all guest memory, for `--verify`: equal on both hosts exactly when every page is.
//!
//! Each page is hashed by itself (XXH3, 128 bits); the hashes of a block, in order, are hashed by BLAKE3. A hole
//! has the hash of a zero page and is not read. The result does not depend on how many threads worked on it.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use crate::guest_ram::{GuestRam, RamError, bits};
use crate::layout::RamLayout;
use crate::page::{CHUNK_BYTES, CHUNK_PAGES, ChunkIndex, PAGE_BYTES};
use crate::page_set::PageSet;

/// The digest of one block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockDigest {
    /// The block's name.
    pub block: String,
    /// BLAKE3 over its pages' hashes, in hex.
    pub blake3: String,
}

/// The digests of all blocks, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RamDigest(pub Vec<BlockDigest>);

/// One line for all blocks, short enough for any message.
impl std::fmt::Display for RamDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut whole = blake3::Hasher::new();
        for block in &self.0 {
            whole.update(block.blake3.as_bytes());
        }
        write!(f, "{}", whole.finalize().to_hex())
    }
}

/// Chunks hashed in one go by one thread: 64 MiB of guest, 256 KiB of hashes.
const SPAN_CHUNKS: u64 = 256;
const LEAF_BYTES: usize = 16;

impl GuestRam {
    /// Hashes every page with `cpus` threads. Meaningful only while the guest is paused.
    pub fn digest(&self, cpus: usize) -> Result<RamDigest, RamError> {
        let populated = self.populated()?;
        let spans = spans(self.layout());
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            let mut scratch = vec![0; CHUNK_BYTES];
            let take = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|number| *number < spans.len());
            while let Some(number) = take() {
                done.push((number, self.hash_span(&spans[number], &populated, &mut scratch)));
            }
            done
        };
        let mut hashes = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..cpus.max(1)).map(|_| scope.spawn(work)).collect();
            threads
                .into_iter()
                .flat_map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
                .collect::<Vec<_>>()
        });
        hashes.sort_by_key(|(number, _)| *number);
        Ok(fold(self.layout(), &spans, &hashes))
    }

    fn hash_span(&self, span: &Span, populated: &PageSet, scratch: &mut [u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for chunk in (span.first..span.end).map(ChunkIndex) {
            let (leaves, len) = self.leaves(chunk, populated.word(chunk), scratch);
            hasher.update(&leaves[..len]);
        }
        hasher.finalize()
    }

    /// The hashes of one chunk's pages, and how many bytes of them count.
    fn leaves(
        &self,
        chunk: ChunkIndex,
        populated: u64,
        scratch: &mut [u8],
    ) -> ([u8; CHUNK_PAGES * LEAF_BYTES], usize) {
        let mut leaves = [0; CHUNK_PAGES * LEAF_BYTES];
        let valid = self.layout().valid_pages(chunk);
        let zero = xxh3_128(&[0; PAGE_BYTES]).to_le_bytes();
        leaves.chunks_exact_mut(LEAF_BYTES).for_each(|leaf| leaf.copy_from_slice(&zero));
        self.gather(chunk, populated, scratch);
        for (page, bit) in scratch.chunks_exact(PAGE_BYTES).zip(bits(populated & valid)) {
            let at = bit as usize * LEAF_BYTES;
            leaves[at..at + LEAF_BYTES].copy_from_slice(&xxh3_128(page).to_le_bytes());
        }
        (leaves, valid.count_ones() as usize * LEAF_BYTES)
    }
}

struct Span {
    block: usize,
    first: u64,
    end: u64,
}

fn spans(layout: &RamLayout) -> Vec<Span> {
    let mut spans = Vec::new();
    for block in 0..layout.blocks().len() {
        let (mut first, end) = (layout.first_page(block).chunk().0, layout.first_page(block + 1).chunk().0);
        while first < end {
            let stop = end.min(first + SPAN_CHUNKS);
            spans.push(Span { block, first, end: stop });
            first = stop;
        }
    }
    spans
}

fn fold(layout: &RamLayout, spans: &[Span], hashes: &[(usize, blake3::Hash)]) -> RamDigest {
    let mut blocks: Vec<blake3::Hasher> = layout.blocks().iter().map(|_| blake3::Hasher::new()).collect();
    for (number, hash) in hashes {
        blocks[spans[*number].block].update(hash.as_bytes());
    }
    let named = layout.blocks().iter().zip(blocks);
    let digest = |(block, hasher): (&crate::layout::RamBlock, blake3::Hasher)| BlockDigest {
        block: block.name.clone(),
        blake3: hasher.finalize().to_hex().to_string(),
    };
    RamDigest(named.map(digest).collect())
}

#[cfg(test)]
mod tests {
    use crate::page::{PAGE_BYTES, PageIndex};
    use crate::testing::{empty_ram, filled_ram, noise};

    #[test]
    fn it_follows_the_content_and_nothing_else() {
        let (one, two) = (filled_ram(4, 64 * 300 + 3), filled_ram(4, 64 * 300 + 3));
        let digest = one.digest(1).unwrap();
        assert_eq!(digest, two.digest(3).unwrap(), "the number of threads matters");
        let mut page = [0; PAGE_BYTES];
        two.read_page(PageIndex(64 * 300), &mut page).unwrap();
        page[4095] ^= 1;
        two.write_page(PageIndex(64 * 300), &page).unwrap();
        assert_ne!(digest, two.digest(1).unwrap(), "one bit of one page is not seen");
    }

    #[test]
    fn a_hole_is_a_zero_page_and_stays_a_hole() {
        let (hole, zero) = (empty_ram(&[70, 3]), empty_ram(&[70, 3]));
        zero.write_page(PageIndex(66), &[0; PAGE_BYTES]).unwrap();
        assert_eq!(hole.digest(2).unwrap(), zero.digest(2).unwrap());
        assert!(hole.populated().unwrap().is_empty(), "the digest read a hole");
        let swapped = empty_ram(&[70, 3]);
        swapped.write_page(PageIndex(0), noise(1, PAGE_BYTES).as_slice().try_into().unwrap()).unwrap();
        let other = empty_ram(&[70, 3]);
        other.write_page(PageIndex(1), noise(1, PAGE_BYTES).as_slice().try_into().unwrap()).unwrap();
        assert_ne!(swapped.digest(1).unwrap(), other.digest(1).unwrap(), "the place of a page is not seen");
    }
}
