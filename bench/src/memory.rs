//! Memory like a guest's, for what is measured without a guest: a memory file with data in every page.

use std::fs::File;
use std::sync::Arc;

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, memfd_create};
use vmferry_datapath::{Access, ByteLen, GuestRam, RamBlock, RamFile, RamLayout};
use vmferry_workload::{MappedPages, PAGE_BYTES, Plan, Writer};

/// A memory file, mapped here too.
pub(crate) struct Memory {
    file: File,
    mapped: MappedPages,
    len: usize,
}

impl Memory {
    /// `len` bytes of zero.
    pub(crate) fn empty(len: usize) -> Result<Self> {
        let file = File::from(memfd_create("vmferry-bench", MemfdFlags::CLOEXEC)?);
        file.set_len(len as u64)?;
        let mapped = MappedPages::shared(&file, 0, len / PAGE_BYTES)?;
        Ok(Self { file, mapped, len })
    }

    /// `len` bytes that do not compress and hold no zero page.
    pub(crate) fn filled(len: usize) -> Result<Self> {
        let mut memory = Self::empty(len)?;
        let plan: Plan = format!("pages={},zero=0,seed=41", len / PAGE_BYTES).parse()?;
        Writer::new(plan).fill(&mut memory.mapped);
        Ok(memory)
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The address of a byte, for a system call.
    pub(crate) fn at(&self, offset: usize) -> *const u8 {
        let base = usize::try_from(self.mapped.address()).unwrap_or(0);
        std::ptr::with_exposed_provenance(base + offset)
    }

    /// The same memory as the lanes see it.
    pub(crate) fn guest_ram(&self, access: Access) -> Result<Arc<GuestRam>> {
        let page_bytes = u32::try_from(PAGE_BYTES)?;
        let block = RamBlock { name: "bench".to_owned(), len: ByteLen(self.len as u64), page_bytes };
        let layout = RamLayout::new(vec![block]).context("the bench's own layout")?;
        let file = RamFile { file: self.file.try_clone()?, offset: 0 };
        Ok(Arc::new(GuestRam::map(layout, vec![file], access)?))
    }
}
