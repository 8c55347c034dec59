//! The source on the way back: wait for what is in flight, give the guest its CPU, leave no trace.
//!
//! The order of an end is: lift the throttle, tell the guardian, resume the guest, tell the target, drop the lanes,
//! detach. The guest comes before the courtesy to a peer whose socket may block.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Common, Held, Parts, SourceAction, SourceEvent, SourceOutcome, SourceState, Step, Work};
use crate::error::SessionError;
use crate::limits::RESUME_TRIES;
use crate::message::Message;
use crate::token::{PausedToken, RunningToken, SealedToken};

/// The move is called off; actions in flight are awaited.
#[derive(Debug)]
pub struct Unwinding {
    common: Common,
    held: Held,
    in_flight: BTreeSet<Work>,
    cause: SessionError,
}

/// The VMM was told to let the guest run, or is about to be told again.
#[derive(Debug)]
pub struct Resuming {
    common: Common,
    cause: SessionError,
    turn: Turn,
    tries: u8,
}

/// Whose turn it is while resuming.
#[derive(Debug)]
enum Turn {
    /// `Resume` is in flight.
    Driver,
    /// It failed; the next try is due then.
    Wait { guest: PausedToken, again_at: Duration },
}

/// The move is over.
#[derive(Debug)]
pub struct Ended {
    outcome: SourceOutcome,
    #[expect(dead_code, reason = "the token ends here on purpose: nobody else may hold it")]
    guest: Remains,
}

/// What is left of the guest's token at the end.
#[derive(Debug)]
enum Remains {
    /// It runs here.
    Running(RunningToken),
    /// It is paused here, and nobody else has it.
    Paused(PausedToken),
    /// It is paused here, and the target may run it.
    Sealed(SealedToken),
    /// It is the target's.
    Gone,
}

/// Calls a move off that was not committed.
pub(super) fn unwind(mut parts: Parts, cause: SessionError) -> Step {
    let mut actions: Vec<_> = parts.common.lift_throttle().into_iter().collect();
    if !parts.in_flight.is_empty() {
        actions.insert(0, SourceAction::Interrupt);
    }
    let state = Unwinding { common: parts.common, held: parts.held, in_flight: parts.in_flight, cause };
    let (state, settled) = state.settle();
    actions.extend(settled);
    (state, actions)
}

impl Unwinding {
    pub(super) fn on(mut self, event: SourceEvent) -> Step {
        if let Some(work) = event.answers() {
            self.in_flight.remove(&work);
        }
        match event {
            SourceEvent::Paused(guest) | SourceEvent::PauseFailed(guest, _) => {
                self.held = Held::Paused(guest)
            }
            SourceEvent::Message(_)
            | SourceEvent::ControlLost(_)
            | SourceEvent::PeerBroke(_)
            | SourceEvent::Cancel
            | SourceEvent::Tick
            | SourceEvent::LanesOpened
            | SourceEvent::Attached
            | SourceEvent::RoundDone(_)
            | SourceEvent::ThrottleFailed(_)
            | SourceEvent::LastSent
            | SourceEvent::StateSaved
            | SourceEvent::LanesFinished(_)
            | SourceEvent::SealRecorded
            | SourceEvent::Reconnected
            | SourceEvent::Resumed(_)
            | SourceEvent::ResumeFailed(..)
            | SourceEvent::Retired
            | SourceEvent::RetireFailed(_)
            | SourceEvent::WorkFailed(..) => {}
        }
        self.settle()
    }

    /// Goes on as soon as nothing is in flight.
    fn settle(self) -> Step {
        if !self.in_flight.is_empty() {
            return (SourceState::Unwinding(self), Vec::new());
        }
        match self.held {
            Held::Paused(guest) => {
                let goodbye = goodbye(&self.cause);
                let (state, mut actions) = Resuming::enter(self.common, guest, self.cause);
                actions.extend(goodbye);
                (state, actions)
            }
            Held::Running(guest) => {
                let mut actions: Vec<_> = goodbye(&self.cause).into_iter().collect();
                let (state, end) = Ended::running(guest, self.cause);
                actions.extend(end);
                (state, actions)
            }
            // Only `Pause` takes the token out, and its answer brings it back.
            Held::Out => (SourceState::Unwinding(self), Vec::new()),
        }
    }
}

/// What the target is told. One that ended the move itself is told too: it need not wait for Asks any more.
fn goodbye(cause: &SessionError) -> Option<SourceAction> {
    let reachable = !matches!(cause, SessionError::LinkLost(_));
    reachable.then(|| SourceAction::Send(Message::Abort(cause.to_abort_reason())))
}

impl Resuming {
    pub(super) fn enter(mut common: Common, guest: PausedToken, cause: SessionError) -> Step {
        let mut actions: Vec<_> = common.lift_throttle().into_iter().chain(common.clear_seal()).collect();
        actions.push(SourceAction::Resume(guest));
        (SourceState::Resuming(Self { common, cause, turn: Turn::Driver, tries: 1 }), actions)
    }

    pub(super) fn next_try(&self) -> Option<Duration> {
        match self.turn {
            Turn::Wait { again_at, .. } => Some(again_at),
            Turn::Driver => None,
        }
    }

    pub(super) fn on(self, event: SourceEvent, now: Duration) -> Step {
        match event {
            SourceEvent::Resumed(guest) => Ended::running(guest, self.cause),
            SourceEvent::ResumeFailed(guest, refusal) => self.on_failed(guest, refusal, now),
            SourceEvent::Tick => self.on_tick(now),
            SourceEvent::Message(_)
            | SourceEvent::ControlLost(_)
            | SourceEvent::PeerBroke(_)
            | SourceEvent::Cancel
            | SourceEvent::LanesOpened
            | SourceEvent::Attached
            | SourceEvent::RoundDone(_)
            | SourceEvent::ThrottleFailed(_)
            | SourceEvent::Paused(_)
            | SourceEvent::PauseFailed(..)
            | SourceEvent::LastSent
            | SourceEvent::StateSaved
            | SourceEvent::LanesFinished(_)
            | SourceEvent::SealRecorded
            | SourceEvent::Reconnected
            | SourceEvent::Retired
            | SourceEvent::RetireFailed(_)
            | SourceEvent::WorkFailed(..) => (SourceState::Resuming(self), Vec::new()),
        }
    }

    fn on_failed(mut self, guest: PausedToken, refusal: SessionError, now: Duration) -> Step {
        if self.tries >= RESUME_TRIES {
            return Ended::paused(guest, self.cause, refusal);
        }
        self.turn = Turn::Wait { guest, again_at: now + self.common.limits.resume_every };
        (SourceState::Resuming(self), Vec::new())
    }

    fn on_tick(self, now: Duration) -> Step {
        match self.turn {
            Turn::Wait { guest, again_at } if now >= again_at => {
                let state = Self { turn: Turn::Driver, tries: self.tries + 1, ..self };
                (SourceState::Resuming(state), vec![SourceAction::Resume(guest)])
            }
            turn @ (Turn::Wait { .. } | Turn::Driver) => {
                (SourceState::Resuming(Self { turn, ..self }), Vec::new())
            }
        }
    }
}

impl Ended {
    pub(super) const fn outcome(&self) -> &SourceOutcome {
        &self.outcome
    }

    fn enter(outcome: SourceOutcome, guest: Remains) -> Step {
        let finish = SourceAction::Finish(outcome.clone());
        let actions = vec![SourceAction::CloseLanes, SourceAction::Detach, finish];
        (SourceState::Ended(Self { outcome, guest }), actions)
    }

    fn running(guest: RunningToken, cause: SessionError) -> Step {
        Self::enter(SourceOutcome::RunsHere { cause }, Remains::Running(guest))
    }

    fn paused(guest: PausedToken, cause: SessionError, refusal: SessionError) -> Step {
        Self::enter(SourceOutcome::PausedHere { cause, refusal }, Remains::Paused(guest))
    }

    pub(super) fn sealed(guest: SealedToken, outcome: SourceOutcome) -> Step {
        Self::enter(outcome, Remains::Sealed(guest))
    }

    /// Lanes and traces are gone already.
    pub(super) fn moved(left_behind: Option<SessionError>) -> Step {
        let outcome = SourceOutcome::Moved { left_behind };
        let finish = SourceAction::Finish(outcome.clone());
        (SourceState::Ended(Self { outcome, guest: Remains::Gone }), vec![finish])
    }
}
