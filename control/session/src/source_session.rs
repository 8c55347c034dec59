//! The source's machine together with what watches it: convergence, phases, the record for the next prediction.

use std::time::Duration;

use vmferry_datapath::{ByteLen, PageCount};

use crate::blackout::BlackoutWatch;
use crate::converge::{Converge, ConvergePlan, LastReport, RoundReport};
use crate::devices::{DeviceDrain, DeviceReport};
use crate::limits::Limits;
use crate::message::Offer;
use crate::phases::{PhaseLog, PhaseSpan};
use crate::predict::{DeviceRecord, Forecast, MoveRecord, Predictor};
use crate::source::{SourceAction, SourceEvent, SourceOutcome, SourceState};
use crate::token::RunningToken;

/// Everything that the operator and the hosts decide about a move.
#[derive(Clone, Debug)]
pub struct SourcePlan {
    /// What is offered.
    pub offer: Offer,
    /// Deadlines.
    pub limits: Limits,
    /// When to switch over.
    pub converge: ConvergePlan,
    /// Foresight, with the priors of this kind of guest and the history of its moves.
    pub predictor: Predictor,
}

/// What a person wants to see while a move runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Progress {
    /// The phase.
    pub phase: &'static str,
    /// The round that is on, or was last.
    pub round: u32,
    /// Page bytes sent so far, zero pages among them.
    pub sent: ByteLen,
    /// Bytes on the wire so far.
    pub wire: ByteLen,
    /// Page bytes that a switchover would have to send, as of the last scan.
    pub remaining: ByteLen,
    /// Wire bytes per second, in the last round.
    pub rate: f64,
    /// Page bytes dirtied per second, as of the last scan.
    pub dirty_rate: f64,
    /// CPU time taken away from the guest, percent.
    pub throttle: u8,
    /// The blackout, if the switchover came now.
    pub forecast: Option<Forecast>,
}

/// The sending side of one move.
#[derive(Debug)]
pub struct SourceSession {
    state: Option<SourceState>,
    converge: Converge,
    phases: PhaseLog,
    forecast: Option<Forecast>,
    tally: Tally,
    blackout: BlackoutWatch,
}

/// The rounds so far, as sums: a move of a thousand rounds keeps no thousand reports.
#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    latest: RoundReport,
    sent: PageCount,
    wire: ByteLen,
}

impl SourceSession {
    /// Begins a move: the driver holds an authenticated control connection, and the guest runs.
    pub fn begin(guest: RunningToken, plan: SourcePlan, now: Duration) -> (Self, Vec<SourceAction>) {
        let (state, actions) = SourceState::begin(guest, plan.offer, plan.limits, now);
        let session = Self {
            phases: PhaseLog::new(state.name(), now),
            state: Some(state),
            converge: Converge::new(plan.converge, plan.predictor),
            forecast: None,
            tally: Tally::default(),
            blackout: BlackoutWatch::default(),
        };
        (session, actions)
    }

    /// Answers `CopyRound`.
    pub fn round_done(&mut self, report: &RoundReport, now: Duration) -> Vec<SourceAction> {
        let decision = self.converge.round_done(report);
        self.tally = Tally {
            latest: *report,
            sent: self.tally.sent.plus(report.sent),
            wire: self.tally.wire.plus(report.wire),
        };
        self.forecast = Some(decision.forecast);
        self.handle(SourceEvent::RoundDone(decision.next), now)
    }

    /// Comes with an answer to `CopyRound`, before it: what the devices would add to the blackout.
    pub fn devices_seen(&mut self, devices: &[DeviceReport]) {
        self.converge.devices_seen(devices);
    }

    /// Comes with an answer to `SaveState`: what left of each device's state, and how much longer that took than the
    /// last pages and the VMM's own state.
    pub fn devices_drained(&mut self, devices: Vec<DeviceDrain>, longer: Duration) {
        self.blackout.devices_drained(devices, longer);
    }

    /// Answers `SendLast`.
    pub fn last_sent(&mut self, report: &LastReport, now: Duration) -> Vec<SourceAction> {
        self.blackout.last_sent(report);
        self.handle(SourceEvent::LastSent, now)
    }

    /// Answers `SaveState`; `took` by the worker's own clock, because saving may run beside the last pages.
    pub fn state_saved(&mut self, took: Duration, now: Duration) -> Vec<SourceAction> {
        self.blackout.state_saved(took);
        self.handle(SourceEvent::StateSaved, now)
    }

    /// Everything else that happens.
    pub fn handle(&mut self, event: SourceEvent, now: Duration) -> Vec<SourceAction> {
        self.note(&event, now);
        let Some(state) = self.state.take() else { return Vec::new() };
        let (state, actions) = state.step(event, now);
        self.phases.enter(state.name(), now);
        for action in &actions {
            self.blackout.begin(action, now);
        }
        self.state = Some(state);
        actions
    }

    fn note(&mut self, event: &SourceEvent, now: Duration) {
        self.blackout.end(event, now);
        if let SourceEvent::ThrottleFailed(_) = event {
            self.converge.throttle_failed();
        }
    }

    /// When the driver must post `Tick` at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        self.state.as_ref().and_then(SourceState::deadline)
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<&SourceOutcome> {
        self.state.as_ref().and_then(SourceState::outcome)
    }

    /// For the live line.
    pub fn progress(&self) -> Progress {
        let report = self.tally.latest;
        let per_second = |bytes: ByteLen, time: Duration| to_f64(bytes) / time.as_secs_f64().max(1e-6);
        let throttle =
            if let Some(SourceState::Copying(copying)) = &self.state { copying.throttle() } else { 0 };
        Progress {
            phase: self.phases.current(),
            round: report.round,
            sent: self.tally.sent.bytes(),
            wire: self.tally.wire,
            remaining: report.sent.plus(report.held).bytes(),
            rate: per_second(report.wire, report.sending),
            dirty_rate: if report.round > 1 {
                per_second(report.dirty.bytes(), report.since_last_scan)
            } else {
                0.0
            },
            throttle,
            forecast: self.forecast.clone(),
        }
    }

    /// For the report's `phases`.
    pub fn phases(&self) -> Vec<PhaseSpan> {
        self.phases.spans()
    }

    /// The prediction that the switchover was decided on, if it was.
    pub const fn forecast(&self) -> Option<&Forecast> {
        self.forecast.as_ref()
    }

    /// From the order to stop until the word that the guest runs, once that came: half a round trip too long.
    pub fn blackout(&self) -> Option<Duration> {
        self.blackout.total()
    }

    /// Each term of the blackout as measured so far, milliseconds.
    pub fn measured_ms(&self) -> std::collections::BTreeMap<crate::predict::Term, f64> {
        self.blackout.terms_ms()
    }

    /// What each device's state took, in the order of the streams; loads are known once the guest runs.
    pub fn device_records(&self) -> Vec<DeviceRecord> {
        self.blackout.device_records()
    }

    /// For the history, once the guest has moved.
    pub fn record(&self) -> Option<MoveRecord> {
        let forecast = self.forecast.clone()?;
        let blackout = self.blackout.total()?;
        let measured_ms = self.blackout.terms_ms();
        let devices = self.device_records();
        Some(MoveRecord { forecast, measured_ms, devices, blackout_ms: blackout.as_secs_f64() * 1e3 })
    }
}

#[expect(clippy::cast_precision_loss, reason = "for a person's eye")]
fn to_f64(bytes: ByteLen) -> f64 {
    bytes.0 as f64
}
