//! The source after Commit: in doubt until the target's word, then done.

use std::time::Duration;

use super::unwind::{Ended, Resuming};
use super::{Common, SourceAction, SourceEvent, SourceOutcome, SourceState, Step, Work};
use crate::error::{AbortReason, SessionError};
use crate::message::{AttemptId, Message};
use crate::token::{ProofOfRefusal, SealedToken};

/// Commit may be on its way: the target may run the guest, and only its word or the deadline ends this.
#[derive(Debug)]
pub struct InDoubt {
    common: Common,
    guest: SealedToken,
    until: Duration,
    line: Line,
    attempts: u32,
    last: String,
}

/// The target runs the guest; the source's VMM is being ended.
#[derive(Debug)]
pub struct Retiring(());

/// The way to the target, while in doubt.
#[derive(Debug)]
enum Line {
    /// Commit or Ask was written, and the connection stands.
    Up,
    /// A `ReconnectAndAsk` is in flight.
    Dialling,
    /// The next one is due then.
    Down { again_at: Duration },
}

impl InDoubt {
    pub(super) fn enter(common: Common, guest: SealedToken, now: Duration) -> Step {
        let until = now + common.limits.in_doubt;
        let last = "Commit was sent".to_owned();
        let state = Self { common, guest, until, line: Line::Up, attempts: 0, last };
        (SourceState::InDoubt(state), vec![SourceAction::Send(Message::Commit)])
    }

    /// Reconnections tried so far.
    pub const fn attempts(&self) -> u32 {
        self.attempts
    }

    pub(super) fn next_deadline(&self) -> Duration {
        match self.line {
            Line::Down { again_at } => again_at.min(self.until),
            Line::Up | Line::Dialling => self.until,
        }
    }

    pub(super) fn on(self, event: SourceEvent, now: Duration) -> Step {
        match event {
            SourceEvent::Message(message) => self.on_message(message, now),
            SourceEvent::Tick => self.on_tick(now),
            SourceEvent::ControlLost(why) | SourceEvent::PeerBroke(why) => self.on_lost(why, now),
            SourceEvent::Reconnected => self.on_reconnected(),
            SourceEvent::WorkFailed(Work::Reconnect, error) => self.on_dial_failed(&error, now),
            // Too late to cancel: the target may run the guest. The rest answers nothing that is in flight.
            SourceEvent::Cancel
            | SourceEvent::ThrottleFailed(_)
            | SourceEvent::LanesOpened
            | SourceEvent::Attached
            | SourceEvent::RoundDone(_)
            | SourceEvent::Paused(_)
            | SourceEvent::PauseFailed(..)
            | SourceEvent::LastSent
            | SourceEvent::StateSaved
            | SourceEvent::LanesFinished(_)
            | SourceEvent::SealRecorded
            | SourceEvent::Resumed(_)
            | SourceEvent::ResumeFailed(..)
            | SourceEvent::Retired
            | SourceEvent::RetireFailed(_)
            | SourceEvent::WorkFailed(..) => self.stay(),
        }
    }

    fn stay(self) -> Step {
        (SourceState::InDoubt(self), Vec::new())
    }

    fn on_message(self, message: Message, now: Duration) -> Step {
        match message {
            Message::Running(_) => self.on_running(),
            Message::NeverRan { attempt, reason } => self.on_never_ran(attempt, reason),
            Message::Unknown { .. } => {
                let last = "the target that answers now does not know how this attempt ended";
                self.ask_again_later(last.into(), now)
            }
            Message::Refuse(reason) => self.ask_again_later(reason.sentence().to_owned(), now),
            Message::Ping(number) => {
                (SourceState::InDoubt(self), vec![SourceAction::Send(Message::Pong(number))])
            }
            // Not an answer to Commit or Ask. A peer that talks nonsense now may still run the guest.
            Message::Offer(_)
            | Message::Answer(_)
            | Message::Final(_)
            | Message::Ready(_)
            | Message::Commit
            | Message::Ask { .. }
            | Message::Heard
            | Message::Abort(_)
            | Message::Pong(_) => self.stay(),
        }
    }

    fn ask_again_later(mut self, last: String, now: Duration) -> Step {
        self.last = last;
        if !matches!(self.line, Line::Dialling) {
            self.line = Line::Down { again_at: now + self.common.limits.ask_every };
        }
        self.stay()
    }

    fn on_running(self) -> Step {
        let actions = vec![
            SourceAction::Send(Message::Heard),
            SourceAction::CloseLanes,
            SourceAction::Detach,
            SourceAction::Retire(self.guest),
        ];
        (SourceState::Retiring(Retiring(())), actions)
    }

    fn on_never_ran(self, attempt: AttemptId, reason: AbortReason) -> Step {
        let Some(proof) = ProofOfRefusal::new(attempt, self.common.attempt) else { return self.stay() };
        let guest = self.guest.refused_by(proof);
        let (state, mut actions) = Resuming::enter(self.common, guest, SessionError::PeerEnded(reason));
        actions.push(SourceAction::Send(Message::Heard));
        (state, actions)
    }

    fn on_tick(mut self, now: Duration) -> Step {
        if now >= self.until {
            let in_flight = matches!(self.line, Line::Dialling).then_some(SourceAction::Interrupt);
            let outcome = SourceOutcome::InDoubt { last: self.last };
            let (state, actions) = Ended::sealed(self.guest, outcome);
            return (state, in_flight.into_iter().chain(actions).collect());
        }
        match self.line {
            Line::Down { again_at } if now >= again_at => {
                self.attempts = self.attempts.saturating_add(1);
                self.line = Line::Dialling;
                let ask = SourceAction::ReconnectAndAsk { attempt: self.attempts };
                (SourceState::InDoubt(self), vec![ask])
            }
            Line::Down { .. } | Line::Up | Line::Dialling => self.stay(),
        }
    }

    fn on_lost(mut self, why: String, now: Duration) -> Step {
        match self.line {
            Line::Up => {
                self.last = why;
                let pause = if self.attempts == 0 { Duration::ZERO } else { self.common.limits.ask_every };
                self.line = Line::Down { again_at: now + pause };
                self.on_tick(now)
            }
            Line::Dialling | Line::Down { .. } => self.stay(),
        }
    }

    fn on_reconnected(mut self) -> Step {
        if matches!(self.line, Line::Dialling) {
            self.line = Line::Up;
        }
        self.stay()
    }

    fn on_dial_failed(mut self, error: &SessionError, now: Duration) -> Step {
        if matches!(self.line, Line::Dialling) {
            self.line = Line::Up;
            return self.ask_again_later(error.to_string(), now);
        }
        self.stay()
    }
}

impl Retiring {
    pub(super) fn on(self, event: SourceEvent) -> Step {
        match event {
            SourceEvent::Retired => Ended::moved(None),
            SourceEvent::RetireFailed(error) => Ended::moved(Some(error)),
            SourceEvent::Message(_)
            | SourceEvent::ControlLost(_)
            | SourceEvent::PeerBroke(_)
            | SourceEvent::Cancel
            | SourceEvent::Tick
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
            | SourceEvent::Resumed(_)
            | SourceEvent::ResumeFailed(..)
            | SourceEvent::WorkFailed(..) => (SourceState::Retiring(self), Vec::new()),
        }
    }
}
