//! The target while the guest is paused: complete, load, wait for Commit, run.

#![expect(
    clippy::wildcard_enum_match_arm,
    reason = "what a state leaves goes to `otherwise`, which lists every event"
)]

use std::time::Duration;

use super::end::{Discarding, Lost, Ran};
use super::{BeforeReady, Common, RunFailure, Step, TargetAction, TargetEvent, TargetState, TargetWork};
use crate::error::SessionError;
use crate::message::{FinalTotals, Message, TargetTimes};
use crate::token::{LoadedToken, VacantToken};

/// Everything was sent; the lanes are checked against the totals.
#[derive(Debug)]
pub struct Completing {
    pub(super) common: Common,
    guest: VacantToken,
    verify: bool,
    totals: FinalTotals,
    state: SavedState,
}

/// When the source saved the VMM's state, as far as this side knows: two clocks, of which only differences count.
#[derive(Clone, Copy, Debug)]
pub(super) struct SavedState {
    age: Duration,
    told_at: Duration,
}

impl SavedState {
    /// As Final tells it when it comes in. What a peer tells cannot be older than the lanes that it came by: a guest's
    /// clock must not jump by more than the move took.
    pub(super) fn told(totals: &FinalTotals, lanes_since: Duration, now: Duration) -> SavedState {
        SavedState { age: totals.state_age().min(now.saturating_sub(lanes_since)), told_at: now }
    }

    fn age(self, now: Duration) -> Duration {
        self.age + now.saturating_sub(self.told_at)
    }
}

/// The VMM loads the device state; the driver holds the token.
#[derive(Debug)]
pub struct Loading {
    pub(super) common: Common,
    complete_us: u64,
}

/// The guest is whole and paused; Commit is awaited.
#[derive(Debug)]
pub struct Ready {
    pub(super) common: Common,
    guest: LoadedToken,
    times: TargetTimes,
    pub(super) until: Duration,
}

/// Commit arrived; the VMM was told to run the guest.
#[derive(Debug)]
pub struct Starting {
    pub(super) common: Common,
    times: TargetTimes,
}

impl Completing {
    pub(super) fn enter(
        common: Common,
        guest: VacantToken,
        verify: bool,
        (totals, state): (FinalTotals, SavedState),
    ) -> Step {
        let action = TargetAction::AwaitLanes(totals.clone());
        (TargetState::Completing(Self { common, guest, verify, totals, state }), vec![action])
    }

    pub(super) fn on(self, event: TargetEvent, now: Duration) -> Step {
        match event {
            TargetEvent::RamComplete { state_bytes, digest, complete_us } => {
                match self.check(state_bytes, digest.as_deref()) {
                    Ok(()) => {
                        let next = Loading { common: self.common, complete_us };
                        let load = TargetAction::LoadState(self.guest, self.state.age(now));
                        (TargetState::Loading(next), vec![load])
                    }
                    Err(error) => super::end::unwind(self.common, None, error),
                }
            }
            event => self.otherwise(event),
        }
    }

    fn check(&self, state_bytes: u64, digest: Option<&str>) -> Result<(), SessionError> {
        if state_bytes != self.totals.state_bytes {
            return Err(SessionError::PeerMisbehaved(format!(
                "it announced {} bytes of device state and sent {state_bytes}",
                self.totals.state_bytes
            )));
        }
        let equal = !self.verify || (digest.is_some() && digest == self.totals.digest.as_deref());
        if equal { Ok(()) } else { Err(SessionError::MemoryDiffers) }
    }
}

impl BeforeReady for Completing {
    const NAME: &'static str = "checking what arrived";

    fn stay(self) -> TargetState {
        TargetState::Completing(self)
    }

    fn common(&self) -> Common {
        self.common
    }

    fn in_flight(&self) -> Option<TargetWork> {
        Some(TargetWork::AwaitLanes)
    }
}

impl Loading {
    pub(super) fn on(self, event: TargetEvent, now: Duration) -> Step {
        match event {
            TargetEvent::StateLoaded { guest, load_us, devices } => {
                let times = TargetTimes { complete_us: self.complete_us, load_us, run_us: 0, devices };
                let until = now + self.common.limits.commit_wait;
                let next = Ready { common: self.common, guest, times, until };
                (TargetState::Ready(next), vec![TargetAction::Send(Message::Ready(times))])
            }
            event => self.otherwise(event),
        }
    }
}

impl BeforeReady for Loading {
    const NAME: &'static str = "loading the device state";

    fn stay(self) -> TargetState {
        TargetState::Loading(self)
    }

    fn common(&self) -> Common {
        self.common
    }

    fn in_flight(&self) -> Option<TargetWork> {
        Some(TargetWork::LoadState)
    }
}

impl Ready {
    pub(super) fn on(self, event: TargetEvent, now: Duration) -> Step {
        match event {
            TargetEvent::Message(message) => self.on_message(message),
            TargetEvent::Cancel => Discarding::enter(self.common, SessionError::Cancelled),
            TargetEvent::Tick if now >= self.until => {
                let limit_ms = u64::try_from(self.common.limits.commit_wait.as_millis()).unwrap_or(u64::MAX);
                let cause = SessionError::PeerSilent { doing: "deciding to commit", limit_ms };
                Discarding::enter(self.common, cause)
            }
            // The Commit may have been lost with the connection: the source comes back with an Ask.
            TargetEvent::ControlLost(_)
            | TargetEvent::PeerBroke(_)
            | TargetEvent::LanesFailed(_)
            | TargetEvent::Tick
            | TargetEvent::Prepared
            | TargetEvent::LanesAccepted
            | TargetEvent::RamComplete { .. }
            | TargetEvent::StateLoaded { .. }
            | TargetEvent::Ran { .. }
            | TargetEvent::RunFailed(_)
            | TargetEvent::Discarded
            | TargetEvent::WorkFailed(..) => self.stay(),
        }
    }

    fn stay(self) -> Step {
        (TargetState::Ready(self), Vec::new())
    }

    fn on_message(self, message: Message) -> Step {
        match message {
            Message::Commit => self.run(),
            Message::Ask { attempt } if attempt == self.common.attempt => self.run(),
            Message::Abort(reason) => Discarding::called_off(self.common, SessionError::PeerEnded(reason)),
            Message::Ping(number) => {
                (TargetState::Ready(self), vec![TargetAction::Send(Message::Pong(number))])
            }
            Message::Ask { .. } | Message::Pong(_) => self.stay(),
            Message::Offer(_)
            | Message::Answer(_)
            | Message::Refuse(_)
            | Message::Final(_)
            | Message::Ready(_)
            | Message::Running(_)
            | Message::NeverRan { .. }
            | Message::Unknown { .. }
            | Message::Heard => {
                let what = format!("it sent {} while the target waited for Commit", message.name());
                Discarding::enter(self.common, SessionError::PeerMisbehaved(what))
            }
        }
    }

    fn run(self) -> Step {
        let licence = self.guest.commit();
        let next = Starting { common: self.common, times: self.times };
        (TargetState::Starting(next), vec![TargetAction::Run(licence)])
    }
}

impl Starting {
    pub(super) fn on(self, event: TargetEvent, now: Duration) -> Step {
        match event {
            TargetEvent::Ran { run_us } => {
                let times = TargetTimes { run_us, ..self.times };
                Ran::enter(self.common, times, now)
            }
            TargetEvent::RunFailed(RunFailure::DidNotRun(error)) => Discarding::enter(self.common, error),
            TargetEvent::RunFailed(RunFailure::Unsure(error)) => Lost::enter(self.common, error, now),
            // An Ask is answered by what comes of `Run`; nothing can take the Commit back.
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
            | TargetEvent::Discarded
            | TargetEvent::WorkFailed(..) => (TargetState::Starting(self), Vec::new()),
        }
    }
}
