//! What a workload shall do, in words that fit a kernel command line: `seed=1,pages=32768,set=4096,pattern=random,
//! rate=20MiB,zero=100`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::image::PAGE_BYTES;

/// The most pages a plan may name: 64 GiB, and a version table of 64 MiB.
const PAGES_MAX: u64 = 1 << 24;

/// Which page is written next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pattern {
    /// One after the other, then again.
    Sequential,
    /// Any page of the working set, all alike.
    Random,
    /// A few pages most of the time: the density of page rank x falls as x^-0.75, ranks scattered over the set.
    ZipfHot,
}

/// How fast pages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rate {
    /// So many pages in a second.
    PagesPerSecond(u64),
    /// As fast as the processor allows.
    Max,
}

/// A workload: which pages it owns and how it writes them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Everything random follows from it.
    pub seed: u64,
    /// Pages that hold data from the start.
    pub pages: u64,
    /// The first so many of them are written again and again.
    pub working_set: u64,
    /// In which order.
    pub pattern: Pattern,
    /// How fast.
    pub rate: Rate,
    /// How many of a thousand page versions are zero pages.
    pub zero_permille: u16,
}

/// A plan that cannot be carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A word that is not key=value with a known key.
    #[error("the workload knows no '{0}': use seed, pages, set, pattern, rate or zero")]
    UnknownKey(String),
    /// A value that does not parse.
    #[error("the workload cannot read {key}={value}: {want}")]
    BadValue {
        /// The key.
        key: String,
        /// What was given.
        value: String,
        /// What would be right.
        want: &'static str,
    },
    /// A key that cannot change while the workload runs.
    #[error("a running workload cannot change '{0}': change rate, pattern or set, or start it anew")]
    FixedKey(String),
    /// Numbers that contradict each other.
    #[error("a workload of {pages} pages cannot have a working set of {working_set}: use 1 to {pages}")]
    WorkingSet {
        /// Pages of the plan.
        pages: u64,
        /// Working set asked for.
        working_set: u64,
    },
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            seed: 1,
            pages: 4096,
            working_set: 4096,
            pattern: Pattern::Random,
            rate: Rate::PagesPerSecond(1000),
            zero_permille: 100,
        }
    }
}

impl Plan {
    /// Changes one thing, as `key=value` says.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), PlanError> {
        let bad = |want| PlanError::BadValue { key: key.to_owned(), value: value.to_owned(), want };
        let number = || value.parse::<u64>().map_err(|_| bad("give a whole number"));
        match key {
            "seed" => self.seed = number()?,
            "pages" => self.pages = number()?,
            "set" => self.working_set = number()?,
            "pattern" => {
                self.pattern = value.parse().map_err(|()| bad("give sequential, random or zipf-hot"))?
            }
            "rate" => {
                self.rate = value.parse().map_err(|()| bad("give pages a second, N MiB a second, or max"))?
            }
            "zero" => {
                self.zero_permille =
                    value.parse().ok().filter(|share| *share <= 1000).ok_or_else(|| bad("give 0 to 1000"))?;
            }
            _ => return Err(PlanError::UnknownKey(key.to_owned())),
        }
        Ok(())
    }

    /// The same work done by `writers`: pages, working set and rate are shared, each has a seed of its own.
    pub fn shared_among(&self, writers: u64) -> Result<Vec<Self>, PlanError> {
        let writers = writers.clamp(1, self.pages);
        let share = |whole: u64, writer: u64| whole * (writer + 1) / writers - whole * writer / writers;
        let plans = (0..writers).map(|writer| {
            let pages = share(self.pages, writer);
            let rate = match self.rate {
                Rate::PagesPerSecond(rate) => Rate::PagesPerSecond(share(rate, writer)),
                Rate::Max => Rate::Max,
            };
            let working_set = share(self.working_set, writer).clamp(1, pages);
            Self { seed: self.seed.wrapping_add(writer), pages, working_set, rate, ..self.clone() }.checked()
        });
        plans.collect()
    }

    /// Refuses what cannot be carried out.
    pub fn checked(self) -> Result<Self, PlanError> {
        if !(1..=PAGES_MAX).contains(&self.pages) {
            let value = self.pages.to_string();
            return Err(PlanError::BadValue { key: "pages".to_owned(), value, want: "give 1 to 16777216" });
        }
        if self.working_set == 0 || self.working_set > self.pages {
            return Err(PlanError::WorkingSet { pages: self.pages, working_set: self.working_set });
        }
        Ok(self)
    }
}

impl FromStr for Plan {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let mut plan = Self::default();
        let mut set_given = false;
        for word in text.split(',').filter(|word| !word.is_empty()) {
            let (key, value) = word.split_once('=').ok_or_else(|| PlanError::UnknownKey(word.to_owned()))?;
            set_given |= key == "set";
            plan.set(key, value)?;
        }
        if !set_given {
            plan.working_set = plan.pages;
        }
        plan.checked()
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, pages, working_set, pattern, rate, zero_permille } = self;
        write!(
            f,
            "seed={seed},pages={pages},set={working_set},pattern={pattern},rate={rate},zero={zero_permille}"
        )
    }
}

impl FromStr for Pattern {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "sequential" => Ok(Self::Sequential),
            "random" => Ok(Self::Random),
            "zipf-hot" => Ok(Self::ZipfHot),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sequential => "sequential",
            Self::Random => "random",
            Self::ZipfHot => "zipf-hot",
        })
    }
}

impl FromStr for Rate {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "max" {
            return Ok(Self::Max);
        }
        let Some(mib) = text.strip_suffix("MiB") else {
            return text.parse().map(Self::PagesPerSecond).map_err(|_| ());
        };
        let mib: u64 = mib.parse().map_err(|_| ())?;
        mib.checked_mul((1 << 20) / PAGE_BYTES as u64).map(Self::PagesPerSecond).ok_or(())
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PagesPerSecond(pages) => write!(f, "{pages}"),
            Self::Max => f.write_str("max"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_reads_back_what_it_prints() {
        let plan: Plan = "seed=9,pages=512,set=64,pattern=zipf-hot,rate=2MiB,zero=250".parse().unwrap();
        assert_eq!(plan.rate, Rate::PagesPerSecond(512));
        assert_eq!(plan.to_string().parse::<Plan>().unwrap(), plan);
    }

    #[test]
    fn shares_add_up_to_the_whole() {
        let plan: Plan = "pages=1001,set=10,rate=100".parse().unwrap();
        let plans = plan.shared_among(3).unwrap();
        assert_eq!(plans.iter().map(|plan| plan.pages).sum::<u64>(), 1001);
        assert_eq!(plans.iter().map(|plan| plan.working_set).sum::<u64>(), 10);
        assert_eq!(plans[2].seed, plan.seed + 2);
    }

    #[test]
    fn wrong_words_are_refused_with_what_would_be_right() {
        for (text, part) in [
            ("seed", "knows no 'seed'"),
            ("colour=red", "knows no 'colour'"),
            ("pages=0", "give 1 to 16777216"),
            ("pages=10,set=11", "use 1 to 10"),
            ("rate=fast", "or max"),
            ("rate=99999999999999999MiB", "or max"),
            ("zero=1001", "0 to 1000"),
            ("pattern=round", "sequential, random"),
        ] {
            let message = text.parse::<Plan>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
