//! The writer: gives pages new versions, and remembers which.

use crate::image::{HEADER_WORDS, PageImage, WORDS_PER_LINE, WORDS_PER_PAGE};
use crate::memory::PageMemory;
use crate::plan::{Pattern, Plan, PlanError};
use crate::random::{below, next};
use crate::registers::Registers;

/// Odd, and no working set is a multiple of it: a walk by it meets every page once.
const SCATTER: u64 = 0x9e37_79b1;

/// Writes pages as the plan says. The version is noted after the page is complete, so a writer must only be stopped
/// between two calls.
#[derive(Debug)]
pub struct Writer {
    registers: Registers,
}

impl Writer {
    /// A writer over new memory; call `fill` next.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        Self { registers: Registers::new(plan) }
    }

    /// A writer that goes on where another stopped.
    #[must_use]
    pub fn resume(registers: Registers) -> Self {
        Self { registers }
    }

    /// What must be true of the memory now.
    #[must_use]
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// Changes `rate`, `pattern` or `set` of the running workload. What the pages already hold follows from the other
    /// keys, so those are refused.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), PlanError> {
        if !matches!(key, "rate" | "pattern" | "set") {
            return Err(PlanError::FixedKey(key.to_owned()));
        }
        let mut plan = self.registers.plan.clone();
        plan.set(key, value)?;
        self.registers.plan = plan.checked()?;
        Ok(())
    }

    /// Gives every page of the plan its first version, whatever the memory held before.
    pub fn fill(&mut self, memory: &mut impl PageMemory) {
        let (seed, zero) = (self.registers.plan.seed, self.registers.plan.zero_permille);
        for (page, version) in (0_u64..).zip(&mut self.registers.versions) {
            *version = 1;
            let image = PageImage::new(seed, page, 1, zero);
            (0..WORDS_PER_PAGE).for_each(|word| memory.store(page, word, image.word(word)));
        }
    }

    /// Writes the next `pages` pages.
    pub fn write(&mut self, memory: &mut impl PageMemory, pages: u64) {
        for _ in 0..pages {
            let page = self.next_page();
            self.renew(memory, page);
        }
        self.registers.writes = self.registers.writes.wrapping_add(pages);
    }

    fn next_page(&mut self) -> u64 {
        let set = self.registers.plan.working_set;
        match self.registers.plan.pattern {
            Pattern::Sequential => {
                let page = self.registers.cursor % set;
                self.registers.cursor = (page + 1) % set;
                page
            }
            Pattern::Random => below(next(&mut self.registers.random), set),
            Pattern::ZipfHot => scattered(below(fourth_power(next(&mut self.registers.random)), set), set),
        }
    }

    fn renew(&mut self, memory: &mut impl PageMemory, page: u64) {
        let Ok(place) = usize::try_from(page) else { return };
        let (seed, zero) = (self.registers.plan.seed, self.registers.plan.zero_permille);
        let old = self.registers.versions[place];
        let was = PageImage::new(seed, page, old, zero);
        let new = old.checked_add(1).unwrap_or(1);
        store(memory, page, &was, &PageImage::new(seed, page, new, zero));
        self.registers.versions[place] = new;
    }
}

/// Header last: a page stopped half way would not claim its new version.
fn store(memory: &mut impl PageMemory, page: u64, was: &PageImage, image: &PageImage) {
    if was.is_zero() != image.is_zero() {
        (HEADER_WORDS..WORDS_PER_PAGE).for_each(|word| memory.store(page, word, image.word(word)));
    } else if !image.is_zero() {
        (WORDS_PER_LINE..WORDS_PER_PAGE)
            .step_by(WORDS_PER_LINE)
            .for_each(|word| memory.store(page, word, image.word(word)));
    }
    (0..HEADER_WORDS).for_each(|word| memory.store(page, word, image.word(word)));
}

/// x to the fourth, for x in [0, 1) as 64 fraction bits.
fn fourth_power(x: u64) -> u64 {
    let square = |x: u64| below(x, x);
    square(square(x))
}

/// The page of rank `rank`: neighbours in rank are far apart in memory.
fn scattered(rank: u64, set: u64) -> u64 {
    u64::try_from(u128::from(rank) * u128::from(SCATTER) % u128::from(set)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::VecPages;
    use crate::verify::Verifier;

    fn plan(pattern: Pattern) -> Plan {
        Plan { seed: 3, pages: 64, working_set: 48, pattern, zero_permille: 300, ..Plan::default() }
    }

    #[test]
    fn whatever_was_written_verifies() {
        for pattern in [Pattern::Sequential, Pattern::Random, Pattern::ZipfHot] {
            let mut memory = VecPages::new(64);
            let mut writer = Writer::new(plan(pattern));
            writer.fill(&mut memory);
            for _ in 0..50 {
                writer.write(&mut memory, 37);
                let report = Verifier::new().all(&memory, writer.registers());
                assert!(report.is_clean(), "{pattern:?}: {report}");
            }
            assert_eq!(writer.registers().writes(), 50 * 37);
        }
    }

    #[test]
    fn filling_overwrites_what_was_there() {
        let (mut memory, mut writer) = (VecPages::new(64), Writer::new(plan(Pattern::Random)));
        (0..64).for_each(|page| *memory.page_mut(page) = [7; WORDS_PER_PAGE]);
        writer.fill(&mut memory);
        assert!(Verifier::new().all(&memory, writer.registers()).is_clean());
    }

    #[test]
    fn a_resumed_writer_does_what_the_first_would_have_done() {
        let (mut memory, mut writer) = (VecPages::new(64), Writer::new(plan(Pattern::ZipfHot)));
        writer.fill(&mut memory);
        writer.write(&mut memory, 100);
        let (mut copy, bytes) = (memory.clone(), writer.registers().save());
        let mut second = Writer::resume(Registers::load(&bytes, 64).unwrap());
        writer.write(&mut memory, 100);
        second.write(&mut copy, 100);
        assert_eq!(memory, copy);
        assert_eq!(writer.registers(), second.registers());
    }

    #[test]
    fn patterns_keep_to_the_working_set_and_hot_pages_are_hot() {
        let mut writer = Writer::new(Plan { pages: 1000, working_set: 1000, ..plan(Pattern::ZipfHot) });
        let mut counts = [0_u32; 1000];
        for _ in 0..100_000 {
            counts[usize::try_from(writer.next_page()).unwrap()] += 1;
        }
        counts.sort_unstable();
        let hottest: u32 = counts[900..].iter().sum();
        assert!((50_000..65_000).contains(&hottest), "the hottest tenth got {hottest} of 100000");
        assert!(counts[0] > 0, "every page is met");
    }
}
