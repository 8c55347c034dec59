//! The guest's memory: mapped here, and nowhere else in this crate.
//!
//! ```text
//!   layout ── chunk ──► mapping of its block ── offset ──► raw bytes, bounds checked
//! ```
//!
//! A running guest writes while we read, so its memory is never a Rust reference: a `&[u8]` to it would be a lie
//! and undefined behaviour. This module hands out copies, counts and raw ranges, and checks every bound. A torn
//! read is harmless only because the page's dirty bit is set again: the bit is cleared first, *then* the page is
//! read. What must never happen: a byte written outside a block, or a hole of the source read (the read would
//! allocate it).
#![expect(unsafe_code, reason = "maps guest memory and copies to and from it through raw pointers")]

use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fstat, fstatfs, seek};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use thiserror::Error;

use crate::layout::RamLayout;
use crate::page::{ByteLen, CHUNK_BYTES, CHUNK_PAGES, ChunkIndex, PAGE_BYTES, PageIndex};
use crate::page_set::PageSet;

/// What the mapping may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// The source: vmferry reads, the guest writes.
    ReadOnly,
    /// The target: vmferry writes.
    ReadWrite,
}

/// The file behind one block, and where in it the block begins.
#[derive(Debug)]
pub struct RamFile {
    /// The open file (memfd, `/dev/shm`, hugetlbfs).
    pub file: File,
    /// The block's first byte in it.
    pub offset: u64,
}

/// Why guest memory could not be mapped or used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RamError {
    /// The caller gave one list of files and another of blocks.
    #[error("a bug in vmferry: {files} files for {blocks} RAM blocks; please report it")]
    FileCount {
        /// How many files came.
        files: usize,
        /// How many blocks there are.
        blocks: usize,
    },
    /// The file ends before the block does: touching the rest would kill this process.
    #[error(
        "the file behind RAM block `{block}` has {file_bytes} bytes but the block needs {needed}; start the guest with a file of the full size"
    )]
    FileTooShort {
        /// The block.
        block: String,
        /// The file's length.
        file_bytes: u64,
        /// What the block needs of it.
        needed: u64,
    },
    /// The kernel refused.
    #[error(
        "this host refused to {service} RAM block `{block}`: {errno}; run vmferry as root or as the user of the VMM"
    )]
    HostRefused {
        /// What was asked of it.
        service: &'static str,
        /// The block.
        block: String,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A page that does not exist.
    #[error("a bug in vmferry: page {page} is not in the guest's RAM; please report it")]
    NoSuchPage {
        /// The page.
        page: PageIndex,
    },
    /// A write through a read-only map.
    #[error("a bug in vmferry: the source's RAM was mapped for reading only; please report it")]
    ReadOnly,
}

/// A chunk of zeroes to write.
static ZEROES: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];

/// hugetlbfs, as `fstatfs` names it.
const HUGETLBFS_MAGIC: rustix::fs::FsWord = 0x9584_58f6;

/// One mapped block.
struct Mapping {
    base: NonNull<u8>,
    len: usize,
    file: RamFile,
    /// Whether the file takes `write`: hugetlbfs does not.
    file_writes: bool,
}

/// All RAM blocks of a guest, mapped shared into this process.
pub struct GuestRam {
    layout: RamLayout,
    maps: Vec<Mapping>,
    access: Access,
}

// SAFETY: the mapping is plain shared memory without thread affinity, and it lives until drop. Every access goes
// through raw pointers; no reference to it is ever made, so threads (and the guest) may race on its bytes.
unsafe impl Send for GuestRam {}
// SAFETY: as above.
unsafe impl Sync for GuestRam {}

/// A contiguous, bounds-checked piece of guest memory inside one chunk: an address, not a reference.
#[derive(Clone, Copy)]
pub struct GuestRange<'ram> {
    start: *const u8,
    len: usize,
    ram: PhantomData<&'ram GuestRam>,
}

impl GuestRange<'_> {
    /// The address of the first byte. Valid for reads of `len()` bytes while the [`GuestRam`] lives; the bytes may
    /// change at any time.
    pub const fn as_ptr(&self) -> *const u8 {
        self.start
    }

    /// How many bytes.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is nothing in it.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies the first `into.len()` bytes out; a longer destination keeps its tail.
    pub fn copy_to(&self, into: &mut [u8]) {
        let len = self.len.min(into.len());
        // SAFETY: both sides are valid for `len` bytes, and private memory never overlaps the mapping.
        unsafe { std::ptr::copy_nonoverlapping(self.start, into.as_mut_ptr(), len) }
    }
}

impl GuestRam {
    /// Maps each block of `layout` from the file at the same place in `files`.
    pub fn map(layout: RamLayout, files: Vec<RamFile>, access: Access) -> Result<GuestRam, RamError> {
        let blocks = layout.blocks().len();
        if files.len() != blocks {
            return Err(RamError::FileCount { files: files.len(), blocks });
        }
        let mut ram = GuestRam { layout, maps: Vec::with_capacity(blocks), access };
        for (number, file) in files.into_iter().enumerate() {
            let mapping = ram.map_block(number, file)?;
            ram.maps.push(mapping);
        }
        Ok(ram)
    }

    fn map_block(&self, number: usize, file: RamFile) -> Result<Mapping, RamError> {
        let block = &self.layout.blocks()[number];
        let refused =
            |service| move |errno| RamError::HostRefused { service, block: block.name.clone(), errno };
        let needed = file.offset.saturating_add(block.len.0);
        let size = fstat(&file.file).map_err(refused("look at the file of"))?.st_size;
        let file_bytes = u64::try_from(size).unwrap_or(0);
        if file_bytes < needed {
            return Err(RamError::FileTooShort { block: block.name.clone(), file_bytes, needed });
        }
        let len = usize::try_from(block.len.0).map_err(|_| refused("map")(Errno::NOMEM))?;
        let prot = match self.access {
            Access::ReadOnly => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        let (hint, flags) = (std::ptr::null_mut(), MapFlags::SHARED);
        // SAFETY: a fresh shared mapping at an address that the kernel picks touches no memory of ours.
        let base = unsafe { mmap(hint, len, prot, flags, &file.file, file.offset) };
        let base = base.map_err(refused("map"))?;
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(|| refused("map")(Errno::FAULT))?;
        let file_writes = fstatfs(&file.file).is_ok_and(|fs| fs.f_type != HUGETLBFS_MAGIC);
        Ok(Mapping { base, len, file, file_writes })
    }

    /// The blocks and the page space.
    pub fn layout(&self) -> &RamLayout {
        &self.layout
    }

    /// What it was mapped for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// The pages that may hold data. All others are holes: zero, and never to be read. Huge page files have no
    /// holes to ask for, so all their pages are in the set.
    pub fn populated(&self) -> Result<PageSet, RamError> {
        let mut set = PageSet::new(&self.layout);
        for (number, mapping) in self.maps.iter().enumerate() {
            let first = self.layout.first_page(number);
            self.populated_of(mapping, first, &mut set)
                .map_err(|errno| self.refused("find the holes of", number, errno))?;
        }
        Ok(set)
    }

    fn populated_of(&self, mapping: &Mapping, first: PageIndex, set: &mut PageSet) -> Result<(), Errno> {
        let (start, end) = (mapping.file.offset, mapping.file.offset + mapping.len as u64);
        let mut at = start;
        while at < end {
            let data = match seek(&mapping.file.file, SeekFrom::Data(at)) {
                Ok(data) if data < end => data,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(errno) => return Err(errno),
            };
            let hole = seek(&mapping.file.file, SeekFrom::Hole(data))?.clamp(data, end);
            let from = (data.max(start) - start) / PAGE_BYTES as u64;
            let to = ByteLen(hole - start).pages_ceil().0;
            set.insert_range(PageIndex(first.0 + from), crate::page::PageCount(to - from));
            at = hole.max(at + PAGE_BYTES as u64);
        }
        Ok(())
    }

    /// Makes every block a hole: what the target does before the first page arrives.
    pub fn discard_all(&self) -> Result<(), RamError> {
        if self.access == Access::ReadOnly {
            return Err(RamError::ReadOnly);
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        for (number, mapping) in self.maps.iter().enumerate() {
            fallocate(mapping.file.file.as_fd(), flags, mapping.file.offset, mapping.len as u64)
                .map_err(|errno| self.refused("discard", number, errno))?;
        }
        Ok(())
    }

    /// Copies one page out.
    pub fn read_page(&self, page: PageIndex, into: &mut [u8; PAGE_BYTES]) -> Result<(), RamError> {
        let bit = u32::try_from(page.bit()).unwrap_or(u32::MAX);
        let range = self.pages(page.chunk(), bit, 1).ok_or(RamError::NoSuchPage { page })?;
        range.copy_to(into);
        Ok(())
    }

    /// Writes one page.
    pub fn write_page(&self, page: PageIndex, from: &[u8; PAGE_BYTES]) -> Result<(), RamError> {
        if self.write_pages(page.chunk(), 1 << page.bit(), from)? {
            Ok(())
        } else {
            Err(RamError::NoSuchPage { page })
        }
    }

    /// `count` pages of a chunk from its page `first` on, or nothing when one of them does not exist.
    pub fn pages(&self, chunk: ChunkIndex, first: u32, count: u32) -> Option<GuestRange<'_>> {
        let (map, offset) = self.place(chunk)?;
        let start = offset.checked_add((first as usize).checked_mul(PAGE_BYTES)?)?;
        let len = (count as usize).checked_mul(PAGE_BYTES)?;
        if first.checked_add(count)? as usize > CHUNK_PAGES || start.checked_add(len)? > map.len {
            return None;
        }
        // SAFETY: `start + len` was just checked against the mapping's length.
        let start = unsafe { map.base.as_ptr().add(start) };
        Some(GuestRange { start, len, ram: PhantomData })
    }

    /// A piece of a block, across chunks: for a card that reaches it by itself. `None` when it is not all inside.
    #[cfg(feature = "rdma")]
    pub(crate) fn span(&self, block: usize, at: u64, len: usize) -> Option<GuestRange<'_>> {
        let map = self.maps.get(block)?;
        let at = usize::try_from(at).ok()?;
        at.checked_add(len).filter(|end| *end <= map.len)?;
        // SAFETY: `at` lies inside the mapping, checked above.
        let start = unsafe { map.base.as_ptr().add(at) };
        Some(GuestRange { start, len, ram: PhantomData })
    }

    /// Which of the pages in `mask` hold a byte that is not zero. Reads them: keep holes out of `mask`.
    pub fn data_pages(&self, chunk: ChunkIndex, mask: u64) -> u64 {
        let valid = mask & self.layout.valid_pages(chunk);
        let Some((map, offset)) = self.place(chunk) else { return 0 };
        let mut data = 0;
        for bit in bits(valid) {
            let at = offset + bit as usize * PAGE_BYTES;
            // SAFETY: `valid` holds only pages inside the block, so `at` lies inside the mapping.
            let page = unsafe { map.base.as_ptr().add(at) };
            data |= u64::from(!is_zero_page(page)) << bit;
        }
        data
    }

    /// Copies the pages of `mask` out, one behind the other, and gives the bytes written. Pages that do not exist
    /// or do not fit are left out.
    pub fn gather(&self, chunk: ChunkIndex, mask: u64, into: &mut [u8]) -> usize {
        let mut done = 0;
        for (first, count) in runs(mask & self.layout.valid_pages(chunk)) {
            let Some(range) = self.pages(chunk, first, count) else { break };
            range.copy_to(&mut into[done..]);
            done = into.len().min(done + range.len());
        }
        done
    }

    /// Writes `body` into the pages of `mask`, one page after the other. `false`, with nothing written, when a page
    /// does not exist or the body is not exactly as long as the pages.
    pub fn write_pages(&self, chunk: ChunkIndex, mask: u64, body: &[u8]) -> Result<bool, RamError> {
        let Some((map, offset)) = self.writable(chunk, mask)? else { return Ok(false) };
        if body.len() != mask.count_ones() as usize * PAGE_BYTES {
            return Ok(false);
        }
        let mut rest = body;
        for (first, count) in runs(mask) {
            let (now, later) = rest.split_at(count as usize * PAGE_BYTES);
            rest = later;
            self.put(map, chunk, offset + first as usize * PAGE_BYTES, now)?;
        }
        Ok(true)
    }

    /// Zeroes the pages of `mask`; `false`, with nothing written, when one of them does not exist.
    pub fn zero_pages(&self, chunk: ChunkIndex, mask: u64) -> Result<bool, RamError> {
        let Some((map, offset)) = self.writable(chunk, mask)? else { return Ok(false) };
        for (first, count) in runs(mask) {
            let zeroes = &ZEROES[..count as usize * PAGE_BYTES];
            self.put(map, chunk, offset + first as usize * PAGE_BYTES, zeroes)?;
        }
        Ok(true)
    }

    /// Writes a run of pages, already checked against the block, through the file rather than the mapping: the
    /// kernel then need not zero a fresh page and map it here before it is overwritten (half the cost), and a full
    /// file system is an error instead of a signal. Huge page files cannot be written, so theirs are copied.
    fn put(&self, map: &Mapping, chunk: ChunkIndex, at: usize, bytes: &[u8]) -> Result<(), RamError> {
        if map.file_writes {
            return map.file.file.write_all_at(bytes, map.file.offset + at as u64).map_err(|error| {
                let block = self.layout.locate(chunk).map_or(0, |(block, _)| block);
                self.refused("write to", block, Errno::from_io_error(&error).unwrap_or(Errno::IO))
            });
        }
        if at.checked_add(bytes.len()).is_none_or(|end| end > map.len) {
            return Err(RamError::NoSuchPage { page: chunk.first_page() });
        }
        // SAFETY: `at` lies inside the mapping, checked above.
        let to = unsafe { map.base.as_ptr().add(at) };
        // SAFETY: `to` is valid for that many bytes of a writable mapping; private memory does not overlap it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Ok(())
    }

    /// The mapping and offset of a chunk whose pages of `mask` all exist and may be written.
    fn writable(&self, chunk: ChunkIndex, mask: u64) -> Result<Option<(&Mapping, usize)>, RamError> {
        if self.access == Access::ReadOnly {
            return Err(RamError::ReadOnly);
        }
        if mask & !self.layout.valid_pages(chunk) != 0 {
            return Ok(None);
        }
        Ok(self.place(chunk))
    }

    fn place(&self, chunk: ChunkIndex) -> Option<(&Mapping, usize)> {
        let (block, offset) = self.layout.locate(chunk)?;
        Some((self.maps.get(block)?, usize::try_from(offset).ok()?))
    }

    fn refused(&self, service: &'static str, number: usize, errno: Errno) -> RamError {
        RamError::HostRefused { service, block: self.layout.blocks()[number].name.clone(), errno }
    }
}

impl Drop for GuestRam {
    fn drop(&mut self) {
        for mapping in &self.maps {
            // SAFETY: we mapped exactly this, and ranges borrow the `GuestRam`, so none is left.
            // An error here leaves address space behind, which nobody can use wrongly.
            let _ = unsafe { munmap(mapping.base.as_ptr().cast(), mapping.len) };
        }
    }
}

/// The numbers of the set bits, lowest first.
pub(crate) fn bits(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        (bit < 64).then(|| {
            word &= word - 1;
            bit
        })
    })
}

/// The runs of set bits, as (first, count), lowest first.
pub(crate) fn runs(mut word: u64) -> impl Iterator<Item = (u32, u32)> {
    std::iter::from_fn(move || {
        let first = word.trailing_zeros();
        (first < 64).then(|| {
            let count = (!(word >> first)).trailing_zeros().min(64 - first);
            let run = if count == 64 { u64::MAX } else { ((1 << count) - 1) << first };
            word &= !run;
            (first, count)
        })
    })
}

/// Whether all 4096 bytes at `page` are zero. Most data pages show it in their last cache line, and that one is
/// looked at first: a look at the first line would meet the cipher's own stream of reads, and was measured to slow
/// the two together by a tenth.
fn is_zero_page(page: *const u8) -> bool {
    is_zero::<8>(page, LINES - 1, LINES) && is_zero::<32>(page, 0, LINES / 4)
}

const LINES: usize = PAGE_BYTES / 64;

/// Whether blocks `from` to `to` of `WORDS` words each, counted from `page`, are zero.
fn is_zero<const WORDS: usize>(page: *const u8, from: usize, to: usize) -> bool {
    for block in from..to {
        // SAFETY: callers pass a page inside a mapping, and blocks that lie in the page.
        let at = unsafe { page.cast::<[u64; WORDS]>().add(block) };
        // SAFETY: readable, and a page is aligned for u64. The value is taken once, as a copy.
        let words = unsafe { at.read() };
        if words.iter().fold(0, |all, word| all | word) != 0 {
            return false;
        }
    }
    true
}

const _: () = assert!(CHUNK_BYTES == CHUNK_PAGES * PAGE_BYTES);

#[cfg(test)]
mod tests;
