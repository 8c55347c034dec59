//! A second writer may end while its guest moves: a backend that is restarted, for one.
//!
//! What it wrote since the last scan is known only from page tables that died with it. So its end is no error: every
//! page that it mapped counts as dirty, once, and there is nothing left to watch. What must never happen: this
//! around the VMM's own log. Its end is the guest's.

use rustix::io::Errno;

use super::{DirtyLog, TrackError};
use crate::page_set::PageSet;

/// The log of a process that may end.
pub struct DepartingLog {
    log: Box<dyn DirtyLog>,
    pages: PageSet,
    gone: bool,
}

impl DepartingLog {
    /// `log` watches a process that maps `pages`.
    pub fn new(log: Box<dyn DirtyLog>, pages: PageSet) -> DepartingLog {
        DepartingLog { log, pages, gone: false }
    }
}

impl DirtyLog for DepartingLog {
    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        if self.gone {
            return Ok(());
        }
        match self.log.collect(into) {
            Err(TrackError::GuestChanged { errno: Errno::SRCH, .. }) => {
                into.union_with(&self.pages);
                self.gone = true;
                Ok(())
            }
            outcome => outcome,
        }
    }

    fn name(&self) -> &'static str {
        self.log.name()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PageCount, PageIndex};

    struct Ended(Errno);

    impl DirtyLog for Ended {
        fn collect(&mut self, _into: &mut PageSet) -> Result<(), TrackError> {
            Err(TrackError::GuestChanged { address: 0, errno: self.0 })
        }

        fn name(&self) -> &'static str {
            "ended"
        }
    }

    fn log(errno: Errno) -> DepartingLog {
        let mut pages = PageSet::with_chunks(2);
        pages.insert_range(PageIndex(60), PageCount(10));
        DepartingLog::new(Box::new(Ended(errno)), pages)
    }

    #[test]
    fn an_end_makes_its_pages_dirty_once() {
        let (mut log, mut first, mut second) =
            (log(Errno::SRCH), PageSet::with_chunks(2), PageSet::with_chunks(2));
        log.collect(&mut first).unwrap();
        log.collect(&mut second).unwrap();
        assert_eq!((first.count(), second.count()), (PageCount(10), PageCount(0)));
    }

    #[test]
    fn any_other_trouble_is_an_error() {
        assert!(log(Errno::PERM).collect(&mut PageSet::with_chunks(2)).is_err());
    }
}
