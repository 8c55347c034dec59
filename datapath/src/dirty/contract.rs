//! The contract of every dirty log, for the tests of each: the bitmap and the rings of KVM, `PAGEMAP_SCAN`, soft-dirty.
//!
//! ```text
//!   check ──► Scribe: write these pages, then stand still
//!     └─────► DirtyLog: what did it write?
//! ```
//!
//! A log may name a page too many only where the writer's own doings are (its code, its stack), and never one too few.

use std::fmt::Display;

use super::DirtyLog;
use crate::layout::RamLayout;
use crate::page::{PageCount, PageIndex};
use crate::page_set::PageSet;

/// A writer of guest memory at the test's command. Before the contract it has touched every page that it may write.
pub trait Scribe {
    /// The memory.
    fn layout(&self) -> &RamLayout;
    /// The pages that it may be told to write: from the first up to, not with, the second.
    fn span(&self) -> (PageIndex, PageIndex);
    /// Writes into each of these pages, and returns when it did and stands still. In ascending order, none twice.
    fn write(&mut self, pages: &[PageIndex]) -> Result<(), String>;
}

/// Pages for the longest list: more than a small ring holds.
const MANY: u64 = 1200;

/// Holds `log` against what `scribe` was told to write; the first difference is the error.
pub fn check(scribe: &mut dyn Scribe, log: &mut dyn DirtyLog) -> Result<(), String> {
    let (first, end) = scribe.span();
    let span = end.0 - first.0;
    if span < MANY * 2 {
        return Err(format!("the contract needs a span of {} pages, and {span} are there", MANY * 2));
    }
    let mut test = Test { scribe, log };
    // What was written before the first look is in it, whatever else is.
    let early = [first, PageIndex(first.0 + 77)];
    test.scribe.write(&early)?;
    let seen = test.collect()?;
    missing(&seen, &early)
        .map_or(Ok(()), |page| Err(format!("page {page} was written before the first look")))?;
    test.expect("a writer that stands still", &[])?;
    test.expect("one page", &[PageIndex(first.0 + 5)])?;
    test.expect("the same page again", &[PageIndex(first.0 + 5)])?;
    test.expect("the first and the last page", &[first, PageIndex(end.0 - 1)])?;
    let borders = [62, 63, 64, 65, 127, 128].map(|page| PageIndex(first.0 + page));
    test.expect("both sides of a word", &borders)?;
    let many: Vec<PageIndex> = (0..MANY).map(|number| PageIndex(first.0 + number * span / MANY)).collect();
    test.expect("many pages", &many)?;
    test.expect("a quiet time after many", &[])?;
    test.adds_only(first)?;
    test.twice_between_looks(first)
}

struct Test<'a> {
    scribe: &'a mut dyn Scribe,
    log: &'a mut dyn DirtyLog,
}

impl Test<'_> {
    fn collect(&mut self) -> Result<PageSet, String> {
        let mut pages = PageSet::new(self.scribe.layout());
        self.log.collect(&mut pages).map_err(text)?;
        Ok(pages)
    }

    /// These pages are written, and exactly they are seen within the span.
    fn expect(&mut self, what: &str, pages: &[PageIndex]) -> Result<(), String> {
        self.scribe.write(pages)?;
        let seen = self.collect()?;
        if let Some(page) = missing(&seen, pages) {
            return Err(format!("{what}: page {page} was written and not seen by {}", self.log.name()));
        }
        let (first, end) = self.scribe.span();
        let surplus =
            (first.0..end.0).map(PageIndex).find(|page| seen.contains(*page) && !pages.contains(page));
        surplus.map_or(Ok(()), |page| {
            Err(format!("{what}: page {page} was seen by {} and not written", self.log.name()))
        })
    }

    /// A look adds to the caller's set and takes nothing out of it.
    fn adds_only(&mut self, first: PageIndex) -> Result<(), String> {
        let mut pages = PageSet::new(self.scribe.layout());
        let (held, written) = (PageIndex(first.0 + 300), PageIndex(first.0 + 301));
        pages.insert_range(held, PageCount(1));
        self.scribe.write(&[written])?;
        self.log.collect(&mut pages).map_err(text)?;
        missing(&pages, &[held, written]).map_or(Ok(()), |page| {
            Err(format!("page {page} was taken out of the caller's set, or not added"))
        })
    }

    /// Pages written in several orders before one look are all in it.
    fn twice_between_looks(&mut self, first: PageIndex) -> Result<(), String> {
        let (one, two) = (PageIndex(first.0 + 400), PageIndex(first.0 + 401));
        self.scribe.write(&[one])?;
        self.scribe.write(&[one, two])?;
        self.expect("after two orders", &[one, two])
    }
}

fn missing(seen: &PageSet, written: &[PageIndex]) -> Option<PageIndex> {
    written.iter().copied().find(|page| !seen.contains(*page))
}

fn text(error: impl Display) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::dirty::TrackError;
    use crate::layout::RamBlock;
    use crate::page::ByteLen;

    /// A log and a writer that share a set; what is wrong with the log is told by name.
    struct Honest(RamLayout, Arc<Mutex<PageSet>>);
    struct Flawed(Arc<Mutex<PageSet>>, &'static str);

    impl Scribe for Honest {
        fn layout(&self) -> &RamLayout {
            &self.0
        }

        fn span(&self) -> (PageIndex, PageIndex) {
            (PageIndex(2), PageIndex(4096))
        }

        fn write(&mut self, pages: &[PageIndex]) -> Result<(), String> {
            let mut set = self.1.lock().unwrap();
            pages.iter().for_each(|page| set.insert_range(*page, PageCount(1)));
            Ok(())
        }
    }

    impl DirtyLog for Flawed {
        fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
            let mut set = self.0.lock().unwrap();
            match self.1 {
                "replaces" => *into = set.clone(),
                "forgets the last page" => {
                    into.union_with(&set);
                    into.set_word(crate::ChunkIndex(63), 0);
                }
                _ => into.union_with(&set),
            }
            if self.1 != "never clears" {
                set.clear();
            }
            Ok(())
        }

        fn name(&self) -> &'static str {
            self.1
        }
    }

    #[test]
    fn an_honest_log_passes_and_every_flaw_is_found() {
        let block = RamBlock { name: "ram".into(), len: ByteLen(16 << 20), page_bytes: 4096 };
        let layout = RamLayout::new(vec![block]).unwrap();
        let run = |flaw| {
            let set = Arc::new(Mutex::new(PageSet::new(&layout)));
            check(&mut Honest(layout.clone(), Arc::clone(&set)), &mut Flawed(set, flaw))
        };
        assert_eq!(run("none"), Ok(()));
        for flaw in ["replaces", "forgets the last page", "never clears"] {
            assert!(run(flaw).is_err(), "{flaw}");
        }
    }
}
