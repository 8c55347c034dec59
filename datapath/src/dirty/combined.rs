//! Several processes that map one guest's memory: a page is dirty when any of them wrote it.

use super::{DirtyLog, TrackError};
use crate::page_set::PageSet;

/// The union of several logs.
pub struct CombinedLog(pub Vec<Box<dyn DirtyLog>>);

impl DirtyLog for CombinedLog {
    /// Harvests every log, also after one of them failed: the bits that the others give up must not be lost.
    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        let mut outcome = Ok(());
        for log in &mut self.0 {
            outcome = outcome.and(log.collect(into));
        }
        outcome
    }

    fn name(&self) -> &'static str {
        match self.0.as_slice() {
            [] => "none",
            [only] => only.name(),
            [first, rest @ ..] if rest.iter().all(|log| log.name() == first.name()) => first.name(),
            [..] => "mixed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PageCount, PageIndex};
    use rustix::io::Errno;

    struct Fixed(u64, bool);

    impl DirtyLog for Fixed {
        fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
            into.insert_range(PageIndex(self.0), PageCount(1));
            if self.1 { Ok(()) } else { Err(TrackError::HostRefused { service: "fail", errno: Errno::IO }) }
        }

        fn name(&self) -> &'static str {
            "fixed"
        }
    }

    #[test]
    fn one_failure_does_not_swallow_the_others() {
        let mut log = CombinedLog(vec![Box::new(Fixed(1, false)), Box::new(Fixed(2, true))]);
        let mut set = PageSet::with_chunks(1);
        assert!(log.collect(&mut set).is_err());
        assert_eq!(set.words(), [0b110]);
        assert_eq!(log.name(), "fixed");
    }
}
