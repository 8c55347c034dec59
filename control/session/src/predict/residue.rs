//! How many pages a switchover would have to send: those held back, and those that the guest writes between the
//! last scan and its pause.
//!
//! The scan of round k finds what was written since the scan before, over a time T. What would have been left had we
//! switched over there is exactly `sent + held` of that round, so every round is a measurement of the very number
//! that is to be predicted. New pages (those not held already) grow with T, but slower: the working set fills up.
//!
//! ```text
//!   new(T) = new_k · (T / T_k)^β       β = 1: every write hits another page;  β = 0: the working set is full
//! ```

use std::time::Duration;

use super::estimate::Estimate;
use crate::converge::RoundReport;

/// β before anything was seen, and its uncertainty.
const GROWTH_PRIOR: (f64, f64) = (0.7, 0.25);
/// Two times closer than this factor (e^0.2) say nothing about β.
const LOG_TIME_MIN: f64 = 0.2;
/// Added to both sides of a ratio of page counts: one page more or less is no factor of two.
const PAGES_SOFTENER: f64 = 8.0;
/// Share of all pages that is assumed to be written while round 1 runs.
const FIRST_SHARE: f64 = 0.05;

/// Watches the rounds' scans.
#[derive(Clone, Debug)]
pub(super) struct Residue {
    total: f64,
    held: f64,
    latest: Option<Sample>,
    growth_sum: f64,
    growth_weight: f64,
    error: Estimate,
    /// From the last scan's start to the end of its round: the guest wrote all that time.
    open: f64,
}

/// What one scan found.
#[derive(Clone, Copy, Debug)]
struct Sample {
    seconds: f64,
    new: f64,
}

impl Residue {
    pub(super) fn new() -> Self {
        Self {
            total: 0.0,
            held: 0.0,
            latest: None,
            growth_sum: GROWTH_PRIOR.0,
            growth_weight: 1.0,
            error: Estimate::from_interval((0.6, 1.7), 0.8),
            open: 0.0,
        }
    }

    pub(super) fn observe(&mut self, report: &RoundReport) {
        let left = count(report.sent.0) + count(report.held.0);
        if report.round <= 1 {
            self.total = left;
        } else {
            self.learn(Sample { seconds: seconds(report.since_last_scan), new: (left - self.held).max(0.0) });
        }
        self.held = count(report.held.0);
        self.open = seconds(report.scan + report.sending);
    }

    fn learn(&mut self, sample: Sample) {
        if let Some(before) = self.latest {
            let expected = self.grown(before, sample.seconds, self.growth());
            self.error.observe((sample.new + PAGES_SOFTENER) / (expected + PAGES_SOFTENER));
            let log_time = (sample.seconds / before.seconds).ln();
            if log_time.abs() >= LOG_TIME_MIN {
                let log_new = ((sample.new + PAGES_SOFTENER) / (before.new + PAGES_SOFTENER)).ln();
                self.growth_sum += (log_new / log_time).clamp(0.0, 1.0) * log_time.abs();
                self.growth_weight += log_time.abs();
            }
        }
        self.latest = Some(sample);
    }

    fn growth(&self) -> f64 {
        self.growth_sum / self.growth_weight
    }

    fn grown(&self, from: Sample, seconds: f64, growth: f64) -> f64 {
        (from.new * (seconds / from.seconds).powf(growth)).min(self.total.max(from.new))
    }

    /// Pages left if the guest were paused `extra` seconds from now, at two normal deviates.
    pub(super) fn at(&self, extra: f64, z_growth: f64, z_error: f64) -> f64 {
        let growth_sd = GROWTH_PRIOR.1 / self.growth_weight.sqrt();
        let growth = (self.growth() + growth_sd * z_growth).clamp(0.0, 1.0);
        let Some(latest) = self.latest else {
            return (self.total * FIRST_SHARE * (1.5 * z_error).exp()).min(self.total);
        };
        let new = self.grown(latest, self.open + extra, growth);
        let new = (new + PAGES_SOFTENER) * self.error.at(z_error) - PAGES_SOFTENER;
        (self.held + new.max(0.0)).min(self.total.max(self.held))
    }
}

fn seconds(time: Duration) -> f64 {
    time.as_secs_f64().max(1e-6)
}

#[expect(clippy::cast_precision_loss, reason = "page counts stay far below 2^52")]
fn count(pages: u64) -> f64 {
    pages as f64
}

#[cfg(test)]
mod tests {
    use vmferry_datapath::PageCount;

    use super::*;

    fn report(round: u32, ms: u64, sent: u64, held: u64) -> RoundReport {
        RoundReport {
            round,
            since_last_scan: Duration::from_millis(ms),
            sent: PageCount(sent),
            held: PageCount(held),
            sending: Duration::from_millis(ms / 2),
            ..RoundReport::default()
        }
    }

    #[test]
    fn an_idle_guest_leaves_next_to_nothing() {
        let mut residue = Residue::new();
        residue.observe(&report(1, 0, 100_000, 0));
        residue.observe(&report(2, 1000, 10, 0));
        assert!(residue.at(0.0, 0.0, 0.0) < 20.0);
    }

    #[test]
    fn a_full_working_set_teaches_that_time_does_not_matter() {
        let mut residue = Residue::new();
        residue.observe(&report(1, 0, 100_000, 0));
        for ms in [1000, 500, 250, 125, 62] {
            residue.observe(&report(2, ms, 20_000, 0));
        }
        assert!(residue.growth() < 0.25, "{}", residue.growth());
        assert!(residue.at(0.0, 0.0, 0.0) > 15_000.0);
    }

    #[test]
    fn held_pages_are_always_left() {
        let mut residue = Residue::new();
        residue.observe(&report(1, 0, 100_000, 0));
        residue.observe(&report(2, 1000, 500, 3_000));
        assert!(residue.at(0.0, -3.0, -3.0) >= 3_000.0);
    }
}
