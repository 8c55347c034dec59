//! The source while the guest is paused and still its own.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a state leaves goes to `otherwise`, which lists every event"
)]

use std::collections::BTreeSet;
use std::time::Duration;

use super::{
    BeforeCommit, Common, GuardianBelief, Held, InDoubt, Parts, SourceAction, SourceEvent, SourceState,
};
use super::{Step, Work, millis, unwind};
use crate::error::SessionError;
use crate::message::{FinalTotals, Message};
use crate::token::{PausedToken, RunningToken};

/// The VMM was told to stop the guest; the driver holds the token.
#[derive(Debug)]
pub struct Pausing {
    pub(super) common: Common,
}

/// The last pages and the device state go out.
#[derive(Debug)]
pub struct SendingLast {
    pub(super) common: Common,
    guest: PausedToken,
    in_flight: BTreeSet<Work>,
}

/// What saving wrote goes out, and the end of every lane.
#[derive(Debug)]
pub struct Closing {
    pub(super) common: Common,
    guest: PausedToken,
}

/// Final is out; the target verifies and loads.
#[derive(Debug)]
pub struct AwaitingReady {
    pub(super) common: Common,
    guest: PausedToken,
    pub(super) until: Duration,
}

/// The guardian is told, and then the target.
#[derive(Debug)]
pub struct Sealing {
    pub(super) common: Common,
    guest: PausedToken,
}

impl Pausing {
    pub(super) fn enter(common: Common, guest: RunningToken) -> Step {
        (SourceState::Pausing(Self { common }), vec![SourceAction::Pause(guest)])
    }

    pub(super) fn on(mut self, event: SourceEvent, now: Duration) -> Step {
        match event {
            SourceEvent::Paused(guest) => {
                // The throttle would slow the VMM's saving too.
                let mut actions: Vec<_> = self.common.lift_throttle().into_iter().collect();
                actions.extend([SourceAction::SendLast, SourceAction::SaveState]);
                let in_flight = BTreeSet::from([Work::SendLast, Work::SaveState]);
                (SourceState::SendingLast(SendingLast { common: self.common, guest, in_flight }), actions)
            }
            SourceEvent::PauseFailed(guest, error) => {
                let parts =
                    Parts { common: self.common, held: Held::Paused(guest), in_flight: BTreeSet::new() };
                unwind::unwind(parts, error)
            }
            event => self.otherwise(event, now),
        }
    }
}

impl BeforeCommit for Pausing {
    const NAME: &'static str = "pausing";

    fn stay(self) -> SourceState {
        SourceState::Pausing(self)
    }

    fn into_parts(self) -> Parts {
        Parts { common: self.common, held: Held::Out, in_flight: BTreeSet::from([Work::Pause]) }
    }

    fn overdue(&self, now: Duration) -> Option<SessionError> {
        self.common.overdue_whole(now)
    }
}

impl SendingLast {
    pub(super) fn on(mut self, event: SourceEvent, now: Duration) -> Step {
        match event {
            SourceEvent::LastSent | SourceEvent::StateSaved => {
                let answered = event.answers().is_some_and(|work| self.in_flight.remove(&work));
                match (answered, self.in_flight.is_empty()) {
                    (false, _) => self.otherwise(event, now),
                    (true, false) => (self.stay(), Vec::new()),
                    (true, true) => {
                        let next = Closing { common: self.common, guest: self.guest };
                        (SourceState::Closing(next), vec![SourceAction::FinishLanes])
                    }
                }
            }
            event => self.otherwise(event, now),
        }
    }
}

impl BeforeCommit for SendingLast {
    const NAME: &'static str = "sending the last round";

    fn stay(self) -> SourceState {
        SourceState::SendingLast(self)
    }

    fn into_parts(self) -> Parts {
        Parts { common: self.common, held: Held::Paused(self.guest), in_flight: self.in_flight }
    }

    fn overdue(&self, now: Duration) -> Option<SessionError> {
        self.common.overdue_whole(now)
    }
}

impl Closing {
    pub(super) fn on(self, event: SourceEvent, now: Duration) -> Step {
        match event {
            SourceEvent::LanesFinished(totals) => self.on_finished(totals, now),
            event => self.otherwise(event, now),
        }
    }

    fn on_finished(self, totals: FinalTotals, now: Duration) -> Step {
        let until = now + self.common.limits.ready;
        let next = AwaitingReady { common: self.common, guest: self.guest, until };
        (SourceState::AwaitingReady(next), vec![SourceAction::Send(Message::Final(totals))])
    }
}

impl BeforeCommit for Closing {
    const NAME: &'static str = "closing the lanes";

    fn stay(self) -> SourceState {
        SourceState::Closing(self)
    }

    fn into_parts(self) -> Parts {
        let in_flight = BTreeSet::from([Work::FinishLanes]);
        Parts { common: self.common, held: Held::Paused(self.guest), in_flight }
    }

    fn overdue(&self, now: Duration) -> Option<SessionError> {
        self.common.overdue_whole(now)
    }
}

impl AwaitingReady {
    pub(super) fn on(mut self, event: SourceEvent, now: Duration) -> Step {
        match event {
            SourceEvent::Message(Message::Ready(_)) => {
                self.common.guardian = GuardianBelief::MaybeSealed;
                let next = Sealing { common: self.common, guest: self.guest };
                (SourceState::Sealing(next), vec![SourceAction::RecordSeal])
            }
            event => self.otherwise(event, now),
        }
    }
}

impl BeforeCommit for AwaitingReady {
    const NAME: &'static str = "waiting for Ready";

    fn stay(self) -> SourceState {
        SourceState::AwaitingReady(self)
    }

    fn into_parts(self) -> Parts {
        Parts { common: self.common, held: Held::Paused(self.guest), in_flight: BTreeSet::new() }
    }

    fn overdue(&self, now: Duration) -> Option<SessionError> {
        let limit_ms = millis(self.common.limits.ready);
        let silent = SessionError::PeerSilent { doing: "loading the device state", limit_ms };
        self.common.overdue(now, self.until, silent)
    }
}

impl Sealing {
    pub(super) fn on(self, event: SourceEvent, now: Duration) -> Step {
        match event {
            SourceEvent::SealRecorded => InDoubt::enter(self.common, self.guest.seal(), now),
            event => self.otherwise(event, now),
        }
    }
}

impl BeforeCommit for Sealing {
    const NAME: &'static str = "sealing";

    fn stay(self) -> SourceState {
        SourceState::Sealing(self)
    }

    fn into_parts(self) -> Parts {
        let in_flight = BTreeSet::from([Work::RecordSeal]);
        Parts { common: self.common, held: Held::Paused(self.guest), in_flight }
    }

    fn overdue(&self, now: Duration) -> Option<SessionError> {
        self.common.overdue_whole(now)
    }
}
