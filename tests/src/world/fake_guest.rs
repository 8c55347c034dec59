//! A fake guest: a few pages, a register, and the question whether it runs.

use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use super::Dice;

/// Pages of a fake guest.
pub(super) const PAGES: usize = 48;
/// Pages that it writes most of the time.
const HOT: usize = 4;

/// A guest and its VMM, which live on when a driver dies.
#[derive(Clone, Debug)]
pub struct FakeGuest {
    pages: Vec<u64>,
    register: Option<u64>,
    runs: bool,
    /// It was retired, or discarded: it can never run again.
    gone: bool,
    dirty: BTreeSet<usize>,
    tracked: bool,
    throttle: u8,
    was_throttled: bool,
}

impl FakeGuest {
    /// A guest that runs, with something in its memory.
    pub fn with_content(dice: &mut Dice) -> Self {
        let pages = (0..PAGES).map(|_| dice.any()).collect();
        Self {
            pages,
            register: Some(dice.any()),
            runs: true,
            gone: false,
            dirty: BTreeSet::new(),
            tracked: false,
            throttle: 0,
            was_throttled: false,
        }
    }

    /// The empty guest at the target.
    pub fn vacant_twin(&self) -> Self {
        Self { pages: vec![0; PAGES], register: None, runs: false, ..self.clone() }
    }

    /// Whether it runs.
    pub const fn runs(&self) -> bool {
        self.runs
    }

    /// Whether a tracker is attached.
    pub const fn tracked(&self) -> bool {
        self.tracked
    }

    /// Percent that it is slowed down by.
    pub const fn throttle(&self) -> u8 {
        self.throttle
    }

    /// Whether it ever was slowed down.
    pub const fn was_throttled(&self) -> bool {
        self.was_throttled
    }

    /// Slows it down.
    pub fn set_throttle(&mut self, percent: u8) {
        self.was_throttled |= percent > 0;
        self.throttle = percent;
    }

    /// Starts tracking.
    pub fn attach(&mut self) {
        self.tracked = true;
        self.dirty.clear();
    }

    /// Leaves no trace.
    pub fn detach(&mut self) {
        self.tracked = false;
    }

    /// It runs a little: its register moves on, some pages change.
    pub fn live(&mut self, dice: &mut Dice) {
        if !self.runs {
            return;
        }
        self.register = Some(dice.any());
        for _ in 0..dice.below(4) {
            let page = if dice.per_mille(700) { dice.index(HOT) } else { dice.index(PAGES) };
            self.write(page, dice.any());
        }
    }

    /// Saving the device state writes into guest memory sometimes, as virtio does.
    pub fn save(&mut self, dice: &mut Dice) -> u64 {
        if dice.per_mille(500) {
            self.write(dice.index(PAGES), dice.any());
        }
        self.register.unwrap_or(0)
    }

    fn write(&mut self, page: usize, content: u64) {
        self.pages[page] = content;
        self.dirty.insert(page);
    }

    /// The pages written since the last call.
    pub fn scan(&mut self) -> BTreeSet<usize> {
        std::mem::take(&mut self.dirty)
    }

    /// A page's content.
    pub fn read(&self, page: usize) -> u64 {
        self.pages[page]
    }

    /// A page arrives.
    pub fn fill(&mut self, page: usize, content: u64) {
        self.pages[page] = content;
    }

    /// The VMM stops it.
    pub fn pause(&mut self) {
        self.runs = false;
    }

    /// The VMM lets it run. The error is a broken law.
    pub fn run(&mut self) -> Result<(), String> {
        if self.gone {
            return Err("a guest that was retired or discarded was told to run".into());
        }
        self.runs = true;
        Ok(())
    }

    /// It can never run again. The error is a broken law: what runs is never thrown away.
    pub fn end(&mut self) -> Result<(), String> {
        if self.runs {
            return Err("a guest that runs was retired or discarded".into());
        }
        self.gone = true;
        Ok(())
    }

    /// The target's VMM loads the device state.
    pub fn load(&mut self, register: u64) {
        self.register = Some(register);
    }

    /// Clears its memory before the first page.
    pub fn clear(&mut self) {
        self.pages = vec![0; PAGES];
    }

    /// All memory in one number, as text.
    pub fn digest(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.pages.hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    /// It began where the other one stopped: no page stale, none lost, the register too.
    pub fn check_equal(&self, source: &Self) -> Result<(), String> {
        let stale: Vec<usize> = (0..PAGES).filter(|&page| self.pages[page] != source.pages[page]).collect();
        if !stale.is_empty() {
            return Err(format!("pages {stale:?} are stale at the target"));
        }
        if self.register != source.register {
            return Err("the device state at the target is not the source's".into());
        }
        Ok(())
    }
}
