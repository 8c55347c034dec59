//! How many pages are due: a rate kept over time, with a bounded debt.
//!
//! A guest that was away for a second must not come back with a second's worth of writes at once: that would be a
//! dirty rate nobody asked for, and just after a move. What is more than `DEBT_MS_MAX` late is forgiven.

use std::time::Duration;

use crate::plan::Rate;

/// Writes older than this are never caught up.
const DEBT_MS_MAX: u64 = 50;
/// Pages in one go when there is no limit.
const PAGES_AT_ONCE: u64 = 256;

/// Counts what was written against what the rate allows; the clock comes in as `now`.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    rate: Rate,
    since: Duration,
    written: u64,
}

impl Pace {
    /// A pace that starts at `now` with no debt.
    #[must_use]
    pub fn new(rate: Rate, now: Duration) -> Self {
        Self { rate, since: now, written: 0 }
    }

    /// How many pages to write now.
    #[must_use]
    pub fn due(&mut self, now: Duration) -> u64 {
        let Rate::PagesPerSecond(rate) = self.rate else { return PAGES_AT_ONCE };
        let owed = pages_in(rate, now.saturating_sub(self.since)).saturating_sub(self.written);
        let debt_max = (rate.saturating_mul(DEBT_MS_MAX) / 1000).max(1);
        if owed > debt_max {
            *self = Self { written: 0, since: now, rate: self.rate };
            return debt_max;
        }
        owed
    }

    /// Takes note of pages that were written.
    pub fn wrote(&mut self, pages: u64) {
        self.written = self.written.saturating_add(pages);
    }

    /// True when there is no limit: the writer never sleeps.
    #[must_use]
    pub fn is_unlimited(&self) -> bool {
        self.rate == Rate::Max
    }
}

fn pages_in(rate: u64, time: Duration) -> u64 {
    u64::try_from(u128::from(rate) * time.as_micros() / 1_000_000).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_in_small_steps() {
        let mut pace = Pace::new(Rate::PagesPerSecond(1000), Duration::ZERO);
        let mut total = 0;
        for step in 1..=1000 {
            let due = pace.due(Duration::from_millis(step));
            pace.wrote(due);
            total += due;
        }
        assert_eq!(total, 1000);
    }

    #[test]
    fn a_long_absence_is_forgiven() {
        let mut pace = Pace::new(Rate::PagesPerSecond(1000), Duration::ZERO);
        assert_eq!(pace.due(Duration::from_secs(60)), 50);
        pace.wrote(50);
        assert_eq!(pace.due(Duration::from_secs(60)), 0);
    }
}
