//! The target's machine: what the receiving side does next, as a function of what just happened.
//!
//! ```text
//!   Listening ► Preparing ► Receiving ► Completing ► Loading ► Ready ► Starting ► Ran ► Ended
//!                   └───────────┴───────────┴───────────┴────────┘         ├► Discarding (it surely did not run)
//!            any failure, Cancel, deadline: Unwinding ► Discarding         └► Lost (nobody knows) ► Ended
//!                                                           └► Refused ► Ended
//! ```
//!
//! Only `Ready` holds a [`LoadedToken`], and only a Commit, or an Ask, which repeats it, turns that into the one
//! [`RunLicence`]. An Ask from a source means that its guest is sealed: answering it by running the guest is as safe
//! as answering the Commit that was lost. What must never happen: `NeverRan` from a target that could still run.

mod blackout;
mod end;
mod intake;

use std::time::Duration;

use crate::devices::DeviceTimes;
use crate::error::SessionError;
use crate::limits::Limits;
use crate::message::{AttemptId, FinalTotals, Message};
use crate::negotiate::{Agreement, TargetTerms};
use crate::token::{LoadedToken, RunLicence, VacantToken};

pub use blackout::{Completing, Loading, Ready, Starting};
pub use end::{Discarding, Ended, Lost, Ran, Refused, Unwinding};
pub use intake::{Listening, Preparing, Receiving};

/// What the driver must do. Actions of one batch are begun in order; those with an *answer* are answered by exactly
/// one event, also after [`TargetAction::Interrupt`].
#[derive(Debug, PartialEq, Eq)]
pub enum TargetAction {
    /// Write a message to the newest control connection. No answer; a failure is [`TargetEvent::ControlLost`].
    Send(Message),
    /// Make the guest ready to receive and clear its RAM. Answer: [`TargetEvent::Prepared`].
    Prepare(Agreement),
    /// Take the lanes, start the receiver, spool the VMM's state from its first byte on, and feed each device's state
    /// to its device. Answer: [`TargetEvent::LanesAccepted`]. A lane that fails later, or a device that refuses its
    /// state, is [`TargetEvent::LanesFailed`].
    AcceptLanes(Agreement),
    /// Wait until every lane carried its tally and the spool is whole; with `verify`, digest all memory. Answer:
    /// [`TargetEvent::RamComplete`].
    AwaitLanes(FinalTotals),
    /// Load the spooled state, and wait until every device has loaded its own; a VMM reads guest memory while it loads,
    /// so never before `RamComplete`. The state is at least this old: the guest's clocks go on from there. Turn the token
    /// when it is done. Answer: [`TargetEvent::StateLoaded`].
    LoadState(VacantToken, Duration),
    /// Let the guest run. Answer: [`TargetEvent::Ran`] or [`TargetEvent::RunFailed`].
    Run(RunLicence),
    /// Make everything in flight return soon; each is still answered.
    Interrupt,
    /// Throw away what was received, so that this guest can never run. Answer: [`TargetEvent::Discarded`].
    Discard,
    /// The move is over; nothing follows.
    Finish(TargetOutcome),
}

/// What happened.
#[derive(Debug, PartialEq, Eq)]
pub enum TargetEvent {
    /// A message. From a second connection, the driver posts it only when it is an `Ask` of the same attempt and
    /// the same certificate; that connection is the newest from then on. Others it refuses as busy by itself.
    Message(Message),
    /// The newest control connection ended; the sentence says how.
    ControlLost(String),
    /// The peer's bytes were no message; the connection is closed.
    PeerBroke(String),
    /// Ctrl-C.
    Cancel,
    /// Time passed; see [`TargetState::deadline`].
    Tick,
    /// Answer to `Prepare`.
    Prepared,
    /// Answer to `AcceptLanes`.
    LanesAccepted,
    /// A lane failed after it was accepted.
    LanesFailed(SessionError),
    /// Answer to `AwaitLanes`.
    RamComplete {
        /// State bytes in the spool.
        state_bytes: u64,
        /// With `verify`, the digest of all memory.
        digest: Option<String>,
        /// From `AwaitLanes` until all pages were there, microseconds.
        complete_us: u64,
    },
    /// Answer to `LoadState`.
    StateLoaded {
        /// The turned token.
        guest: LoadedToken,
        /// How long the VMM's own state took, microseconds.
        load_us: u64,
        /// How long the devices' states took.
        devices: DeviceTimes,
    },
    /// Answer to `Run`: the guest runs; the licence is spent.
    Ran {
        /// From `Run` until it ran, microseconds.
        run_us: u64,
    },
    /// Answer to `Run`: it does not, or nobody knows; the licence is spent.
    RunFailed(RunFailure),
    /// Answer to `Discard`.
    Discarded,
    /// Answer to any action that is answered and has no failure event: it failed, or was interrupted. A token that
    /// it carried is dropped.
    WorkFailed(TargetWork, SessionError),
}

/// How running the guest failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunFailure {
    /// The guest surely did not run, not one instruction.
    DidNotRun(SessionError),
    /// It may run.
    Unsure(SessionError),
}

/// An action that is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TargetWork {
    /// `Prepare`
    Prepare,
    /// `AcceptLanes`
    AcceptLanes,
    /// `AwaitLanes`
    AwaitLanes,
    /// `LoadState`
    LoadState,
}

/// How a move ended, seen from the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetOutcome {
    /// The guest runs here.
    RunsHere,
    /// It never ran here and never will.
    NeverRan {
        /// Why.
        cause: SessionError,
    },
    /// Commit arrived and the VMM's answer to it is not known: the operator must look at this VMM.
    Unknown {
        /// What the VMM said.
        cause: SessionError,
    },
}

pub(crate) type Step = (TargetState, Vec<TargetAction>);

/// Where the target is.
#[derive(Debug)]
#[expect(missing_docs, reason = "each variant is documented at the struct it holds")]
pub enum TargetState {
    Listening(Listening),
    Preparing(Preparing),
    Receiving(Receiving),
    Completing(Completing),
    Loading(Loading),
    Ready(Ready),
    Starting(Starting),
    Ran(Ran),
    Unwinding(Unwinding),
    Discarding(Discarding),
    Refused(Refused),
    Lost(Lost),
    Ended(Ended),
}

impl TargetState {
    /// Begins to listen for one move into the empty guest.
    pub fn listen(guest: VacantToken, terms: TargetTerms, limits: Limits) -> Self {
        Self::Listening(Listening { limits, guest, terms })
    }

    /// What to do about an event. `now` is the time since the target began to listen.
    pub fn step(self, event: TargetEvent, now: Duration) -> Step {
        match self {
            Self::Listening(state) => state.on(event, now),
            Self::Preparing(state) => state.on(event, now),
            Self::Receiving(state) => state.on(event, now),
            Self::Completing(state) => state.on(event, now),
            Self::Loading(state) => state.on(event, now),
            Self::Ready(state) => state.on(event, now),
            Self::Starting(state) => state.on(event, now),
            Self::Ran(state) => state.on(&event, now),
            Self::Unwinding(state) => state.on(&event),
            Self::Discarding(state) => state.on(&event, now),
            Self::Refused(state) => state.on(&event, now),
            Self::Lost(state) => state.on(&event, now),
            Self::Ended(state) => (Self::Ended(state), Vec::new()),
        }
    }

    /// When the driver must post [`TargetEvent::Tick`] at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Receiving(state) => state.until(),
            Self::Ready(state) => Some(state.until),
            Self::Ran(state) => Some(state.until),
            Self::Refused(state) => Some(state.until),
            Self::Lost(state) => Some(state.until),
            Self::Listening(_)
            | Self::Preparing(_)
            | Self::Completing(_)
            | Self::Loading(_)
            | Self::Starting(_)
            | Self::Unwinding(_)
            | Self::Discarding(_)
            | Self::Ended(_) => None,
        }
    }

    /// Its name, for progress and for the report's phases.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Listening(_) => "listen",
            Self::Preparing(_) => "prepare",
            Self::Receiving(_) => "receive",
            Self::Completing(_) => "complete",
            Self::Loading(_) => "load",
            Self::Ready(_) => "ready",
            Self::Starting(_) => "start",
            Self::Ran(_) => "ran",
            Self::Unwinding(_) => "unwind",
            Self::Discarding(_) => "discard",
            Self::Refused(_) => "refused",
            Self::Lost(_) => "lost",
            Self::Ended(_) => "ended",
        }
    }

    /// The attempt that is going on, once one is; Asks of another one are not for this machine.
    pub const fn attempt(&self) -> Option<AttemptId> {
        match self {
            Self::Preparing(state) => Some(state.common.attempt),
            Self::Receiving(state) => Some(state.common.attempt),
            Self::Completing(state) => Some(state.common.attempt),
            Self::Loading(state) => Some(state.common.attempt),
            Self::Ready(state) => Some(state.common.attempt),
            Self::Starting(state) => Some(state.common.attempt),
            Self::Ran(state) => Some(state.common.attempt),
            Self::Unwinding(state) => Some(state.common.attempt),
            Self::Discarding(state) => Some(state.common.attempt),
            Self::Refused(state) => Some(state.common.attempt),
            Self::Lost(state) => Some(state.common.attempt),
            Self::Listening(_) | Self::Ended(_) => None,
        }
    }

    /// How it ended, once it has.
    pub const fn outcome(&self) -> Option<&TargetOutcome> {
        if let Self::Ended(ended) = self { Some(ended.outcome()) } else { None }
    }
}

impl TargetEvent {
    /// The action before Commit that this event answers.
    pub const fn answers(&self) -> Option<TargetWork> {
        match self {
            Self::Prepared => Some(TargetWork::Prepare),
            Self::LanesAccepted => Some(TargetWork::AcceptLanes),
            Self::RamComplete { .. } => Some(TargetWork::AwaitLanes),
            Self::StateLoaded { .. } => Some(TargetWork::LoadState),
            Self::WorkFailed(work, _) => Some(*work),
            Self::Message(_)
            | Self::ControlLost(_)
            | Self::PeerBroke(_)
            | Self::Cancel
            | Self::Tick
            | Self::LanesFailed(_)
            | Self::Ran { .. }
            | Self::RunFailed(_)
            | Self::Discarded => None,
        }
    }
}

/// What every state of a move carries along.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Common {
    attempt: AttemptId,
    limits: Limits,
}

/// What all states before Ready do about events that are not theirs: call the move off, or nothing.
///
/// The source seals its guest only after Ready, so before it nobody will ever ask how this ended.
pub(crate) trait BeforeReady: Sized {
    /// For the sentence about a message out of place.
    const NAME: &'static str;

    /// Back to the enum, unchanged.
    fn stay(self) -> TargetState;
    /// What the state carries.
    fn common(&self) -> Common;
    /// The answer that is awaited, if one is.
    fn in_flight(&self) -> Option<TargetWork>;

    /// Calls the move off.
    fn call_off(self, cause: SessionError) -> Step {
        end::unwind(self.common(), self.in_flight(), cause)
    }

    /// Everything that the state itself did not take.
    fn otherwise(self, event: TargetEvent) -> Step {
        match event {
            TargetEvent::Message(message) => self.on_stray_message(message),
            TargetEvent::ControlLost(why) => self.call_off(SessionError::LinkLost(why)),
            TargetEvent::PeerBroke(why) => self.call_off(SessionError::PeerMisbehaved(why)),
            TargetEvent::Cancel => self.call_off(SessionError::Cancelled),
            TargetEvent::Tick => (self.stay(), Vec::new()),
            TargetEvent::LanesFailed(error) => self.call_off(error),
            TargetEvent::WorkFailed(work, error) => {
                let in_flight = self.in_flight().filter(|awaited| *awaited != work);
                end::unwind(self.common(), in_flight, error)
            }
            TargetEvent::Prepared
            | TargetEvent::LanesAccepted
            | TargetEvent::RamComplete { .. }
            | TargetEvent::StateLoaded { .. }
            | TargetEvent::Ran { .. }
            | TargetEvent::RunFailed(_)
            | TargetEvent::Discarded => self
                .call_off(SessionError::Bug(format!("an answer to nothing that {} asked for", Self::NAME))),
        }
    }

    /// A message that the state itself did not take.
    fn on_stray_message(self, message: Message) -> Step {
        match message {
            Message::Ping(number) => (self.stay(), vec![TargetAction::Send(Message::Pong(number))]),
            Message::Pong(_) => (self.stay(), Vec::new()),
            Message::Abort(reason) => self.call_off(SessionError::PeerEnded(reason)),
            Message::Offer(_)
            | Message::Answer(_)
            | Message::Refuse(_)
            | Message::Final(_)
            | Message::Ready(_)
            | Message::Commit
            | Message::Running(_)
            | Message::NeverRan { .. }
            | Message::Unknown { .. }
            | Message::Ask { .. }
            | Message::Heard => {
                let what = format!("it sent {} while the target was {}", message.name(), Self::NAME);
                self.call_off(SessionError::PeerMisbehaved(what))
            }
        }
    }
}
