//! The target's machine together with its phases.

use std::time::Duration;

use crate::limits::Limits;
use crate::message::AttemptId;
use crate::negotiate::TargetTerms;
use crate::phases::{PhaseLog, PhaseSpan};
use crate::target::{TargetAction, TargetEvent, TargetOutcome, TargetState};
use crate::token::VacantToken;

/// The receiving side of one move.
#[derive(Debug)]
pub struct TargetSession {
    state: Option<TargetState>,
    phases: PhaseLog,
}

impl TargetSession {
    /// Begins to listen for one move into the empty guest.
    pub fn listen(guest: VacantToken, terms: TargetTerms, limits: Limits, now: Duration) -> Self {
        let state = TargetState::listen(guest, terms, limits);
        Self { phases: PhaseLog::new(state.name(), now), state: Some(state) }
    }

    /// What to do about an event.
    pub fn handle(&mut self, event: TargetEvent, now: Duration) -> Vec<TargetAction> {
        let Some(state) = self.state.take() else { return Vec::new() };
        let (state, actions) = state.step(event, now);
        self.phases.enter(state.name(), now);
        self.state = Some(state);
        actions
    }

    /// When the driver must post `Tick` at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        self.state.as_ref().and_then(TargetState::deadline)
    }

    /// How it ended, once it has.
    pub fn outcome(&self) -> Option<&TargetOutcome> {
        self.state.as_ref().and_then(TargetState::outcome)
    }

    /// The attempt that is going on, once one is; a second connection must Ask about this one.
    pub fn attempt(&self) -> Option<AttemptId> {
        self.state.as_ref().and_then(TargetState::attempt)
    }

    /// The phase.
    pub const fn phase(&self) -> &'static str {
        self.phases.current()
    }

    /// For the report's `phases`.
    pub fn phases(&self) -> Vec<PhaseSpan> {
        self.phases.spans()
    }
}
