//! The log over this process's own memory, which it may register without help.

use std::ffi::c_void;
use std::os::fd::AsFd;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED,
    UFFDIO_REGISTER_MODE_WP, uffdio_api, uffdio_range, uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::ioctl::Updater;
use rustix::mm::{MapFlags, ProtFlags, UserfaultfdFlags, mmap, munmap, userfaultfd};

use super::*;
use crate::page::{ChunkIndex, PageIndex};

/// Shared memory of this process, watched.
struct Watched {
    base: *mut u8,
    len: usize,
    log: PagemapLog,
}

// SAFETY: tests write single bytes through the pointer, from one thread at a time for each byte.
unsafe impl Sync for Watched {}

impl Watched {
    /// Nothing where the kernel or its settings do not allow it; says so.
    fn new(pages: u64) -> Option<Watched> {
        let skip = |why: &str| -> Option<Watched> {
            println!("SKIP pagemap log: {why}");
            None
        };
        let len = usize::try_from(pages).unwrap() * PAGE_BYTES;
        let file = memfd_create("watched", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, len as u64).unwrap();
        // SAFETY: a fresh mapping touches no memory of ours.
        let base =
            unsafe { mmap(null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0) };
        let base = base.unwrap();
        // SAFETY: makes a descriptor and nothing else.
        let Ok(fd) = (unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC) }) else {
            return skip("userfaultfd is not allowed");
        };
        let features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
        let mut api = uffdio_api { api: u64::from(UFFD_API), features: u64::from(features), ioctls: 0 };
        // SAFETY: UFFDIO_API takes this struct.
        let call = unsafe { Updater::<{ UFFDIO_API }, _>::new(&mut api) };
        // SAFETY: as above.
        let greeted = unsafe { ioctl(fd.as_fd(), call) };
        if greeted.is_err() {
            return skip("no asynchronous write protection (Linux 6.7)");
        }
        let range = uffdio_range { start: base.expose_provenance() as u64, len: len as u64 };
        let mut register = uffdio_register { range, mode: u64::from(UFFDIO_REGISTER_MODE_WP), ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER takes this struct, and the range is ours.
        let call = unsafe { Updater::<{ UFFDIO_REGISTER }, _>::new(&mut register) };
        // SAFETY: as above.
        unsafe { ioctl(fd.as_fd(), call) }.unwrap();
        let area = WatchedArea { address: range.start, len: range.len, first_page: PageIndex(64) };
        let log = PagemapLog::new(File::open("/proc/self/pagemap").unwrap(), fd, vec![area]);
        Some(Watched { base: base.cast(), len, log })
    }

    fn write(&self, page: u64) {
        let at = usize::try_from(page).unwrap() * PAGE_BYTES;
        // SAFETY: tests stay inside the mapping.
        let byte = unsafe { self.base.add(at) };
        // SAFETY: as above.
        unsafe { byte.write_volatile(1) };
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`.
        unsafe { munmap(self.base.cast::<c_void>(), self.len) }.unwrap();
    }
}

#[test]
fn what_was_written_is_found_once() {
    let Some(mut watched) = Watched::new(64 * 8) else { return };
    let mut set = PageSet::with_chunks(9);
    watched.log.collect(&mut set).unwrap();
    set.clear();
    watched.log.collect(&mut set).unwrap();
    assert!(set.is_empty(), "{set:?} without a write");
    [0, 63, 64, 200, 511].into_iter().for_each(|page| watched.write(page));
    watched.log.collect(&mut set).unwrap();
    let found: Vec<_> = (0..64 * 9).filter(|page| set.contains(PageIndex(*page))).collect();
    assert_eq!(found, [64, 127, 128, 264, 575]);
    set.clear();
    watched.log.collect(&mut set).unwrap();
    assert!(set.is_empty(), "a write was found twice");
}

#[test]
fn bits_are_added_and_never_taken() {
    let Some(mut watched) = Watched::new(64) else { return };
    let mut set = PageSet::with_chunks(2);
    watched.log.collect(&mut set).unwrap();
    set.clear();
    set.set_word(ChunkIndex(0), 5);
    watched.write(9);
    watched.log.collect(&mut set).unwrap();
    assert_eq!(set.words(), [5, 1 << 9]);
}

#[test]
fn more_ranges_than_fit_into_one_call_are_all_found() {
    let pages = 4 * REGIONS_PER_SCAN as u64;
    let Some(mut watched) = Watched::new(pages) else { return };
    let mut set = PageSet::with_chunks(1 + pages / 64);
    watched.log.collect(&mut set).unwrap();
    set.clear();
    (0..pages).step_by(2).for_each(|page| watched.write(page));
    watched.log.collect(&mut set).unwrap();
    assert_eq!(set.count(), PageCount(pages / 2));
    assert!((0..pages).all(|page| set.contains(PageIndex(64 + page)) == page.is_multiple_of(2)));
}

#[test]
fn a_write_during_a_scan_is_in_this_one_or_the_next() {
    let pages = 64 * 16;
    let Some(watched) = Watched::new(pages) else { return };
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    // How often each page was written; the scans must see each write after it happened.
    let counts: Vec<AtomicU64> = (0..pages).map(|_| AtomicU64::new(0)).collect();
    let mut watched = watched;
    let writes = Watched {
        base: watched.base,
        len: 0,
        log: PagemapLog::new(
            File::open("/proc/self/pagemap").unwrap(),
            memfd_create("none", MemfdFlags::CLOEXEC).unwrap(),
            vec![],
        ),
    };
    let writes = std::mem::ManuallyDrop::new(writes);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut state = 3;
            while !stop.load(Ordering::Relaxed) {
                let page = crate::testing::splitmix(&mut state) % pages;
                writes.write(page);
                counts[usize::try_from(page).unwrap()].fetch_add(1, Ordering::SeqCst);
                written.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut all = PageSet::with_chunks(17);
        watched.log.collect(&mut all).unwrap();
        for _ in 0..200 {
            let before: Vec<u64> = counts.iter().map(|count| count.load(Ordering::SeqCst)).collect();
            thread::sleep(Duration::from_micros(300));
            let after: Vec<u64> = counts.iter().map(|count| count.load(Ordering::SeqCst)).collect();
            let mut set = PageSet::with_chunks(17);
            watched.log.collect(&mut set).unwrap();
            // Every write that was counted in between happened after the last scan and before this one.
            for page in 0..pages {
                let n = usize::try_from(page).unwrap();
                let seen = set.contains(PageIndex(64 + page));
                assert!(
                    seen || after[n] <= before[n] + 1,
                    "page {page} was written {} times unseen",
                    after[n] - before[n]
                );
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(written.into_inner() > 200);
}

#[test]
fn an_area_that_is_gone_is_an_error_and_not_silence() {
    let Some(mut watched) = Watched::new(64) else { return };
    let mut set = PageSet::with_chunks(2);
    watched.log.collect(&mut set).unwrap();
    // SAFETY: our own mapping; the log only ever asks the kernel about it.
    unsafe { munmap(watched.base.cast::<c_void>(), watched.len) }.unwrap();
    // SAFETY: puts something else there, which is not registered.
    unsafe {
        rustix::mm::mmap_anonymous(
            watched.base.cast(),
            watched.len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED,
        )
    }
    .unwrap();
    watched.write(3);
    let lost = watched.log.collect(&mut set);
    assert!(matches!(lost, Err(TrackError::GuestChanged { .. })), "{lost:?}");
}
