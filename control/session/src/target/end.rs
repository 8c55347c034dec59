//! The target's ends, and how long it stays to answer for them.
//!
//! A source in doubt asks on a new connection. Whoever may be asked lingers: `Ran` says Running, `Refused` says
//! NeverRan, `Lost` says Unknown. `Heard` or the deadline lets it go.

use std::time::Duration;

use super::{Common, Step, TargetAction, TargetEvent, TargetOutcome, TargetState, TargetWork};
use crate::error::SessionError;
use crate::message::{AttemptId, Message, TargetTimes};

/// The move is called off; the action in flight is awaited.
#[derive(Debug)]
pub struct Unwinding {
    pub(super) common: Common,
    in_flight: TargetWork,
    cause: SessionError,
}

/// What was received is being thrown away.
#[derive(Debug)]
pub struct Discarding {
    pub(super) common: Common,
    cause: SessionError,
    asker: Asker,
}

/// Who may ask how a discarded move ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asker {
    /// Ready was never sent, so the source's guest was never sealed; or the source called the move off itself.
    Nobody,
    /// The source may be in doubt.
    Source,
}

/// The guest runs here; a source that did not hear it may ask.
#[derive(Debug)]
pub struct Ran {
    pub(super) common: Common,
    times: TargetTimes,
    pub(super) until: Duration,
}

/// The guest never ran here and never will; a source in doubt may ask.
#[derive(Debug)]
pub struct Refused {
    pub(super) common: Common,
    cause: SessionError,
    pub(super) until: Duration,
}

/// Commit arrived, and the VMM's answer to it is not known.
#[derive(Debug)]
pub struct Lost {
    pub(super) common: Common,
    cause: SessionError,
    pub(super) until: Duration,
}

/// The move is over.
#[derive(Debug)]
pub struct Ended {
    outcome: TargetOutcome,
}

/// What a lingering end is asked.
enum Asked {
    /// How it ended.
    Again,
    /// Nothing any more.
    Enough,
    /// Something else.
    Nothing,
    /// Whether it is there.
    Ping(u64),
}

fn asked(event: &TargetEvent, attempt: AttemptId, over: bool) -> Asked {
    match event {
        TargetEvent::Message(Message::Commit) => Asked::Again,
        TargetEvent::Message(Message::Ask { attempt: about }) if *about == attempt => Asked::Again,
        TargetEvent::Message(Message::Ping(number)) => Asked::Ping(*number),
        TargetEvent::Message(Message::Heard | Message::Abort(_)) => Asked::Enough,
        TargetEvent::Tick if over => Asked::Enough,
        TargetEvent::Message(_)
        | TargetEvent::ControlLost(_)
        | TargetEvent::PeerBroke(_)
        | TargetEvent::Cancel
        | TargetEvent::Tick
        | TargetEvent::Prepared
        | TargetEvent::LanesAccepted
        | TargetEvent::LanesFailed(_)
        | TargetEvent::RamComplete { .. }
        | TargetEvent::StateLoaded { .. }
        | TargetEvent::Ran { .. }
        | TargetEvent::RunFailed(_)
        | TargetEvent::Discarded
        | TargetEvent::WorkFailed(..) => Asked::Nothing,
    }
}

/// Calls a move off before Ready. The source is told at once, so that it need not wait for the discarding.
pub(super) fn unwind(common: Common, in_flight: Option<TargetWork>, cause: SessionError) -> Step {
    let mut actions = Vec::new();
    if !matches!(cause, SessionError::LinkLost(_) | SessionError::PeerEnded(_)) {
        actions.push(TargetAction::Send(Message::Abort(cause.to_abort_reason())));
    }
    if let Some(in_flight) = in_flight {
        actions.insert(0, TargetAction::Interrupt);
        return (TargetState::Unwinding(Unwinding { common, in_flight, cause }), actions);
    }
    let (state, discard) = Discarding::called_off(common, cause);
    actions.extend(discard);
    (state, actions)
}

impl Unwinding {
    pub(super) fn on(self, event: &TargetEvent) -> Step {
        if event.answers() == Some(self.in_flight) {
            return Discarding::called_off(self.common, self.cause);
        }
        (TargetState::Unwinding(self), Vec::new())
    }
}

impl Discarding {
    /// From Ready on, when this side ends the move: the source does not know that yet.
    pub(super) fn enter(common: Common, cause: SessionError) -> Step {
        (TargetState::Discarding(Self { common, cause, asker: Asker::Source }), vec![TargetAction::Discard])
    }

    /// Before Ready, or when the source called the move off: it has its guest, and asks nothing any more.
    pub(super) fn called_off(common: Common, cause: SessionError) -> Step {
        (TargetState::Discarding(Self { common, cause, asker: Asker::Nobody }), vec![TargetAction::Discard])
    }

    pub(super) fn on(mut self, event: &TargetEvent, now: Duration) -> Step {
        if matches!(event, TargetEvent::Message(Message::Abort(_))) {
            self.asker = Asker::Nobody;
        }
        if *event != TargetEvent::Discarded {
            // A Commit or an Ask that comes now is answered below: the connection it came on is the newest.
            return (TargetState::Discarding(self), Vec::new());
        }
        if self.asker == Asker::Nobody {
            return Ended::enter(TargetOutcome::NeverRan { cause: self.cause });
        }
        let until = now + self.common.limits.linger;
        let state = Refused { common: self.common, cause: self.cause, until };
        let answer = state.answer();
        (TargetState::Refused(state), vec![answer])
    }
}

impl Refused {
    fn answer(&self) -> TargetAction {
        let reason = self.cause.to_abort_reason();
        TargetAction::Send(Message::NeverRan { attempt: self.common.attempt, reason })
    }

    pub(super) fn on(self, event: &TargetEvent, now: Duration) -> Step {
        match asked(event, self.common.attempt, now >= self.until) {
            Asked::Again => {
                let answer = self.answer();
                (TargetState::Refused(self), vec![answer])
            }
            Asked::Enough => Ended::enter(TargetOutcome::NeverRan { cause: self.cause }),
            Asked::Nothing => (TargetState::Refused(self), Vec::new()),
            Asked::Ping(number) => {
                (TargetState::Refused(self), vec![TargetAction::Send(Message::Pong(number))])
            }
        }
    }
}

impl Ran {
    pub(super) fn enter(common: Common, times: TargetTimes, now: Duration) -> Step {
        let until = now + common.limits.linger;
        let answer = TargetAction::Send(Message::Running(times));
        (TargetState::Ran(Self { common, times, until }), vec![answer])
    }

    pub(super) fn on(self, event: &TargetEvent, now: Duration) -> Step {
        match asked(event, self.common.attempt, now >= self.until) {
            Asked::Again => {
                let answer = TargetAction::Send(Message::Running(self.times));
                (TargetState::Ran(self), vec![answer])
            }
            Asked::Enough => Ended::enter(TargetOutcome::RunsHere),
            Asked::Nothing => (TargetState::Ran(self), Vec::new()),
            Asked::Ping(number) => (TargetState::Ran(self), vec![TargetAction::Send(Message::Pong(number))]),
        }
    }
}

impl Lost {
    pub(super) fn enter(common: Common, cause: SessionError, now: Duration) -> Step {
        let until = now + common.limits.linger;
        let answer = TargetAction::Send(Message::Unknown { attempt: common.attempt });
        (TargetState::Lost(Self { common, cause, until }), vec![answer])
    }

    pub(super) fn on(self, event: &TargetEvent, now: Duration) -> Step {
        match asked(event, self.common.attempt, now >= self.until) {
            Asked::Again => {
                let attempt = self.common.attempt;
                (TargetState::Lost(self), vec![TargetAction::Send(Message::Unknown { attempt })])
            }
            Asked::Enough => Ended::enter(TargetOutcome::Unknown { cause: self.cause }),
            Asked::Nothing => (TargetState::Lost(self), Vec::new()),
            Asked::Ping(number) => (TargetState::Lost(self), vec![TargetAction::Send(Message::Pong(number))]),
        }
    }
}

impl Ended {
    pub(super) const fn outcome(&self) -> &TargetOutcome {
        &self.outcome
    }

    pub(super) fn enter(outcome: TargetOutcome) -> Step {
        let finish = TargetAction::Finish(outcome.clone());
        (TargetState::Ended(Self { outcome }), vec![finish])
    }
}
