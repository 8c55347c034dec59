//! Dirty pages by `PAGEMAP_SCAN` (Linux 6.7): the kernel reports and re-protects in one step.
//!
//! The watched process was given a userfaultfd in asynchronous write-protect mode; we hold its only descriptor. A
//! scan returns every range that was written and protects it again while the page tables are locked, so no write
//! falls between. The same call serves 4 KiB and huge pages: a huge page is reported as the range it covers.
//! When this log is dropped (or this process dies) the kernel lifts the protection by itself.
#![expect(unsafe_code, reason = "PAGEMAP_SCAN has no safe wrapper")]

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use linux_raw_sys::general::{
    PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, page_region, pm_scan_arg,
};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use super::{DirtyLog, TrackError, WatchedArea};
use crate::page::{ByteLen, PAGE_BYTES, PageCount};
use crate::page_set::PageSet;

/// An entry of `/proc/PID/pagemap`: one page.
const ENTRY_BYTES: usize = 8;
/// Ranges that one system call may return: 96 KiB of them.
const REGIONS_PER_SCAN: usize = 4096;

/// The log of one process.
pub struct PagemapLog {
    pagemap: File,
    /// Held, never read: the protection lives as long as this descriptor.
    _userfaultfd: OwnedFd,
    areas: Vec<WatchedArea>,
    regions: Vec<page_region>,
}

impl PagemapLog {
    /// Watches `areas` of the process whose `/proc/PID/pagemap` this is. `userfaultfd` must have registered exactly
    /// those areas in asynchronous write-protect mode.
    pub fn new(pagemap: File, userfaultfd: OwnedFd, areas: Vec<WatchedArea>) -> PagemapLog {
        let regions = vec![page_region { start: 0, end: 0, categories: 0 }; REGIONS_PER_SCAN];
        PagemapLog { pagemap, _userfaultfd: userfaultfd, areas, regions }
    }

    fn collect_area(&mut self, area: WatchedArea, into: &mut PageSet) -> Result<(), TrackError> {
        let end = area.address.saturating_add(area.len);
        let mut at = area.address;
        while at < end {
            let (found, walked_to) = self.scan(at, end).map_err(|errno| blame(at, errno))?;
            for region in &self.regions[..found] {
                let offset = region.start.saturating_sub(area.address) / PAGE_BYTES as u64;
                let count = ByteLen(region.end.saturating_sub(region.start)).pages_ceil();
                into.insert_range(area.first_page.plus(PageCount(offset)), count);
            }
            if walked_to <= at {
                return Err(TrackError::HostRefused { service: "go on with PAGEMAP_SCAN", errno: Errno::IO });
            }
            at = walked_to;
        }
        Ok(())
    }

    /// A scan of a process that has ended finds nothing and is no error (seen on Linux 6.18), although what it wrote since
    /// the scan before is unknown. A read of the same file tells: it ends at once when the address space is gone. It is
    /// asked after the scan, so an end in between counts too.
    fn must_live(&self) -> Result<(), TrackError> {
        let address = self.areas.first().map_or(0, |area| area.address);
        let at = address / PAGE_BYTES as u64 * ENTRY_BYTES as u64;
        let gone = |errno| TrackError::GuestChanged { address, errno };
        match self.pagemap.read_at(&mut [0; ENTRY_BYTES], at) {
            Ok(ENTRY_BYTES) => Ok(()),
            Ok(_) => Err(gone(Errno::SRCH)),
            Err(error) => Err(gone(Errno::from_io_error(&error).unwrap_or(Errno::IO))),
        }
    }

    /// One call: how many ranges it found, and how far it came.
    fn scan(&mut self, start: u64, end: u64) -> Result<(usize, u64), Errno> {
        let arg = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: u64::from(PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC),
            start,
            end,
            walk_end: 0,
            vec: self.regions.as_mut_ptr().expose_provenance() as u64,
            vec_len: self.regions.len() as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: u64::from(PAGE_IS_WRITTEN),
            category_anyof_mask: 0,
            return_mask: u64::from(PAGE_IS_WRITTEN),
        };
        // SAFETY: `arg` has its own size in it, and `vec` names a live vector of `vec_len` regions that is ours
        // alone for the duration of the call.
        let (found, walk_end) = unsafe { ioctl(&self.pagemap, Scan(arg)) }?;
        Ok((found.min(self.regions.len()), walk_end))
    }
}

/// `EPERM` is the kernel's word for "this is not (or no longer) registered"; `ESRCH` and `EINVAL` for a process
/// that ended or shrank.
fn blame(address: u64, errno: Errno) -> TrackError {
    match errno {
        Errno::PERM | Errno::SRCH | Errno::INVAL | Errno::NOMEM => {
            TrackError::GuestChanged { address, errno }
        }
        _ => TrackError::HostRefused { service: "scan /proc/PID/pagemap", errno },
    }
}

impl DirtyLog for PagemapLog {
    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        (0..self.areas.len()).try_for_each(|number| self.collect_area(self.areas[number], into))?;
        self.must_live()
    }

    fn name(&self) -> &'static str {
        "pagemap-scan"
    }
}

struct Scan(pm_scan_arg);

// SAFETY: PAGEMAP_SCAN is _IOWR('f', 16, struct pm_scan_arg); the pointer given is to exactly that struct, and the
// kernel writes to it.
unsafe impl Ioctl for Scan {
    type Output = (usize, u64);

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<pm_scan_arg>(b'f', 16)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(found: IoctlOutput, arg: *mut c_void) -> rustix::io::Result<(usize, u64)> {
        // SAFETY: rustix hands back the pointer from `as_ptr`.
        let arg = unsafe { arg.cast::<pm_scan_arg>().read() };
        let found = usize::try_from(found).map_err(|_| Errno::IO)?;
        Ok((found, arg.walk_end))
    }
}

#[cfg(test)]
mod tests;
