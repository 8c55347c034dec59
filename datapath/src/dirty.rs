//! Which pages were written since we last looked.
//!
//! One trait, one implementation for each way in which a kernel can tell. A log is harvested: what it returns is
//! cleared in the kernel at the same moment. What must never happen: a dirty bit that was cleared there and
//! reached nobody here. Bits are therefore only ever *added* to the caller's set, and after an error the caller
//! must take every page for dirty.

use rustix::io::Errno;
use thiserror::Error;

use crate::page::PageIndex;
use crate::page_set::PageSet;

pub mod combined;
pub mod contract;
pub mod departing;
pub mod kvm_log;
pub mod kvm_ring;
pub mod kvm_sys;
pub mod pagemap;
pub mod soft_dirty;

/// A source of dirty pages.
pub trait DirtyLog: Send {
    /// Adds every page written since the last call to `into`, and starts to watch it anew. After an error the
    /// caller must treat every page as dirty.
    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError>;

    /// How it works, for people.
    fn name(&self) -> &'static str;
}

/// A piece of the watched process's address space that maps guest RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchedArea {
    /// Its first address in the watched process, page aligned.
    pub address: u64,
    /// Its length in bytes, a multiple of the page size.
    pub len: u64,
    /// The page of the flat page space that it begins with.
    pub first_page: PageIndex,
}

/// Why the dirty pages are not known.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum TrackError {
    /// The watched process changed its mappings, or ended.
    #[error(
        "the memory at {address:#x} is no longer tracked: {errno}; the VMM unmapped it or ended, so attach again"
    )]
    GuestChanged {
        /// Where tracking was lost.
        address: u64,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The kernel refused.
    #[error(
        "this host refused to {service}: {errno}; run vmferry as root, on a kernel that `vmferry doctor` accepts"
    )]
    HostRefused {
        /// What was asked of it.
        service: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The VMM keeps the log itself, and could not tell.
    #[error("the VMM could not tell its dirty pages: {0}; look whether it still runs")]
    VmmLost(String),
    /// The watched process could not be held still while its bits were read.
    #[error(
        "the VMM could not be held still to read its dirty pages: {0}; check that nothing else traces it"
    )]
    NotHalted(String),
}
