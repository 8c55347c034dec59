//! Dirty tracking of a running process from outside.
//!
//! ```text
//!   every process that maps the RAM's inode, shared and writable
//!      │ ptrace one thread for under 1 ms: userfaultfd(), UFFDIO_API, UFFDIO_REGISTER per area
//!      │ pidfd_getfd takes the userfaultfd out, close() runs inside, registers and signal mask as before
//!      ▼
//!   we hold the only descriptor: when we die, the kernel lifts the protection
//! ```
//!
//! What must never happen: a thread left with our registers in it. Every path out of an injection, errors
//! included, restores and detaches; and the injection runs in a process of its own, so that a `kill -9` of vmferry
//! cannot fall into the middle of it.

use vmferry_datapath::{DirtyLog, PageIndex, PageSet, RamLayout};

use crate::GuestError;

/// A file, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Inode {
    /// Major and minor number of its file system's device.
    pub device: (u32, u32),
    /// Its number there.
    pub number: u64,
}

/// The place of one RAM block: a piece of a file, and where it lies in the flat page space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPlace {
    /// The file.
    pub inode: Inode,
    /// The block's first byte in the file.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Its first page in the flat page space.
    pub first_page: PageIndex,
}

/// Tracking as it was begun.
pub struct Tracked {
    /// The dirty pages of all tracked processes.
    pub log: Box<dyn DirtyLog>,
    /// Who writes, and what of it is not covered.
    pub watch: Watch,
}

/// Knows the writers of a guest's memory.
pub struct Watch {
    pinned: PageSet,
    notes: Vec<String>,
}

impl Watch {
    /// Pages that no tracker covers.
    #[must_use]
    pub fn pinned(&self) -> &PageSet {
        &self.pinned
    }

    /// What an operator should know: fallbacks in use, writers that are not tracked.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Looks again: the names of writers that appeared since. Their pages are pinned from now on.
    pub fn new_writers(&mut self) -> Result<Vec<String>, GuestError> {
        Ok(Vec::new())
    }
}

/// Tracks every process that maps `blocks` for writing; `vmm` must be among them and must be trackable.
pub fn track(vmm: i32, layout: &RamLayout, blocks: &[BlockPlace]) -> Result<Tracked, GuestError> {
    let _ = (vmm, layout, blocks);
    Err(GuestError::Bug("attach::track is not there yet".into()))
}

/// Whether this kernel can track by `PAGEMAP_SCAN`, in words.
pub fn kernel_support() -> Result<String, String> {
    Err("not looked yet".into())
}
