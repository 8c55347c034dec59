//! The target until everything was sent: listen, prepare, receive.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a state leaves goes to `otherwise`, which lists every event"
)]

use std::time::Duration;

use super::blackout::SavedState;
use super::{BeforeReady, Common, Completing, Step, TargetAction, TargetEvent, TargetOutcome, TargetState};
use super::{TargetWork, end};
use crate::error::SessionError;
use crate::limits::Limits;
use crate::message::{FinalTotals, Message, Offer};
use crate::negotiate::{Agreement, TargetTerms, negotiate};
use crate::token::VacantToken;

/// Nobody has come yet, or only such as were refused.
#[derive(Debug)]
pub struct Listening {
    pub(super) limits: Limits,
    pub(super) guest: VacantToken,
    pub(super) terms: TargetTerms,
}

/// The guest is being prepared; the source waits for the Answer.
#[derive(Debug)]
pub struct Preparing {
    pub(super) common: Common,
    guest: VacantToken,
    agreement: Agreement,
}

/// Lanes carry pages.
#[derive(Debug)]
pub struct Receiving {
    pub(super) common: Common,
    guest: VacantToken,
    verify: bool,
    lanes: Lanes,
    since: Duration,
}

/// How far the lanes are.
#[derive(Debug)]
enum Lanes {
    /// Some are missing; a quick source may have sent its Final before the driver's word about the last lane.
    Opening { until: Duration, early: Option<(FinalTotals, SavedState)> },
    /// All are there.
    Open,
}

impl Listening {
    pub(super) fn on(self, event: TargetEvent, _now: Duration) -> Step {
        match event {
            TargetEvent::Message(Message::Offer(offer)) => self.on_offer(&offer),
            // A predecessor of this process may have run that guest: only ignorance is the truth.
            TargetEvent::Message(Message::Ask { attempt }) => {
                (TargetState::Listening(self), vec![TargetAction::Send(Message::Unknown { attempt })])
            }
            TargetEvent::Cancel => {
                end::Ended::enter(TargetOutcome::NeverRan { cause: SessionError::Cancelled })
            }
            TargetEvent::Message(_)
            | TargetEvent::ControlLost(_)
            | TargetEvent::PeerBroke(_)
            | TargetEvent::Tick
            | TargetEvent::Prepared
            | TargetEvent::LanesAccepted
            | TargetEvent::LanesFailed(_)
            | TargetEvent::RamComplete { .. }
            | TargetEvent::StateLoaded { .. }
            | TargetEvent::Ran { .. }
            | TargetEvent::RunFailed(_)
            | TargetEvent::Discarded
            | TargetEvent::WorkFailed(..) => (TargetState::Listening(self), Vec::new()),
        }
    }

    fn on_offer(self, offer: &Offer) -> Step {
        match negotiate(offer, &self.terms) {
            Err(reason) => (TargetState::Listening(self), vec![TargetAction::Send(Message::Refuse(reason))]),
            Ok(agreement) => {
                let common = Common { attempt: offer.attempt, limits: self.limits };
                let next = Preparing { common, guest: self.guest, agreement };
                (TargetState::Preparing(next), vec![TargetAction::Prepare(agreement)])
            }
        }
    }
}

impl Preparing {
    pub(super) fn on(self, event: TargetEvent, now: Duration) -> Step {
        match event {
            TargetEvent::Prepared => {
                let lanes = Lanes::Opening { until: now + self.common.limits.prepare, early: None };
                let verify = self.agreement.verify;
                let next = Receiving { common: self.common, guest: self.guest, verify, lanes, since: now };
                let answer = TargetAction::Send(Message::Answer(self.agreement));
                (TargetState::Receiving(next), vec![answer, TargetAction::AcceptLanes(self.agreement)])
            }
            event => self.otherwise(event),
        }
    }
}

impl BeforeReady for Preparing {
    const NAME: &'static str = "preparing its guest";

    fn stay(self) -> TargetState {
        TargetState::Preparing(self)
    }

    fn common(&self) -> Common {
        self.common
    }

    fn in_flight(&self) -> Option<TargetWork> {
        Some(TargetWork::Prepare)
    }
}

impl Receiving {
    pub(super) fn until(&self) -> Option<Duration> {
        match self.lanes {
            Lanes::Opening { until, .. } => Some(until),
            Lanes::Open => None,
        }
    }

    pub(super) fn on(self, event: TargetEvent, now: Duration) -> Step {
        match event {
            TargetEvent::LanesAccepted => self.on_accepted(),
            TargetEvent::Message(Message::Final(totals)) => self.on_final(totals, now),
            TargetEvent::Tick if self.until().is_some_and(|until| now >= until) => {
                let limit_ms = u64::try_from(self.common.limits.prepare.as_millis()).unwrap_or(u64::MAX);
                self.call_off(SessionError::PeerSilent { doing: "opening its lanes", limit_ms })
            }
            event => self.otherwise(event),
        }
    }

    fn on_accepted(self) -> Step {
        match self.lanes {
            Lanes::Opening { early: Some(told), .. } => {
                Completing::enter(self.common, self.guest, self.verify, told)
            }
            Lanes::Opening { early: None, .. } => {
                (TargetState::Receiving(Self { lanes: Lanes::Open, ..self }), Vec::new())
            }
            Lanes::Open => self.otherwise(TargetEvent::LanesAccepted),
        }
    }

    fn on_final(self, totals: FinalTotals, now: Duration) -> Step {
        let state = SavedState::told(&totals, self.since, now);
        match self.lanes {
            Lanes::Open => Completing::enter(self.common, self.guest, self.verify, (totals, state)),
            Lanes::Opening { until, early: None } => {
                let lanes = Lanes::Opening { until, early: Some((totals, state)) };
                (TargetState::Receiving(Self { lanes, ..self }), Vec::new())
            }
            Lanes::Opening { early: Some(_), .. } => self.on_stray_message(Message::Final(totals)),
        }
    }
}

impl BeforeReady for Receiving {
    const NAME: &'static str = "receiving";

    fn stay(self) -> TargetState {
        TargetState::Receiving(self)
    }

    fn common(&self) -> Common {
        self.common
    }

    fn in_flight(&self) -> Option<TargetWork> {
        matches!(self.lanes, Lanes::Opening { .. }).then_some(TargetWork::AcceptLanes)
    }
}
