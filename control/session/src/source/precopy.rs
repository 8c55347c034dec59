//! The source while the guest still runs: agree, prepare, copy rounds.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a state leaves goes to `otherwise`, which lists every event"
)]

use std::collections::BTreeSet;
use std::time::Duration;

use super::{BeforeCommit, Common, Held, Parts, Pausing, SourceAction, SourceEvent, SourceState, Step, Work};
use super::{millis, unwind};
use crate::converge::Next;
use crate::error::SessionError;
use crate::message::{Message, Offer};
use crate::negotiate::{Agreement, check_answer};
use crate::token::RunningToken;

/// The Offer is out; the Answer is awaited.
#[derive(Debug)]
pub struct Negotiating {
    pub(super) common: Common,
    pub(super) guest: RunningToken,
    pub(super) offer: Offer,
    pub(super) until: Duration,
}

/// Lanes are being opened and writers tracked.
#[derive(Debug)]
pub struct Preparing {
    pub(super) common: Common,
    guest: RunningToken,
    in_flight: BTreeSet<Work>,
    pub(super) until: Duration,
}

/// Rounds of pre-copy.
#[derive(Debug)]
pub struct Copying {
    pub(super) common: Common,
    guest: RunningToken,
    round: u32,
}

impl Negotiating {
    pub(super) fn on(self, event: SourceEvent, now: Duration) -> Step {
        match event {
            SourceEvent::Message(Message::Answer(agreement)) => self.on_answer(agreement, now),
            SourceEvent::Message(Message::Refuse(reason)) => {
                self.call_off(SessionError::Incompatible(reason.sentence().to_owned()))
            }
            event => self.otherwise(event, now),
        }
    }

    fn on_answer(self, agreement: Agreement, now: Duration) -> Step {
        if let Err(error) = check_answer(&self.offer, &agreement) {
            return self.call_off(error);
        }
        let until = now + self.common.limits.prepare;
        let in_flight = BTreeSet::from([Work::OpenLanes, Work::Attach]);
        let next = Preparing { common: self.common, guest: self.guest, in_flight, until };
        (SourceState::Preparing(next), vec![SourceAction::OpenLanes(agreement), SourceAction::Attach])
    }
}

impl BeforeCommit for Negotiating {
    const NAME: &'static str = "negotiating";

    fn stay(self) -> SourceState {
        SourceState::Negotiating(self)
    }

    fn into_parts(self) -> Parts {
        Parts { common: self.common, held: Held::Running(self.guest), in_flight: BTreeSet::new() }
    }

    fn overdue(&self, now: Duration) -> Option<SessionError> {
        let limit_ms = millis(self.common.limits.answer);
        let silent = SessionError::PeerSilent { doing: "preparing its guest", limit_ms };
        self.common.overdue(now, self.until, silent)
    }
}

impl Preparing {
    pub(super) fn on(mut self, event: SourceEvent, now: Duration) -> Step {
        match event {
            SourceEvent::LanesOpened | SourceEvent::Attached => {
                let answered = event.answers().is_some_and(|work| self.in_flight.remove(&work));
                match (answered, self.in_flight.is_empty()) {
                    (false, _) => self.otherwise(event, now),
                    (true, false) => (self.stay(), Vec::new()),
                    (true, true) => Copying { common: self.common, guest: self.guest, round: 0 }.copy(),
                }
            }
            event => self.otherwise(event, now),
        }
    }
}

impl BeforeCommit for Preparing {
    const NAME: &'static str = "preparing";

    fn stay(self) -> SourceState {
        SourceState::Preparing(self)
    }

    fn into_parts(self) -> Parts {
        Parts { common: self.common, held: Held::Running(self.guest), in_flight: self.in_flight }
    }

    fn overdue(&self, now: Duration) -> Option<SessionError> {
        let silent =
            SessionError::PeerSilent { doing: "opening lanes", limit_ms: millis(self.common.limits.prepare) };
        self.common.overdue(now, self.until, silent)
    }
}

impl Copying {
    /// The round in flight, from 1.
    pub const fn round(&self) -> u32 {
        self.round
    }

    /// Percent that the guest is slowed down by.
    pub const fn throttle(&self) -> u8 {
        self.common.throttle
    }

    pub(super) fn on(self, event: SourceEvent, now: Duration) -> Step {
        match event {
            SourceEvent::RoundDone(next) => self.on_round_done(next),
            event => self.otherwise(event, now),
        }
    }

    fn on_round_done(mut self, next: Next) -> Step {
        match next {
            Next::Round => self.copy(),
            Next::Throttle { percent } => {
                self.common.throttle = percent;
                let (state, mut actions) = self.copy();
                actions.insert(0, SourceAction::SetThrottle { percent });
                (state, actions)
            }
            Next::Switchover => Pausing::enter(self.common, self.guest),
            Next::GiveUp(why) => {
                let parts = Parts {
                    common: self.common,
                    held: Held::Running(self.guest),
                    in_flight: BTreeSet::new(),
                };
                unwind::unwind(parts, SessionError::NotConverging(why))
            }
        }
    }

    fn copy(self) -> Step {
        let round = self.round.saturating_add(1);
        (SourceState::Copying(Self { round, ..self }), vec![SourceAction::CopyRound { round }])
    }
}

impl BeforeCommit for Copying {
    const NAME: &'static str = "copying";

    fn stay(self) -> SourceState {
        SourceState::Copying(self)
    }

    fn into_parts(self) -> Parts {
        let in_flight = BTreeSet::from([Work::CopyRound]);
        Parts { common: self.common, held: Held::Running(self.guest), in_flight }
    }

    fn overdue(&self, now: Duration) -> Option<SessionError> {
        self.common.overdue_whole(now)
    }
}
