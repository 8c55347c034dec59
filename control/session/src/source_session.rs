//! The source's machine together with what watches it: convergence, phases, the record for the next prediction.

use std::time::Duration;

use vmferry_datapath::{ByteLen, PageCount};

use crate::converge::{Converge, ConvergePlan, LastReport, RoundReport};
use crate::limits::Limits;
use crate::message::{Message, Offer, TargetTimes};
use crate::phases::{PhaseLog, PhaseSpan};
use crate::predict::{Forecast, MoveRecord, Predictor};
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
    rounds: Vec<RoundReport>,
    last: LastReport,
    target: TargetTimes,
    now: Duration,
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
            rounds: Vec::new(),
            last: LastReport::default(),
            target: TargetTimes::default(),
            now,
        };
        (session, actions)
    }

    /// Answers `CopyRound`.
    pub fn round_done(&mut self, report: &RoundReport, now: Duration) -> Vec<SourceAction> {
        let decision = self.converge.round_done(report);
        self.rounds.push(*report);
        self.forecast = Some(decision.forecast);
        self.handle(SourceEvent::RoundDone(decision.next), now)
    }

    /// Answers `SendLast`.
    pub fn last_sent(&mut self, report: LastReport, now: Duration) -> Vec<SourceAction> {
        self.last = report;
        self.handle(SourceEvent::LastSent, now)
    }

    /// Everything else that happens.
    pub fn handle(&mut self, event: SourceEvent, now: Duration) -> Vec<SourceAction> {
        self.now = now;
        self.note(&event);
        let Some(state) = self.state.take() else { return Vec::new() };
        let (state, actions) = state.step(event, now);
        self.phases.enter(state.name(), now);
        self.state = Some(state);
        actions
    }

    fn note(&mut self, event: &SourceEvent) {
        if let SourceEvent::Message(Message::Ready(times) | Message::Running(times)) = event {
            self.target = *times;
        }
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
        let report = self.rounds.last().copied().unwrap_or_default();
        let per_second = |bytes: u64, time: Duration| bytes as f64 / time.as_secs_f64().max(1e-9);
        Progress {
            phase: self.phases.current(),
            round: report.round,
            sent: self.rounds.iter().fold(PageCount(0), |sum, r| sum.plus(r.sent)).bytes(),
            wire: self.rounds.iter().fold(ByteLen(0), |sum, r| sum.plus(r.wire)),
            remaining: report.sent.plus(report.held).bytes(),
            rate: per_second(report.wire.0, report.sending),
            dirty_rate: per_second(report.dirty.bytes().0, report.since_last_scan),
            throttle: match &self.state {
                Some(SourceState::Copying(copying)) => copying.throttle(),
                _ => 0,
            },
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

    /// From the order to stop until the word that the guest runs, once it does.
    pub fn blackout(&self) -> Option<Duration> {
        None
    }

    /// For the history, once the guest has moved.
    pub fn record(&self) -> Option<MoveRecord> {
        None
    }
}
