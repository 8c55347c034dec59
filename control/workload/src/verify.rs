//! Holds the memory against the registers and names what is wrong with a page.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::image::{HEADER_WORDS, PageImage, WORDS_PER_PAGE};
use crate::memory::PageMemory;
use crate::registers::Registers;

/// Faults kept with their page; more are only counted.
const FAULTS_KEPT_MAX: usize = 16;

/// How a page is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultKind {
    /// A complete page of an older version: a write was not carried over.
    Stale,
    /// A complete page of a version that was never written here: the registers are older than the memory.
    Ahead,
    /// Zero where data must be.
    Lost,
    /// Data where zero must be, or a page of another place or guest.
    Foreign,
    /// A right header over a wrong body, or no valid header at all.
    Torn,
}

/// One wrong page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// Which page.
    pub page: u64,
    /// How it is wrong.
    pub kind: FaultKind,
    /// The version it must have.
    pub version: u32,
    /// The version its header claims, where it has a valid one.
    pub found: Option<u32>,
}

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Pages looked at.
    pub pages: u64,
    /// Pages that were wrong.
    pub wrong: u64,
    /// The first of them.
    pub faults: Vec<Fault>,
}

impl Report {
    /// True when pages were looked at and none was wrong.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.pages > 0 && self.wrong == 0
    }

    fn note(&mut self, fault: Option<Fault>) {
        self.pages += 1;
        let Some(fault) = fault else { return };
        self.wrong += 1;
        if self.faults.len() < FAULTS_KEPT_MAX {
            self.faults.push(fault);
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} pages verified, {} wrong", self.pages, self.wrong)?;
        for Fault { page, kind, version, found } in &self.faults {
            write!(f, "; page {page} is {kind:?} (must be version {version}, claims {found:?})")?;
        }
        Ok(())
    }
}

/// Walks over the pages, all at once or a few at a time.
#[derive(Debug, Clone, Default)]
pub struct Verifier {
    cursor: u64,
    found: Report,
}

impl Verifier {
    /// A verifier that begins at page 0.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks at every page of the plan.
    #[must_use]
    pub fn all(&self, memory: &impl PageMemory, registers: &Registers) -> Report {
        let mut report = Report::default();
        (0..registers.plan.pages).for_each(|page| report.note(fault(memory, registers, page)));
        report
    }

    /// Looks at the next `pages` pages, and begins again after the last.
    pub fn some(&mut self, memory: &impl PageMemory, registers: &Registers, pages: u64) {
        for _ in 0..pages {
            self.found.note(fault(memory, registers, self.cursor));
            self.cursor = (self.cursor + 1) % registers.plan.pages;
        }
    }

    /// What `some` has found since the beginning.
    #[must_use]
    pub fn found(&self) -> &Report {
        &self.found
    }
}

fn fault(memory: &impl PageMemory, registers: &Registers, page: u64) -> Option<Fault> {
    let plan = &registers.plan;
    let version = registers.version(page);
    let must = PageImage::new(plan.seed, page, version, plan.zero_permille);
    if holds(memory, page, &must) {
        return None;
    }
    let header: [u64; HEADER_WORDS] = std::array::from_fn(|word| memory.load(page, word));
    let found = must.claimed_version(header);
    let complete = found.is_some_and(|found| {
        holds(memory, page, &PageImage::new(plan.seed, page, found, plan.zero_permille))
    });
    let kind = match found {
        Some(found) if complete && found < version => FaultKind::Stale,
        Some(_) if complete => FaultKind::Ahead,
        Some(_) => FaultKind::Torn,
        None if (0..WORDS_PER_PAGE).all(|word| memory.load(page, word) == 0) => FaultKind::Lost,
        None if header[0] == page && header[2] == plan.seed => FaultKind::Torn,
        None => FaultKind::Foreign,
    };
    Some(Fault { page, kind, version, found })
}

fn holds(memory: &impl PageMemory, page: u64, image: &PageImage) -> bool {
    (0..WORDS_PER_PAGE).all(|word| memory.load(page, word) == image.word(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::VecPages;
    use crate::plan::Plan;
    use crate::writer::Writer;

    fn written() -> (VecPages, Writer) {
        let plan = Plan { pages: 32, working_set: 32, zero_permille: 0, ..Plan::default() };
        let (mut memory, mut writer) = (VecPages::new(32), Writer::new(plan));
        writer.fill(&mut memory);
        writer.write(&mut memory, 500);
        (memory, writer)
    }

    fn verdict(damage: impl FnOnce(&mut VecPages, &mut Writer)) -> Vec<(u64, FaultKind)> {
        let (mut memory, mut writer) = written();
        damage(&mut memory, &mut writer);
        let report = Verifier::new().all(&memory, writer.registers());
        assert_eq!(report.pages, 32);
        report.faults.iter().map(|fault| (fault.page, fault.kind)).collect()
    }

    #[test]
    fn sound_memory_has_no_fault() {
        assert_eq!(verdict(|_, _| ()), []);
    }

    #[test]
    fn a_lost_page_is_found() {
        assert_eq!(verdict(|memory, _| *memory.page_mut(5) = [0; 512]), [(5, FaultKind::Lost)]);
    }

    #[test]
    fn a_stale_page_is_found() {
        let stale = verdict(|memory, writer| {
            let version = writer.registers().version(6) - 1;
            let old = PageImage::new(1, 6, version, 0);
            (0..512).for_each(|word| memory.page_mut(6)[word] = old.word(word));
        });
        assert_eq!(stale, [(6, FaultKind::Stale)]);
    }

    #[test]
    fn memory_newer_than_its_registers_is_found() {
        let ahead = verdict(|memory, writer| {
            let new = PageImage::new(1, 6, writer.registers().version(6) + 1, 0);
            (0..512).for_each(|word| memory.page_mut(6)[word] = new.word(word));
        });
        assert_eq!(ahead, [(6, FaultKind::Ahead)]);
    }

    #[test]
    fn one_cache_line_of_an_older_version_is_found() {
        let torn = verdict(|memory, writer| {
            let old = PageImage::new(1, 7, writer.registers().version(7) - 1, 0);
            memory.page_mut(7)[64] = old.word(64);
        });
        assert_eq!(torn, [(7, FaultKind::Torn)]);
    }

    #[test]
    fn a_swapped_page_is_foreign() {
        let swapped = verdict(|memory, _| {
            let other = *memory.page_mut(9);
            *memory.page_mut(8) = other;
        });
        assert_eq!(swapped, [(8, FaultKind::Foreign)]);
    }

    #[test]
    fn a_single_flipped_bit_anywhere_is_found() {
        for word in 0..512 {
            let faults = verdict(|memory, _| memory.page_mut(3)[word] ^= 1 << (word % 64));
            assert_eq!(faults.len(), 1, "word {word}");
        }
    }

    #[test]
    fn the_background_walk_meets_every_page() {
        let (mut memory, writer) = written();
        memory.page_mut(31)[100] ^= 1;
        let mut verifier = Verifier::new();
        for _ in 0..8 {
            verifier.some(&memory, writer.registers(), 4);
        }
        assert_eq!((verifier.found().pages, verifier.found().wrong), (32, 1));
    }
}
