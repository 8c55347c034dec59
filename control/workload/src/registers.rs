//! A workload's registers: the version of each page and where the writer stands. For the process guest they are the
//! device state that travels last; they come from a peer, so reading them is bounded by what the reader expects.

use crate::plan::{Pattern, Plan, Rate};

const MAGIC: u64 = u64::from_le_bytes(*b"vmfwreg1");
const FIXED_WORDS: usize = 10;

/// All that a workload knows and its memory does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registers {
    /// What the workload does.
    pub plan: Plan,
    pub(crate) versions: Vec<u32>,
    pub(crate) random: u64,
    pub(crate) cursor: u64,
    pub(crate) writes: u64,
}

/// Registers that cannot be taken over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistersError {
    /// Not registers at all, or of another version of this program.
    #[error("the state is not a workload's registers: both sides must run the same vmferry version")]
    NotRegisters,
    /// It ends early or goes on too long.
    #[error("the workload's registers are {0}: the state stream is damaged")]
    WrongLength(&'static str),
    /// The pages do not fit the memory.
    #[error(
        "the workload's registers speak of {found} pages, this memory has {memory}: start the target alike"
    )]
    Pages {
        /// What the state says.
        found: u64,
        /// What there is.
        memory: u64,
    },
    /// A value that no plan can have.
    #[error("the workload's registers hold an impossible plan: the state stream is damaged")]
    ImpossiblePlan,
}

impl Registers {
    /// Registers of a workload whose memory is still all zero.
    #[must_use]
    pub fn new(plan: Plan) -> Self {
        let pages = usize::try_from(plan.pages).unwrap_or(0);
        Self { random: plan.seed, versions: vec![0; pages], cursor: 0, writes: 0, plan }
    }

    /// How many page writes were done in all.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// The version that `page` must hold.
    #[must_use]
    pub fn version(&self, page: u64) -> u32 {
        usize::try_from(page).ok().and_then(|page| self.versions.get(page)).copied().unwrap_or(0)
    }

    /// The registers as bytes: ten words, then the versions as LEB128.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        let plan = &self.plan;
        let pattern = match plan.pattern {
            Pattern::Sequential => 0,
            Pattern::Random => 1,
            Pattern::ZipfHot => 2,
        };
        let rate = match plan.rate {
            Rate::PagesPerSecond(pages) => pages,
            Rate::Max => u64::MAX,
        };
        let zero = u64::from(plan.zero_permille);
        let (random, cursor, writes) = (self.random, self.cursor, self.writes);
        let fixed: [u64; FIXED_WORDS] =
            [MAGIC, plan.seed, plan.pages, plan.working_set, pattern, rate, zero, random, cursor, writes];
        let mut bytes = Vec::with_capacity(FIXED_WORDS * 8 + self.versions.len() * 2);
        fixed.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        self.versions.iter().for_each(|version| push_varint(&mut bytes, *version));
        bytes
    }

    /// Reads what `save` wrote, for a memory of `memory_pages` pages.
    pub fn load(bytes: &[u8], memory_pages: u64) -> Result<Self, RegistersError> {
        let (fixed, mut rest) =
            bytes.split_at_checked(FIXED_WORDS * 8).ok_or(RegistersError::NotRegisters)?;
        let mut words = [0; FIXED_WORDS];
        for (word, bytes) in words.iter_mut().zip(fixed.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        }
        let [magic, seed, pages, working_set, pattern, rate, zero, random, cursor, writes] = words;
        if magic != MAGIC {
            return Err(RegistersError::NotRegisters);
        }
        if pages > memory_pages {
            return Err(RegistersError::Pages { found: pages, memory: memory_pages });
        }
        let pattern = match pattern {
            0 => Pattern::Sequential,
            1 => Pattern::Random,
            2 => Pattern::ZipfHot,
            _ => return Err(RegistersError::ImpossiblePlan),
        };
        let rate = if rate == u64::MAX { Rate::Max } else { Rate::PagesPerSecond(rate) };
        let zero_permille = u16::try_from(zero).map_err(|_| RegistersError::ImpossiblePlan)?;
        let plan = Plan { seed, pages, working_set, pattern, rate, zero_permille };
        let plan = plan.checked().map_err(|_| RegistersError::ImpossiblePlan)?;
        let mut registers = Self::new(plan);
        for version in &mut registers.versions {
            *version = take_varint(&mut rest)?;
        }
        if !rest.is_empty() {
            return Err(RegistersError::WrongLength("too long"));
        }
        Ok(Self { random, cursor: cursor % working_set, writes, ..registers })
    }
}

fn push_varint(bytes: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        bytes.push(0x80 | u8::try_from(value & 0x7f).unwrap_or(0));
        value >>= 7;
    }
    bytes.push(u8::try_from(value).unwrap_or(0));
}

fn take_varint(bytes: &mut &[u8]) -> Result<u32, RegistersError> {
    let mut value = 0_u64;
    for shift in [0, 7, 14, 21, 28] {
        let (first, rest) = bytes.split_first().ok_or(RegistersError::WrongLength("cut short"))?;
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        if first & 0x80 == 0 {
            return u32::try_from(value).map_err(|_| RegistersError::WrongLength("not numbers"));
        }
    }
    Err(RegistersError::WrongLength("not numbers"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn some(pages: u64) -> Registers {
        let mut registers = Registers::new(Plan { pages, working_set: pages, ..Plan::default() });
        for (page, version) in (0_u32..).zip(&mut registers.versions) {
            *version = page.wrapping_mul(2_654_435_761) >> (page % 32);
        }
        registers.writes = 77;
        registers
    }

    #[test]
    fn registers_survive_the_trip() {
        let registers = some(300);
        assert_eq!(Registers::load(&registers.save(), 300), Ok(registers));
    }

    #[test]
    fn too_many_pages_and_wrong_lengths_are_refused() {
        let bytes = some(300).save();
        assert_eq!(Registers::load(&bytes, 299), Err(RegistersError::Pages { found: 300, memory: 299 }));
        assert_eq!(
            Registers::load(&bytes[..bytes.len() - 1], 300),
            Err(RegistersError::WrongLength("cut short"))
        );
        let longer = [bytes, vec![0]].concat();
        assert_eq!(Registers::load(&longer, 300), Err(RegistersError::WrongLength("too long")));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_grow(mut bytes in prop::collection::vec(any::<u8>(), 0..400), real: bool) {
            if real {
                let mut saved = some(32).save();
                for (at, byte) in bytes.iter().enumerate().take(4) {
                    let place = (usize::from(*byte) * 7 + at) % saved.len();
                    saved[place] ^= byte;
                }
                bytes = saved;
            }
            if let Ok(registers) = Registers::load(&bytes, 64) {
                prop_assert!(registers.versions.len() <= 64);
            }
        }
    }
}
