//! The memory that a workload writes: mapped, shared with others, and for that reason only ever touched through
//! volatile loads and stores of single words.
//!
//! Never hand out a reference into it: a tracker, a sender or another process may read or write the same bytes at
//! any moment, and a `&[u64]` would promise that nobody does.
#![expect(
    unsafe_code,
    reason = "memory that another process maps too can only be touched through raw pointers"
)]

use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use crate::image::{PAGE_BYTES, WORDS_PER_PAGE};

/// Pages that can be loaded and stored a word at a time.
pub trait PageMemory {
    /// How many pages there are.
    fn pages(&self) -> u64;
    /// The word at `word` of `page`. Panics outside the memory: a workload's own mistake.
    fn load(&self, page: u64, word: usize) -> u64;
    /// Stores `value` at `word` of `page`. Panics outside the memory.
    fn store(&mut self, page: u64, word: usize, value: u64);
}

/// A mapping that this process owns.
#[derive(Debug)]
pub struct MappedPages {
    base: NonNull<u64>,
    pages: usize,
}

// SAFETY: the mapping belongs to this value alone, and volatile word access does not depend on the thread.
unsafe impl Send for MappedPages {}

// SAFETY: a shared reference only loads; storing takes `&mut`.
unsafe impl Sync for MappedPages {}

impl MappedPages {
    /// Private anonymous memory, zero at first.
    pub fn anonymous(pages: usize) -> rustix::io::Result<Self> {
        let len = pages.checked_mul(PAGE_BYTES).ok_or(rustix::io::Errno::OVERFLOW)?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let address = unsafe {
            mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
        }?;
        Self::own(address.cast(), pages)
    }

    /// `pages` pages of `file` from page `first` on, shared with every other process that maps it.
    pub fn shared(file: impl AsFd, first: u64, pages: usize) -> rustix::io::Result<Self> {
        let len = pages.checked_mul(PAGE_BYTES).ok_or(rustix::io::Errno::OVERFLOW)?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let offset = first.checked_mul(PAGE_BYTES as u64).ok_or(rustix::io::Errno::OVERFLOW)?;
        // SAFETY: a fresh shared mapping at an address of the kernel's choice touches nothing that exists.
        let address = unsafe { mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, file, offset) }?;
        Self::own(address.cast(), pages)
    }

    fn own(address: *mut u64, pages: usize) -> rustix::io::Result<Self> {
        let base = NonNull::new(address).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { base, pages })
    }

    /// Where the mapping begins in this process.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.base.as_ptr().expose_provenance() as u64
    }

    #[inline]
    fn offset(&self, page: u64, word: usize) -> usize {
        assert!(
            page < self.pages as u64 && word < WORDS_PER_PAGE,
            "page {page}, word {word} is outside the mapping"
        );
        usize::try_from(page).map_or(usize::MAX, |page| page * WORDS_PER_PAGE + word)
    }
}

impl PageMemory for MappedPages {
    fn pages(&self) -> u64 {
        self.pages as u64
    }

    #[inline]
    fn load(&self, page: u64, word: usize) -> u64 {
        // SAFETY: `offset` is inside the mapping.
        let place = unsafe { self.base.add(self.offset(page, word)) };
        // SAFETY: the word is mapped and aligned; volatile, because others may write it.
        unsafe { place.read_volatile() }
    }

    #[inline]
    fn store(&mut self, page: u64, word: usize, value: u64) {
        // SAFETY: `offset` is inside the mapping.
        let place = unsafe { self.base.add(self.offset(page, word)) };
        // SAFETY: the word is mapped, writable and aligned; volatile, because others read it.
        unsafe { place.write_volatile(value) }
    }
}

impl Drop for MappedPages {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and nothing borrowed from it can outlive it.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.pages * PAGE_BYTES) };
        debug_assert!(unmapped.is_ok(), "unmapping a workload's own memory failed: {unmapped:?}");
    }
}

/// Plain memory of this process, for tests and dry runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VecPages(Vec<[u64; WORDS_PER_PAGE]>);

impl VecPages {
    /// `pages` zero pages.
    #[must_use]
    pub fn new(pages: usize) -> Self {
        Self(vec![[0; WORDS_PER_PAGE]; pages])
    }

    /// One page, to damage it.
    pub fn page_mut(&mut self, page: usize) -> &mut [u64; WORDS_PER_PAGE] {
        &mut self.0[page]
    }
}

impl PageMemory for VecPages {
    fn pages(&self) -> u64 {
        self.0.len() as u64
    }

    fn load(&self, page: u64, word: usize) -> u64 {
        usize::try_from(page).map_or(0, |page| self.0[page][word])
    }

    fn store(&mut self, page: u64, word: usize, value: u64) {
        if let Ok(page) = usize::try_from(page) {
            self.0[page][word] = value;
        }
    }
}
