//! Guest memory and noise for this crate's own tests.

use crate::guest_ram::{Access, GuestRam, RamFile};
use crate::layout::{RamBlock, RamLayout};
use crate::page::{ByteLen, PAGE_BYTES, PageIndex};

/// A step of SplitMix64.
pub(crate) fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// `len` bytes that follow from `seed` and do not compress.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let words = (0..len.div_ceil(8)).flat_map(|_| splitmix(&mut state).to_le_bytes());
    words.take(len).collect()
}

/// Empty memory of these blocks, in pages each.
pub(crate) fn empty_ram(blocks: &[u64]) -> GuestRam {
    let named = blocks.iter().enumerate();
    let blocks: Vec<_> = named
        .map(|(n, pages)| RamBlock { name: format!("ram{n}"), len: ByteLen(pages * 4096), page_bytes: 4096 })
        .collect();
    let file = |block: &RamBlock| {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(block.len.0).unwrap();
        RamFile { file, offset: 0 }
    };
    let files = blocks.iter().map(file).collect();
    GuestRam::map(RamLayout::new(blocks).unwrap(), files, Access::ReadWrite).unwrap()
}

/// One block of `pages` pages of noise.
pub(crate) fn filled_ram(seed: u64, pages: u64) -> GuestRam {
    let ram = empty_ram(&[pages]);
    for page in 0..pages {
        let bytes = noise(seed ^ page << 20, PAGE_BYTES);
        ram.write_page(PageIndex(page), bytes.as_slice().try_into().unwrap()).unwrap();
    }
    ram
}
