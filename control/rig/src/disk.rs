//! A disk whose every block says which block it is.

use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Bytes of a block, as the guest reads them.
pub const DISK_BLOCK_BYTES: usize = 4096;

/// Word `word` (u64, little endian) of block `block`.
#[must_use]
pub fn block_word(block: u64, word: u64) -> u64 {
    let value = (block * 512 + word).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value ^ (value >> 29)
}

/// Writes a disk of `blocks` blocks.
pub fn create_disk(path: &Path, blocks: u64) -> std::io::Result<()> {
    let mut file = std::io::BufWriter::new(File::create(path)?);
    for block in 0..blocks {
        for word in 0..(DISK_BLOCK_BYTES as u64 / 8) {
            file.write_all(&block_word(block, word).to_le_bytes())?;
        }
    }
    file.flush()
}
