//! How the pages of a chunk become the body of a record: decided once, when the lane starts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::io::Errno;
use xxhash_rust::xxh3::xxh3_64;
use zstd::bulk::Compressor;

use super::Compression;
use crate::error::DataError;
use crate::frame::ChunkRecord;
use crate::guest_ram::{GuestRam, bits};
use crate::layout::RamLayout;
use crate::page::{CHUNK_BYTES, CHUNK_PAGES, ChunkIndex, PAGE_BYTES, PageIndex};
use crate::page_set::PageSet;
use crate::seal::Source;

/// A hash of each page as it was last sent; zero for one that never was.
pub(crate) struct SentHashes(Vec<AtomicU64>);

fn hash(page: &[u8]) -> u64 {
    xxh3_64(page).max(1)
}

impl SentHashes {
    pub(crate) fn new(layout: &RamLayout) -> SentHashes {
        let pages = layout.chunk_count() * CHUNK_PAGES as u64;
        SentHashes((0..pages).map(|_| AtomicU64::new(0)).collect())
    }

    fn slot(&self, chunk: ChunkIndex, bit: u32) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(chunk.first_page().0 + u64::from(bit)).ok()?)
    }

    /// These pages were sent with these bytes.
    fn keep(&self, chunk: ChunkIndex, pages: u64, bytes: &[u8]) {
        for (bit, page) in bits(pages).zip(bytes.chunks_exact(PAGE_BYTES)) {
            self.set(chunk, bit, hash(page));
        }
    }

    /// These pages were sent a moment ago. What changed since differs from what the other host holds or will be sent
    /// again, so a hash of now is never taken for an older page.
    pub(crate) fn keep_pages(&self, ram: &GuestRam, chunk: ChunkIndex, pages: u64) {
        let mut page = [0; PAGE_BYTES];
        for bit in bits(pages) {
            let index = PageIndex(chunk.first_page().0 + u64::from(bit));
            if ram.read_page(index, &mut page).is_ok() {
                self.set(chunk, bit, hash(&page));
            }
        }
    }

    /// These pages were sent as zero.
    pub(crate) fn keep_zero(&self, chunk: ChunkIndex, pages: u64) {
        let zero = hash(&[0; PAGE_BYTES]);
        bits(pages).for_each(|bit| self.set(chunk, bit, zero));
    }

    fn set(&self, chunk: ChunkIndex, bit: u32, hash: u64) {
        if let Some(slot) = self.slot(chunk, bit) {
            slot.store(hash, Ordering::Relaxed);
        }
    }

    /// Which of the pages read differently now.
    pub(crate) fn changed(&self, ram: &GuestRam, pages: &PageSet) -> PageSet {
        let mut changed = PageSet::with_chunks(pages.chunk_count());
        let mut page = [0; PAGE_BYTES];
        for (chunk, word) in pages.iter_chunks() {
            let differs = |bit: &u32| {
                let index = PageIndex(chunk.first_page().0 + u64::from(*bit));
                let sent = self.slot(chunk, *bit).map_or(0, |slot| slot.load(Ordering::Relaxed));
                ram.read_page(index, &mut page).is_ok() && hash(&page) != sent
            };
            let word = bits(word).filter(differs).fold(0, |word, bit| word | 1 << bit);
            changed.set_word(chunk, word);
        }
        changed
    }
}

/// Makes the bodies of one lane.
pub(crate) enum BodyMaker {
    /// Sealed straight from guest memory.
    Direct,
    /// Copied, hashed, sealed in place.
    Hashed(Arc<SentHashes>),
    /// Copied, compressed where that is smaller, sealed in place.
    Compressed {
        compressor: Box<Compressor<'static>>,
        scratch: Box<[u8]>,
        hashes: Option<Arc<SentHashes>>,
        on: Arc<AtomicBool>,
    },
}

impl BodyMaker {
    pub(crate) fn new(
        compression: Compression,
        hashes: Option<Arc<SentHashes>>,
        on: Arc<AtomicBool>,
    ) -> Result<BodyMaker, DataError> {
        let Compression::Zstd { level } = compression else {
            return Ok(hashes.map_or(BodyMaker::Direct, BodyMaker::Hashed));
        };
        let compressor = Compressor::new(level).map_err(|_| DataError::HostRefused {
            service: "set up zstd",
            fix: "use a level that zstd knows, or no compression",
            errno: Errno::INVAL,
        })?;
        let scratch = vec![0; CHUNK_BYTES].into_boxed_slice();
        Ok(BodyMaker::Compressed { compressor: Box::new(compressor), scratch, hashes, on })
    }

    /// Puts the body of `record` into `room`, or says from where to seal it. May shorten the record.
    pub(crate) fn make<'ram>(
        &mut self,
        ram: &'ram GuestRam,
        record: &mut ChunkRecord,
        room: &mut [u8],
    ) -> Source<'ram> {
        let (chunk, pages) = (record.chunk, record.data);
        let len = record.plain_len() as usize;
        match self {
            BodyMaker::Direct => return Source::Guest { ram, chunk, pages },
            BodyMaker::Hashed(hashes) => {
                ram.gather(chunk, pages, &mut room[..len]);
                hashes.keep(chunk, pages, &room[..len]);
            }
            BodyMaker::Compressed { on, hashes: None, .. } if !on.load(Ordering::Relaxed) => {
                return Source::Guest { ram, chunk, pages };
            }
            BodyMaker::Compressed { on, hashes: Some(hashes), .. } if !on.load(Ordering::Relaxed) => {
                ram.gather(chunk, pages, &mut room[..len]);
                hashes.keep(chunk, pages, &room[..len]);
            }
            BodyMaker::Compressed { compressor, scratch, hashes, .. } => {
                let plain = &mut scratch[..len];
                ram.gather(chunk, pages, plain);
                if let Some(hashes) = hashes {
                    hashes.keep(chunk, pages, plain);
                }
                // Room for one byte less than the pages: what does not fit is not smaller.
                let packed = compressor.compress_to_buffer(plain, &mut room[..len.saturating_sub(1)]);
                match packed.map(u32::try_from) {
                    Ok(Ok(packed)) if packed > 0 => (record.compressed, record.body_len) = (true, packed),
                    _ => room[..len].copy_from_slice(plain),
                }
            }
        }
        Source::InPlace
    }

    /// The hashes, if they are kept.
    pub(crate) fn hashes(&self) -> Option<&SentHashes> {
        match self {
            BodyMaker::Direct => None,
            BodyMaker::Hashed(hashes) => Some(hashes),
            BodyMaker::Compressed { hashes, .. } => hashes.as_deref(),
        }
    }
}
