//! Dirty pages by soft-dirty bits, for kernels before 6.7.
//!
//! The bits are read from `/proc/PID/pagemap` and cleared through `/proc/PID/clear_refs`: two steps. A write
//! between them would set a bit that the second step clears unseen, in either order. So the process is held still
//! for the two steps by a [`Halt`]; that pause is the price of the fallback, about 10 ms a GiB. What must never
//! happen: the steps without the halt.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::{DirtyLog, TrackError, WatchedArea};
use crate::page::{PAGE_BYTES, PageCount};
use crate::page_set::PageSet;

/// Entries of 8 bytes that are read at once.
const ENTRIES_PER_READ: usize = 8192;
const ENTRY_BYTES: usize = 8;
const SOFT_DIRTY: u64 = 1 << 55;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;

/// Holds every thread of the watched process still. It must let go by itself when this process dies, as ptrace
/// does and SIGSTOP does not.
pub trait Halt: Send {
    /// Returns when no thread of the process runs.
    fn halt(&mut self) -> Result<(), String>;
    /// Lets them run again.
    fn release(&mut self);
}

/// The log of one process.
pub struct SoftDirtyLog {
    pagemap: File,
    clear_refs: File,
    areas: Vec<WatchedArea>,
    halt: Box<dyn Halt>,
    entries: Vec<u8>,
}

impl SoftDirtyLog {
    /// Watches `areas` of the process whose `/proc/PID/pagemap` and `/proc/PID/clear_refs` these are.
    pub fn new(
        pagemap: File,
        clear_refs: File,
        areas: Vec<WatchedArea>,
        halt: Box<dyn Halt>,
    ) -> SoftDirtyLog {
        SoftDirtyLog { pagemap, clear_refs, areas, halt, entries: vec![0; ENTRIES_PER_READ * ENTRY_BYTES] }
    }

    fn read_all(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        (0..self.areas.len()).try_for_each(|number| self.read_area(self.areas[number], into))
    }

    fn read_area(&mut self, area: WatchedArea, into: &mut PageSet) -> Result<(), TrackError> {
        let pages = area.len / PAGE_BYTES as u64;
        let mut page = 0;
        while page < pages {
            let left = usize::try_from(pages - page).unwrap_or(usize::MAX);
            let buffer = &mut self.entries[..left.min(ENTRIES_PER_READ) * ENTRY_BYTES];
            let at = (area.address / PAGE_BYTES as u64 + page) * ENTRY_BYTES as u64;
            self.pagemap.read_exact_at(buffer, at).map_err(|error| TrackError::GuestChanged {
                address: area.address + page * PAGE_BYTES as u64,
                errno: Errno::from_io_error(&error).unwrap_or(Errno::SRCH),
            })?;
            let entries = buffer.chunks_exact(ENTRY_BYTES);
            let dirty =
                entries.map(|entry| is_dirty(u64::from_le_bytes(entry.try_into().unwrap_or_default())));
            for (page, _) in (page..).zip(dirty).filter(|(_, dirty)| *dirty) {
                into.insert_range(area.first_page.plus(PageCount(page)), PageCount(1));
            }
            page += left.min(ENTRIES_PER_READ) as u64;
        }
        Ok(())
    }
}

/// A page that is in no page table counts as dirty: shared memory that was reclaimed leaves no entry, and its bit
/// is gone with it.
fn is_dirty(entry: u64) -> bool {
    entry & SOFT_DIRTY != 0 || entry & (PRESENT | SWAPPED) == 0
}

impl DirtyLog for SoftDirtyLog {
    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        self.halt.halt().map_err(TrackError::NotHalted)?;
        let outcome = self.read_all(into).and_then(|()| {
            self.clear_refs.write_all_at(b"4", 0).map_err(|error| TrackError::HostRefused {
                service: "clear the soft-dirty bits",
                errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
            })
        });
        self.halt.release();
        outcome
    }

    fn name(&self) -> &'static str {
        "soft-dirty"
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::page::PageIndex;

    struct Counting(Arc<AtomicU32>, bool);

    impl Halt for Counting {
        fn halt(&mut self) -> Result<(), String> {
            self.0.fetch_add(1, Ordering::Relaxed);
            if self.1 { Ok(()) } else { Err("busy".into()) }
        }

        fn release(&mut self) {
            self.0.fetch_add(100, Ordering::Relaxed);
        }
    }

    /// A page map of a process that is not there: entries in a file, and a file that takes the clearing.
    fn log(entries: &[u64], halts: bool) -> (SoftDirtyLog, File, Arc<AtomicU32>) {
        let (pagemap, clear_refs) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        pagemap.write_all_at(&bytes, 16).unwrap();
        let area = WatchedArea { address: 8192, len: entries.len() as u64 * 4096, first_page: PageIndex(3) };
        let (calls, cleared) = (Arc::new(AtomicU32::new(0)), clear_refs.try_clone().unwrap());
        let halt = Box::new(Counting(Arc::clone(&calls), halts));
        (SoftDirtyLog::new(pagemap, clear_refs, vec![area], halt), cleared, calls)
    }

    #[test]
    fn dirty_and_unmapped_pages_count_and_clean_ones_do_not() {
        let (mut log, cleared, calls) =
            log(&[PRESENT, PRESENT | SOFT_DIRTY, SWAPPED, SWAPPED | SOFT_DIRTY, 0], true);
        let mut set = PageSet::with_chunks(1);
        log.collect(&mut set).unwrap();
        assert_eq!(set.words(), [0b11010 << 3]);
        assert_eq!(calls.load(Ordering::Relaxed), 101, "halted once, released once");
        assert_eq!(cleared.metadata().unwrap().len(), 1);
    }

    #[test]
    fn more_entries_than_one_read_holds() {
        let entries: Vec<u64> = (0..20_000).map(|n| if n % 7 == 0 { SOFT_DIRTY } else { PRESENT }).collect();
        let (mut log, ..) = log(&entries, true);
        let mut set = PageSet::with_chunks(400);
        log.collect(&mut set).unwrap();
        assert_eq!(set.count(), PageCount(20_000_u64.div_ceil(7)));
        assert!(set.contains(PageIndex(3 + 7 * 2857)));
    }

    #[test]
    fn without_a_halt_nothing_is_cleared() {
        let (mut log, cleared, calls) = log(&[PRESENT], false);
        assert!(matches!(log.collect(&mut PageSet::with_chunks(1)), Err(TrackError::NotHalted(_))));
        assert_eq!((cleared.metadata().unwrap().len(), calls.load(Ordering::Relaxed)), (0, 1));
    }

    #[test]
    fn a_process_that_is_gone_is_an_error_and_is_released() {
        let (mut log, cleared, calls) = log(&[PRESENT], true);
        log.areas[0].len = 1 << 20;
        assert!(matches!(log.collect(&mut PageSet::with_chunks(9)), Err(TrackError::GuestChanged { .. })));
        assert_eq!((cleared.metadata().unwrap().len(), calls.load(Ordering::Relaxed)), (0, 101));
    }
}
