//! Reads the disk with O_DIRECT all the time: the VMM then writes guest memory from a kernel thread, which is the
//! writer that dirty tracking by page tables sees too early.
//!
//! A block is verified only after others were read in between, so a page that a move left behind shows.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vmferry_rig::{DISK_BLOCK_BYTES, block_word};

use crate::sys;

const DISK: &str = "/dev/vda";
const BUFFERS: usize = 256;

/// What the reader has seen.
#[derive(Debug, Default)]
pub(crate) struct DiskCounters {
    reads: AtomicU64,
    wrong: AtomicU64,
}

impl DiskCounters {
    pub(crate) fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    pub(crate) fn wrong(&self) -> u64 {
        self.wrong.load(Ordering::Relaxed)
    }
}

#[repr(align(4096))]
struct Block([u8; DISK_BLOCK_BYTES]);

/// Loads the disk's modules and starts the reader, where there is a disk.
pub(crate) fn start() -> Arc<DiskCounters> {
    let counters = Arc::new(DiskCounters::default());
    (0..16).map(|order| format!("/modules/{order}.ko")).for_each(|path| sys::load_module(Path::new(&path)));
    let Ok(disk) = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(DISK) else {
        return counters;
    };
    let seen = Arc::clone(&counters);
    std::thread::spawn(move || read_for_ever(&disk, &seen));
    counters
}

fn read_for_ever(disk: &File, counters: &DiskCounters) {
    let mut buffers: Vec<Block> = (0..BUFFERS).map(|_| Block([0; DISK_BLOCK_BYTES])).collect();
    let mut held: Vec<Option<u64>> = vec![None; BUFFERS];
    let mut turn = 0_usize;
    let mut random = 1_u64;
    loop {
        let place = turn % BUFFERS;
        if held[place].is_some_and(|block| !holds(&buffers[place], block)) {
            counters.wrong.fetch_add(1, Ordering::Relaxed);
        }
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let block = (random >> 40) % disk_blocks(disk);
        let offset = block * DISK_BLOCK_BYTES as u64;
        held[place] = disk.read_exact_at(&mut buffers[place].0, offset).is_ok().then_some(block);
        counters.reads.fetch_add(1, Ordering::Relaxed);
        turn = turn.wrapping_add(1);
        if turn.is_multiple_of(16) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn disk_blocks(disk: &File) -> u64 {
    use std::io::Seek;
    let mut disk = disk;
    let len = disk.seek(std::io::SeekFrom::End(0)).unwrap_or(0);
    (len / DISK_BLOCK_BYTES as u64).max(1)
}

fn holds(block: &Block, number: u64) -> bool {
    let words = block.0.chunks_exact(8).map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap_or_default()));
    words.zip(0..).all(|(word, at)| word == block_word(number, at))
}
