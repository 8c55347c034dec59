//! When to switch over: as soon as the upper bound of the predicted blackout fits the limit, and not before.
//!
//! ```text
//!   after each round:  p95 fits the limit ──────────────► Switchover
//!                      p95 still falls, round by round ─► Round
//!                      neither ─────────────────────────► --on-no-converge: GiveUp · Throttle, Round … · Switchover
//! ```
//!
//! There is no fixed number of rounds: rounds go on for as long as they shorten the blackout, and a guest whose hot
//! pages outrun the link is recognised by rounds that do not. What must never happen: giving up without saying what
//! would help.

use std::time::Duration;

use vmferry_datapath::{ByteLen, PAGE_BYTES, PageCount};

use crate::devices::DeviceReport;
use crate::predict::{DeviceForecast, Forecast, Predictor};

/// Rounds without progress after which a move is stuck.
const PATIENCE: u32 = 3;
/// The same while the middle of the forecast fits: the interval is wide because a host hiccuped, and a few calm rounds
/// narrow it.
const PATIENCE_WHEN_NEAR: u32 = 25;
/// Progress is a p95 below this share of the best so far.
const PROGRESS: f64 = 0.93;
/// A guest that has not converged by then is stuck, whatever the trend.
const ROUNDS_MAX: u32 = 100;
/// Percent of CPU time taken away, step by step.
const THROTTLE_STEPS: [u8; 8] = [20, 40, 60, 75, 85, 92, 96, 99];
/// A forced switchover waits for a blackout within this factor of the best that was in reach …
const FORCE_NEAR_BEST: f64 = 1.1;
/// … for at most so many rounds more.
const FORCE_PATIENCE: u32 = 8;

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
    /// A flush of lanes that carried nothing, before the first page of round 1; zero where none was measured.
    pub empty_flush: Duration,
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
    best_p95_ms: f64,
    /// The least that devices had left to pre-copy.
    best_devices: Option<ByteLen>,
    stale_rounds: u32,
    throttle_steps: usize,
}

impl Converge {
    /// Watches a move by `plan`.
    pub const fn new(plan: ConvergePlan, predictor: Predictor) -> Self {
        Self {
            plan,
            predictor,
            best_p95_ms: f64::INFINITY,
            best_devices: None,
            stale_rounds: 0,
            throttle_steps: 0,
        }
    }

    /// The predictor, with what it learned so far.
    pub const fn predictor(&self) -> &Predictor {
        &self.predictor
    }

    /// What the devices would add to the blackout; comes before the round's own report.
    pub fn devices_seen(&mut self, devices: &[DeviceReport]) {
        self.predictor.observe_devices(devices);
    }

    /// A round ended: what follows?
    pub fn round_done(&mut self, report: &RoundReport) -> Decision {
        self.predictor.observe(report);
        let forecast = self.predictor.forecast();
        let next = self.decide(report, &forecast);
        Decision { next, forecast }
    }

    /// The guest refused to be slowed down: decide without.
    pub fn throttle_failed(&mut self) {
        self.throttle_steps = THROTTLE_STEPS.len();
    }

    fn limit_ms(&self) -> f64 {
        self.plan.downtime_limit.as_secs_f64() * 1e3
    }

    fn decide(&mut self, report: &RoundReport, forecast: &Forecast) -> Next {
        // After round 1 no scan has seen the guest write yet.
        if report.round <= 1 {
            return Next::Round;
        }
        let p95_ms = forecast.total.p95_ms;
        if p95_ms <= self.limit_ms() {
            return Next::Switchover;
        }
        let devices = self.predictor.shrinking_state();
        // A device of gigabytes pre-copies for many rounds, each of which is a small step.
        let pre_copied = self.best_devices.is_some_and(|best| devices < best);
        if p95_ms < self.best_p95_ms * PROGRESS || pre_copied {
            self.stale_rounds = 0;
        } else {
            self.stale_rounds += 1;
        }
        self.best_p95_ms = self.best_p95_ms.min(p95_ms);
        self.best_devices = Some(self.best_devices.map_or(devices, |best| best.min(devices)));
        let near = forecast.total.p50_ms <= self.limit_ms();
        let patience = if near { PATIENCE_WHEN_NEAR } else { PATIENCE };
        let stuck = self.stale_rounds >= patience || report.round >= ROUNDS_MAX;
        if stuck || self.is_out_of_reach(forecast) { self.stuck(report, forecast) } else { Next::Round }
    }

    /// Whether the blackout could not fit whatever rounds and throttle do.
    fn is_out_of_reach(&self, forecast: &Forecast) -> bool {
        self.is_over_at_least(forecast) && self.plan.on_no_converge != OnNoConverge::Force
    }

    /// Without a page to send it may not fit; or with those that no round can send it most likely does not: there the
    /// middle decides, because the width is the rate's, which calm rounds narrow.
    fn is_over_at_least(&self, forecast: &Forecast) -> bool {
        forecast.floor.p95_ms > self.limit_ms() || forecast.least.p50_ms > self.limit_ms()
    }

    fn stuck(&mut self, report: &RoundReport, forecast: &Forecast) -> Next {
        match self.plan.on_no_converge {
            OnNoConverge::Abort => Next::GiveUp(self.why(report, forecast)),
            OnNoConverge::Throttle if self.is_out_of_reach(forecast) || report.round >= ROUNDS_MAX => {
                Next::GiveUp(self.why(report, forecast))
            }
            OnNoConverge::Throttle => self.throttle(report, forecast),
            OnNoConverge::Force => {
                let near = forecast.total.p95_ms <= self.best_p95_ms * FORCE_NEAR_BEST;
                let waited = self.stale_rounds >= PATIENCE + FORCE_PATIENCE || report.round >= ROUNDS_MAX;
                if near || waited { Next::Switchover } else { Next::Round }
            }
        }
    }

    fn throttle(&mut self, report: &RoundReport, forecast: &Forecast) -> Next {
        let Some(&percent) = THROTTLE_STEPS.get(self.throttle_steps) else {
            return Next::GiveUp(self.why(report, forecast));
        };
        self.throttle_steps += 1;
        self.stale_rounds = 0;
        self.best_p95_ms = forecast.total.p95_ms;
        Next::Throttle { percent }
    }

    /// Why the blackout cannot fit, and what would make it fit.
    fn why(&self, report: &RoundReport, forecast: &Forecast) -> String {
        let limit = self.limit_ms();
        let needed = round_up(forecast.total.p95_ms.min(self.best_p95_ms) * 1.1);
        if self.is_over_at_least(forecast) {
            let floor = forecast.floor.p95_ms.max(forecast.least.p95_ms);
            let devices = said_of_devices(forecast);
            return format!(
                "the blackout cannot fit {limit:.0} ms: stopping, device state and resuming alone may take {floor:.0} ms\
                 {devices}; give --downtime-limit {needed}ms, or --on-no-converge force"
            );
        }
        let page = PAGE_BYTES as f64;
        let dirty_rate = count(report.dirty) * page / report.since_last_scan.as_secs_f64().max(1e-6);
        let send_rate = page * 1e3 / self.predictor.page_ms();
        let throttle = match (self.plan.on_no_converge, self.throttle_steps) {
            (OnNoConverge::Throttle, 0) => ", and it could not be slowed down".into(),
            (OnNoConverge::Throttle, _) => ", even slowed down".into(),
            (OnNoConverge::Abort | OnNoConverge::Force, _) => String::new(),
        };
        let slow_down = match self.plan.on_no_converge {
            OnNoConverge::Throttle => "more --bandwidth or --lanes",
            OnNoConverge::Abort | OnNoConverge::Force => "--on-no-converge throttle to slow the guest down",
        };
        format!(
            "the blackout cannot fit {limit:.0} ms{}: the guest dirties {}/s and the lanes carry {}/s{throttle}; {} are hot \
             (written again in every round) and the blackout would take {:.0} to {:.0} ms; give --downtime-limit {needed}ms, \
             {slow_down}, or --on-no-converge force",
            said_of_devices(forecast),
            size(dirty_rate),
            size(send_rate),
            size(count(report.held) * page),
            forecast.total.p05_ms,
            forecast.total.p95_ms,
        )
    }
}

/// What each device adds, in brackets behind a sentence that it may explain.
fn said_of_devices(forecast: &Forecast) -> String {
    let said: Vec<String> = forecast.devices.iter().flat_map(DeviceForecast::sentences).collect();
    if said.is_empty() { String::new() } else { format!(" ({})", said.join("; ")) }
}

/// To the next number that a person would type.
fn round_up(ms: f64) -> u64 {
    let step = if ms < 100.0 { 5.0 } else { 50.0 };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive time; `as` saturates"
    )]
    let rounded = ((ms / step).ceil() * step) as u64;
    rounded
}

fn size(bytes: f64) -> String {
    const MIB: f64 = 1_048_576.0;
    match bytes {
        _ if bytes >= 1024.0 * MIB => format!("{:.1} GiB", bytes / (1024.0 * MIB)),
        _ if bytes >= 10.0 * MIB => format!("{:.0} MiB", bytes / MIB),
        _ => format!("{:.1} MiB", bytes / MIB),
    }
}

#[expect(clippy::cast_precision_loss, reason = "page counts stay far below 2^52")]
fn count(pages: PageCount) -> f64 {
    pages.0 as f64
}
