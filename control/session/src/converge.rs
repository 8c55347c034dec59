//! When to switch over: as soon as the upper bound of the predicted blackout fits the limit, and not before.

use std::time::Duration;

use vmferry_datapath::{ByteLen, PageCount};

use crate::predict::{Forecast, Predictor};

/// What one round of pre-copy did; the driver measures, nothing here reads a clock.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoundReport {
    /// From 1; round 1 sends everything.
    pub round: u32,
    /// From the previous scan's start to this one's; zero in round 1.
    pub since_last_scan: Duration,
    /// How long the scan took.
    pub scan: Duration,
    /// Pages that the scan found dirty; all pages in round 1.
    pub dirty: PageCount,
    /// Pages sent, zero pages among them.
    pub sent: PageCount,
    /// Of these, pages that cost a bit because they were zero.
    pub zero: PageCount,
    /// Hot pages held back for the end, after this round.
    pub held: PageCount,
    /// Pages that no tracker covers: they travel in the blackout.
    pub pinned: PageCount,
    /// Bytes on the wire.
    pub wire: ByteLen,
    /// From the first page queued to the last one flushed.
    pub sending: Duration,
}

/// What the last round, in the blackout, did. `SourceSession::last_sent` takes it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LastReport {
    /// How long the last scan took.
    pub scan: Duration,
    /// Pages sent: dirty, held and pinned together.
    pub pages: PageCount,
    /// Of these, pinned ones.
    pub pinned: PageCount,
    /// Bytes on the wire.
    pub wire: ByteLen,
    /// From the first page queued to the last one flushed.
    pub sending: Duration,
}

/// What `--on-no-converge` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnNoConverge {
    /// End the move; the guest runs on at the source.
    #[default]
    Abort,
    /// Slow the guest down by steps, then end the move.
    Throttle,
    /// Switch over anyway, with the shortest blackout that was in reach.
    Force,
}

/// What is wanted of the switchover.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConvergePlan {
    /// `--downtime-limit`.
    pub downtime_limit: Duration,
    /// `--on-no-converge`.
    pub on_no_converge: OnNoConverge,
}

/// What follows a round.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Another one.
    Round,
    /// The blackout.
    Switchover,
    /// Slow the guest down, then another one.
    Throttle {
        /// CPU time taken away.
        percent: u8,
    },
    /// The end; the sentence says why the blackout cannot fit and what would make it fit.
    GiveUp(String),
}

/// What follows a round, and the prediction behind it.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What follows.
    pub next: Next,
    /// The blackout, if the switchover came now.
    pub forecast: Forecast,
}

/// Watches the rounds and decides after each.
#[derive(Clone, Debug)]
pub struct Converge {
    plan: ConvergePlan,
    predictor: Predictor,
}

impl Converge {
    /// Watches a move by `plan`.
    pub const fn new(plan: ConvergePlan, predictor: Predictor) -> Self {
        Self { plan, predictor }
    }

    /// The predictor, with what it learned so far.
    pub const fn predictor(&self) -> &Predictor {
        &self.predictor
    }

    /// A round ended: what follows?
    pub fn round_done(&mut self, report: &RoundReport) -> Decision {
        self.predictor.observe(report);
        let forecast = self.predictor.forecast();
        let fits = forecast.total.p95_ms <= self.plan.downtime_limit.as_secs_f64() * 1e3;
        let next = if fits && report.round > 1 { Next::Switchover } else { Next::Round };
        Decision { next, forecast }
    }

    /// The guest refused to be slowed down: decide without.
    pub fn throttle_failed(&mut self) {
        if self.plan.on_no_converge == OnNoConverge::Throttle {
            self.plan.on_no_converge = OnNoConverge::Abort;
        }
    }
}
