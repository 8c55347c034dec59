//! Guest memory over a file with a gap before, between and behind its blocks.

use std::os::unix::fs::FileExt;

use super::*;
use crate::layout::RamBlock;

fn two_blocks() -> (RamLayout, File) {
    let blocks = [("a", 70), ("b", 3)];
    let blocks = blocks.map(|(name, pages)| RamBlock {
        name: name.into(),
        len: ByteLen(pages * 4096),
        page_bytes: 4096,
    });
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(100 * 4096).unwrap();
    (RamLayout::new(blocks.to_vec()).unwrap(), file)
}

fn files(file: &File) -> Vec<RamFile> {
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
    let open = || File::options().read(true).write(true).open(&path).unwrap();
    vec![RamFile { file: open(), offset: 4096 }, RamFile { file: open(), offset: 80 * 4096 }]
}

#[test]
fn pages_lie_where_the_layout_says_and_holes_stay_holes() {
    let (layout, file) = two_blocks();
    file.write_all_at(&[7; 4096], 4096 * (1 + 69)).unwrap();
    file.write_all_at(&[9; 4096], 4096 * 82).unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    let ram = GuestRam::map(layout, files(&file), Access::ReadWrite).unwrap();
    let populated = ram.populated().unwrap();
    assert_eq!(
        populated.iter_chunks().collect::<Vec<_>>(),
        vec![(ChunkIndex(1), 1 << 5), (ChunkIndex(2), 0b100)]
    );
    let mut page = [0; 4096];
    ram.read_page(PageIndex(69), &mut page).unwrap();
    assert_eq!(page, [7; 4096]);
    ram.read_page(PageIndex(130), &mut page).unwrap();
    assert_eq!(page, [9; 4096]);
    assert_eq!(ram.read_page(PageIndex(131), &mut page), Err(RamError::NoSuchPage { page: PageIndex(131) }));
    ram.discard_all().unwrap();
    assert!(ram.populated().unwrap().is_empty());
    let mut outside = [0; 1];
    file.read_exact_at(&mut outside, 0).unwrap();
    assert_eq!(outside, [1], "the discard went past the block");
}

#[test]
fn what_does_not_fit_is_not_written() {
    let (layout, file) = two_blocks();
    let ram = GuestRam::map(layout.clone(), files(&file), Access::ReadWrite).unwrap();
    assert_eq!(ram.write_pages(ChunkIndex(2), 0b1001, &[1; 8192]), Ok(false));
    assert_eq!(ram.write_pages(ChunkIndex(2), 0b101, &[1; 4096]), Ok(false));
    assert_eq!(ram.zero_pages(ChunkIndex(9), 1), Ok(false));
    assert!(ram.populated().unwrap().is_empty());
    assert_eq!(ram.write_pages(ChunkIndex(2), 0b101, &[1; 8192]), Ok(true));
    assert_eq!(ram.data_pages(ChunkIndex(2), 0b111), 0b101);
    assert_eq!(ram.zero_pages(ChunkIndex(2), 0b001), Ok(true));
    assert_eq!(ram.data_pages(ChunkIndex(2), 0b111), 0b100);
    assert!(ram.pages(ChunkIndex(1), 5, 2).is_none(), "a range crossed the end of its block");
    let read_only = GuestRam::map(layout, files(&file), Access::ReadOnly).unwrap();
    assert_eq!(read_only.write_pages(ChunkIndex(2), 1, &[1; 4096]), Err(RamError::ReadOnly));
    assert_eq!(read_only.discard_all(), Err(RamError::ReadOnly));
}

#[test]
fn pages_are_written_where_they_belong_and_nowhere_else() {
    let (layout, file) = two_blocks();
    let ram = GuestRam::map(layout, files(&file), Access::ReadWrite).unwrap();
    let body: Vec<u8> = (1..=3).flat_map(|byte| [byte; PAGE_BYTES]).collect();
    assert_eq!(ram.write_pages(ChunkIndex(0), 0b1011, &body), Ok(true));
    assert_eq!(ram.populated().unwrap().word(ChunkIndex(0)), 0b1011);
    let mut page = [0; PAGE_BYTES];
    for (number, byte) in [(0, 1), (1, 2), (3, 3)] {
        ram.read_page(PageIndex(number), &mut page).unwrap();
        assert_eq!(page, [byte; PAGE_BYTES]);
    }
    assert_eq!(ram.write_pages(ChunkIndex(1), 1 << 5, &body[..PAGE_BYTES]), Ok(true));
    ram.read_page(PageIndex(64 + 5), &mut page).unwrap();
    assert_eq!(page, [1; PAGE_BYTES]);
    assert_eq!(ram.write_pages(ChunkIndex(1), 1 << 6, &body[..PAGE_BYTES]), Ok(false), "past the block");
    assert_eq!(ram.write_pages(ChunkIndex(0), 0b1, &body), Ok(false), "a body of another length");
}

#[test]
fn one_byte_anywhere_makes_a_page_data() {
    let (layout, file) = two_blocks();
    let ram = GuestRam::map(layout, files(&file), Access::ReadWrite).unwrap();
    for at in 0..PAGE_BYTES {
        let mut page = [0; PAGE_BYTES];
        page[at] = 1;
        ram.write_page(PageIndex(65), &page).unwrap();
        assert_eq!(ram.data_pages(ChunkIndex(1), 0b111), 0b010, "byte {at}");
    }
    ram.write_page(PageIndex(65), &[0; PAGE_BYTES]).unwrap();
    assert_eq!(ram.data_pages(ChunkIndex(1), 0b111), 0);
}

#[test]
fn a_short_file_is_refused_before_it_kills_us() {
    let (layout, file) = two_blocks();
    file.set_len(82 * 4096).unwrap();
    let refused = GuestRam::map(layout, files(&file), Access::ReadOnly);
    assert!(matches!(refused.err(), Some(RamError::FileTooShort { .. })));
}

#[test]
fn runs_and_bits_cover_the_word() {
    for word in [0, 1, u64::MAX, 1 << 63, 0xf0f0_0000_0000_000f, 0b1011] {
        let from_runs =
            runs(word).fold(0, |all, (first, count)| (first..first + count).fold(all, |w, b| w | 1 << b));
        assert_eq!(from_runs, word);
        assert_eq!(bits(word).fold(0, |all, bit| all | 1 << bit), word);
    }
    assert_eq!(runs(0b1011).collect::<Vec<_>>(), vec![(0, 2), (3, 1)]);
}

#[test]
fn a_file_that_cannot_be_written_is_copied_to() {
    let (layout, file) = two_blocks();
    let mut ram = GuestRam::map(layout, files(&file), Access::ReadWrite).unwrap();
    ram.maps.iter_mut().for_each(|map| map.file_writes = false);
    let body: Vec<u8> = (1..=3).flat_map(|byte| [byte; PAGE_BYTES]).collect();
    assert_eq!(ram.write_pages(ChunkIndex(1), 0b110_0001, &body), Ok(false), "past the block");
    assert_eq!(ram.write_pages(ChunkIndex(1), 0b11_0001, &body), Ok(true));
    let mut page = [0; PAGE_BYTES];
    file.read_exact_at(&mut page, 4096 * (1 + 64 + 5)).unwrap();
    assert_eq!(page, [3; PAGE_BYTES]);
    assert_eq!(ram.zero_pages(ChunkIndex(1), 1 << 5), Ok(true));
    file.read_exact_at(&mut page, 4096 * (1 + 64 + 5)).unwrap();
    assert_eq!(page, [0; PAGE_BYTES]);
}
