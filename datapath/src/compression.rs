//! What compression would make of a guest's pages, measured on a sample: the caller decides.

use std::time::{Duration, Instant};

use crate::guest_ram::GuestRam;
use crate::page::CHUNK_BYTES;
use crate::page_set::PageSet;

/// Chunks of a sample, spread over the guest: 4 MiB, some ten milliseconds.
const SAMPLE_CHUNKS: usize = 16;

/// What zstd did to a sample of pages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CompressionSample {
    /// Page bytes that one core takes in a second.
    pub bytes_per_s: f64,
    /// Bytes out over bytes in: below 1 is smaller.
    pub ratio: f64,
}

impl CompressionSample {
    /// Compresses a sample of `pages` at `level`; nothing when there is nothing to compress.
    pub fn take(ram: &GuestRam, pages: &PageSet, level: i32) -> Option<CompressionSample> {
        let chunks: Vec<_> = pages.iter_chunks().collect();
        let mut compressor = zstd::bulk::Compressor::new(level).ok()?;
        let (mut plain, mut packed) = (vec![0; CHUNK_BYTES], vec![0; zstd::compress_bound(CHUNK_BYTES)]);
        let (mut took, mut bytes_in, mut bytes_out) = (Duration::ZERO, 0, 0);
        for (chunk, mask) in chunks.iter().step_by(chunks.len().div_ceil(SAMPLE_CHUNKS).max(1)) {
            let len = ram.gather(*chunk, ram.data_pages(*chunk, *mask), &mut plain);
            let began = clock();
            bytes_out += compressor.compress_to_buffer(&plain[..len], &mut packed).ok()?;
            took += began.elapsed();
            bytes_in += len;
        }
        #[expect(clippy::cast_precision_loss, reason = "a few MiB")]
        let (bytes_in, bytes_out) = (bytes_in as f64, bytes_out as f64);
        (bytes_in > 0.0).then(|| CompressionSample {
            bytes_per_s: bytes_in / took.as_secs_f64().max(1e-9),
            ratio: bytes_out / bytes_in,
        })
    }
}

#[expect(clippy::disallowed_methods, reason = "a measurement")]
fn clock() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest_ram::{Access, RamFile};
    use crate::page::{ByteLen, PAGE_BYTES, PageIndex};
    use crate::{RamBlock, RamLayout};

    fn guest(page: impl Fn(u64) -> [u8; PAGE_BYTES]) -> GuestRam {
        let len = 1 << 20;
        let file = tempfile::tempfile().unwrap();
        file.set_len(len).unwrap();
        let block = RamBlock { name: "ram".into(), len: ByteLen(len), page_bytes: 4096 };
        let layout = RamLayout::new(vec![block]).unwrap();
        let ram = GuestRam::map(layout, vec![RamFile { file, offset: 0 }], Access::ReadWrite).unwrap();
        (0..len / 4096).for_each(|at| ram.write_page(PageIndex(at), &page(at)).unwrap());
        ram
    }

    #[test]
    fn text_shrinks_and_noise_does_not() {
        let text = guest(|_| *b"0123456789abcdef".repeat(256).first_chunk().unwrap());
        let noise = guest(|at| {
            let mut state = at.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            std::array::from_fn(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                u8::try_from(state & 0xFF).unwrap()
            })
        });
        let of = |ram: &GuestRam| CompressionSample::take(ram, &PageSet::full(ram.layout()), -1).unwrap();
        assert!(of(&text).ratio < 0.1, "{:?}", of(&text));
        assert!(of(&noise).ratio > 0.95, "{:?}", of(&noise));
    }

    #[test]
    fn a_guest_of_zeros_gives_no_sample() {
        let zeros = guest(|_| [0; PAGE_BYTES]);
        assert_eq!(CompressionSample::take(&zeros, &PageSet::full(zeros.layout()), -1), None);
    }
}
