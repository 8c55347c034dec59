//! The source's machine: what the sending side does next, as a function of what just happened.
//!
//! ```text
//!   Negotiating ► Preparing ► Copying ► Pausing ► SendingLast ► Closing ► AwaitingReady ► Sealing ► InDoubt ► Retiring ► Ended
//!        └────────────┴──────────┴─────────┴──────────┴───────────┴────────────┴────────────┘         │
//!                       any failure, Cancel, timeout: Unwinding ► Resuming ► Ended ◄── NeverRan ───────┘
//! ```
//!
//! Each state is a struct with exactly what it may use: only a state that holds a [`PausedToken`] can resume, and
//! from `InDoubt` on there is only a [`SealedToken`]. What must never happen: a way from `InDoubt` back that does
//! not go through the target's proof.

mod blackout;
mod committed;
mod precopy;
mod unwind;

use std::collections::BTreeSet;
use std::time::Duration;

use crate::converge::Next;
use crate::error::SessionError;
use crate::limits::Limits;
use crate::message::{AttemptId, FinalTotals, Message, Offer};
use crate::negotiate::Agreement;
use crate::token::{PausedToken, RunningToken, SealedToken};

pub use blackout::{AwaitingReady, Closing, Pausing, Sealing, SendingLast};
pub use committed::{InDoubt, Retiring};
pub use precopy::{Copying, Negotiating, Preparing};
pub use unwind::{Ended, Resuming, Unwinding};

/// What the driver must do. Actions of one batch are begun in order.
///
/// Those with an *answer* are answered by exactly one event, also after [`SourceAction::Interrupt`], also when they
/// failed: [`SourceEvent::WorkFailed`], or the failure event that hands the token back. Until then they count as in
/// flight, and the guest is not resumed.
#[derive(Debug, PartialEq, Eq)]
pub enum SourceAction {
    /// Write a message. No answer; a failure is [`SourceEvent::ControlLost`].
    Send(Message),
    /// Connect the lanes and start the sender. Answer: [`SourceEvent::LanesOpened`].
    OpenLanes(Agreement),
    /// Start to track every writer of the guest. Answer: [`SourceEvent::Attached`].
    Attach,
    /// Scan, then send what the hot ledger gives; devices pre-copy beside it. Answer: [`SourceEvent::RoundDone`]
    /// ([`crate::SourceSession::round_done`]).
    CopyRound {
        /// From 1; round 1 sends everything.
        round: u32,
    },
    /// Slow the guest down; 0 lifts it. No answer; a refusal is [`SourceEvent::ThrottleFailed`].
    SetThrottle {
        /// CPU time taken away.
        percent: u8,
    },
    /// Turn the token, then stop the guest. Answer: [`SourceEvent::Paused`] or [`SourceEvent::PauseFailed`].
    Pause(RunningToken),
    /// Last scan, then everything held, dirty or pinned. Answer: [`SourceEvent::LastSent`]
    /// ([`crate::SourceSession::last_sent`]).
    SendLast,
    /// Save the VMM's state into lane 0, and drain the devices' streams; begun together with `SendLast`, it may run
    /// beside it. Answer:
    /// [`SourceEvent::StateSaved`] ([`crate::SourceSession::state_saved`]).
    SaveState,
    /// After both: scan once more (saving may have written), send that, then END on every lane, and with `verify`
    /// the digest. Answer: [`SourceEvent::LanesFinished`].
    FinishLanes,
    /// Tell the guardian that the guest may be the target's from now on. Answer: [`SourceEvent::SealRecorded`],
    /// and only when the guardian surely has it.
    RecordSeal,
    /// Tell the guardian that the guest is the source's again. No answer.
    ClearSeal,
    /// Connect and authenticate again, then send `Ask`. Answer: [`SourceEvent::Reconnected`].
    ReconnectAndAsk {
        /// From 1.
        attempt: u32,
    },
    /// Make everything in flight return soon; each is still answered. No answer of its own.
    Interrupt,
    /// Let the guest run, undoing whatever pausing and saving did. Answer: [`SourceEvent::Resumed`] or
    /// [`SourceEvent::ResumeFailed`].
    Resume(PausedToken),
    /// Drop the lanes as they are. No answer.
    CloseLanes,
    /// Take every trace out of the VMM; idempotent. No answer.
    Detach,
    /// End the source's VMM. Answer: [`SourceEvent::Retired`] or [`SourceEvent::RetireFailed`].
    Retire(SealedToken),
    /// The move is over; nothing follows.
    Finish(SourceOutcome),
}

/// What happened.
#[derive(Debug, PartialEq, Eq)]
pub enum SourceEvent {
    /// A message arrived on the newest control connection.
    Message(Message),
    /// The newest control connection ended; the sentence says how.
    ControlLost(String),
    /// The peer's bytes were no message; the connection is closed.
    PeerBroke(String),
    /// Ctrl-C, or `cancel`.
    Cancel,
    /// Time passed; see [`SourceState::deadline`].
    Tick,
    /// Answer to `OpenLanes`.
    LanesOpened,
    /// Answer to `Attach`.
    Attached,
    /// Answer to `CopyRound`, with what the convergence model makes of it.
    RoundDone(Next),
    /// A throttle step was refused; the move goes on without.
    ThrottleFailed(SessionError),
    /// Answer to `Pause`: the guest is stopped.
    Paused(PausedToken),
    /// Answer to `Pause`: it failed, and whether the guest runs is not known; the token counts as paused.
    PauseFailed(PausedToken, SessionError),
    /// Answer to `SendLast`.
    LastSent,
    /// Answer to `SaveState`.
    StateSaved,
    /// Answer to `FinishLanes`.
    LanesFinished(FinalTotals),
    /// Answer to `RecordSeal`.
    SealRecorded,
    /// Answer to `ReconnectAndAsk`: connected, `Ask` is written.
    Reconnected,
    /// Answer to `Resume`: the guest runs.
    Resumed(RunningToken),
    /// Answer to `Resume`: it does not.
    ResumeFailed(PausedToken, SessionError),
    /// Answer to `Retire`; the token is spent.
    Retired,
    /// Answer to `Retire`: the VMM may still be there, its guest paused.
    RetireFailed(SessionError),
    /// Answer to any action that carries no token: it failed, or was interrupted.
    WorkFailed(Work, SessionError),
}

/// An action that is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Work {
    /// `OpenLanes`
    OpenLanes,
    /// `Attach`
    Attach,
    /// `CopyRound`
    CopyRound,
    /// `Pause`
    Pause,
    /// `SendLast`
    SendLast,
    /// `SaveState`
    SaveState,
    /// `FinishLanes`
    FinishLanes,
    /// `RecordSeal`
    RecordSeal,
    /// `ReconnectAndAsk`
    Reconnect,
    /// `Resume`
    Resume,
    /// `Retire`
    Retire,
}

/// How a move ended, seen from the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceOutcome {
    /// The target runs the guest.
    Moved {
        /// The source's VMM could not be ended; its guest is paused and must not be resumed.
        left_behind: Option<SessionError>,
    },
    /// The guest runs on at the source, as if nothing had happened.
    RunsHere {
        /// Why it was not moved.
        cause: SessionError,
    },
    /// The guest is whole and paused at the source, and nobody else has it: it could not be resumed. The driver
    /// lets its guardian try once more.
    PausedHere {
        /// Why it was not moved.
        cause: SessionError,
        /// Why it could not be resumed.
        refusal: SessionError,
    },
    /// Commit was sent and no answer came: the source's guest stays paused until an operator has looked.
    InDoubt {
        /// The last that was heard.
        last: String,
    },
}

/// A state and what to do on the way into it.
pub(crate) type Step = (SourceState, Vec<SourceAction>);

/// Where the source is.
#[derive(Debug)]
#[expect(missing_docs, reason = "each variant is documented at the struct it holds")]
pub enum SourceState {
    Negotiating(Negotiating),
    Preparing(Preparing),
    Copying(Copying),
    Pausing(Pausing),
    SendingLast(SendingLast),
    Closing(Closing),
    AwaitingReady(AwaitingReady),
    Sealing(Sealing),
    InDoubt(InDoubt),
    Retiring(Retiring),
    Unwinding(Unwinding),
    Resuming(Resuming),
    Ended(Ended),
}

impl SourceState {
    /// Begins a move: the driver holds a control connection, and the guest runs.
    pub fn begin(guest: RunningToken, offer: Offer, limits: Limits, now: Duration) -> Step {
        let common = Common {
            attempt: offer.attempt,
            limits,
            throttle: 0,
            whole_until: limits.whole.map(|w| now + w),
            guardian: GuardianBelief::Ours,
        };
        let until = now + limits.answer;
        let hello = Message::Offer(Box::new(offer.clone()));
        (Self::Negotiating(Negotiating { common, guest, offer, until }), vec![SourceAction::Send(hello)])
    }

    /// What to do about an event. `now` is the time since the move began.
    pub fn step(self, event: SourceEvent, now: Duration) -> Step {
        match self {
            Self::Negotiating(state) => state.on(event, now),
            Self::Preparing(state) => state.on(event, now),
            Self::Copying(state) => state.on(event, now),
            Self::Pausing(state) => state.on(event, now),
            Self::SendingLast(state) => state.on(event, now),
            Self::Closing(state) => state.on(event, now),
            Self::AwaitingReady(state) => state.on(event, now),
            Self::Sealing(state) => state.on(event, now),
            Self::InDoubt(state) => state.on(event, now),
            Self::Retiring(state) => state.on(event),
            Self::Unwinding(state) => state.on(event),
            Self::Resuming(state) => state.on(event, now),
            Self::Ended(state) => (Self::Ended(state), Vec::new()),
        }
    }

    /// When the driver must post [`SourceEvent::Tick`] at the latest.
    pub fn deadline(&self) -> Option<Duration> {
        match self {
            Self::Negotiating(state) => state.common.sooner(Some(state.until)),
            Self::Preparing(state) => state.common.sooner(Some(state.until)),
            Self::Copying(state) => state.common.sooner(None),
            Self::Pausing(state) => state.common.sooner(None),
            Self::SendingLast(state) => state.common.sooner(None),
            Self::Closing(state) => state.common.sooner(None),
            Self::AwaitingReady(state) => state.common.sooner(Some(state.until)),
            Self::Sealing(state) => state.common.sooner(None),
            Self::InDoubt(state) => Some(state.next_deadline()),
            Self::Resuming(state) => state.next_try(),
            Self::Retiring(_) | Self::Unwinding(_) | Self::Ended(_) => None,
        }
    }

    /// Its name, for progress and for the report's phases.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Negotiating(_) => "negotiate",
            Self::Preparing(_) => "prepare",
            Self::Copying(_) => "copy",
            Self::Pausing(_) => "pause",
            Self::SendingLast(_) => "last-round",
            Self::Closing(_) => "close-lanes",
            Self::AwaitingReady(_) => "target-load",
            Self::Sealing(_) => "seal",
            Self::InDoubt(_) => "commit",
            Self::Retiring(_) => "retire",
            Self::Unwinding(_) => "unwind",
            Self::Resuming(_) => "resume",
            Self::Ended(_) => "ended",
        }
    }

    /// How it ended, once it has.
    pub const fn outcome(&self) -> Option<&SourceOutcome> {
        match self {
            Self::Ended(ended) => Some(ended.outcome()),
            Self::Negotiating(_)
            | Self::Preparing(_)
            | Self::Copying(_)
            | Self::Pausing(_)
            | Self::SendingLast(_)
            | Self::Closing(_)
            | Self::AwaitingReady(_)
            | Self::Sealing(_)
            | Self::InDoubt(_)
            | Self::Retiring(_)
            | Self::Unwinding(_)
            | Self::Resuming(_) => None,
        }
    }
}

impl SourceEvent {
    /// The action that this event answers.
    pub const fn answers(&self) -> Option<Work> {
        match self {
            Self::LanesOpened => Some(Work::OpenLanes),
            Self::Attached => Some(Work::Attach),
            Self::RoundDone(_) => Some(Work::CopyRound),
            Self::Paused(_) | Self::PauseFailed(..) => Some(Work::Pause),
            Self::LastSent => Some(Work::SendLast),
            Self::StateSaved => Some(Work::SaveState),
            Self::LanesFinished(_) => Some(Work::FinishLanes),
            Self::SealRecorded => Some(Work::RecordSeal),
            Self::Reconnected => Some(Work::Reconnect),
            Self::Resumed(_) | Self::ResumeFailed(..) => Some(Work::Resume),
            Self::Retired | Self::RetireFailed(_) => Some(Work::Retire),
            Self::WorkFailed(work, _) => Some(*work),
            Self::Message(_)
            | Self::ControlLost(_)
            | Self::PeerBroke(_)
            | Self::Cancel
            | Self::Tick
            | Self::ThrottleFailed(_) => None,
        }
    }
}

/// What every state carries along.
#[derive(Debug)]
pub(crate) struct Common {
    attempt: AttemptId,
    limits: Limits,
    /// Percent that the guest is slowed down by now.
    throttle: u8,
    whole_until: Option<Duration>,
    guardian: GuardianBelief,
}

/// What the guardian may believe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuardianBelief {
    /// The guest is the source's: it rescues.
    Ours,
    /// The guest may be the target's: it touches nothing.
    MaybeSealed,
}

impl Common {
    fn sooner(&self, until: Option<Duration>) -> Option<Duration> {
        [self.whole_until, until].into_iter().flatten().min()
    }

    /// Why the time is up, if it is, in a state that waits for the peer.
    fn overdue(&self, now: Duration, until: Duration, silent: SessionError) -> Option<SessionError> {
        self.overdue_whole(now).or_else(|| (now >= until).then_some(silent))
    }

    /// Whether `--timeout` is over: the only end of a state whose work the driver bounds.
    fn overdue_whole(&self, now: Duration) -> Option<SessionError> {
        let limit_ms = millis(self.limits.whole.unwrap_or_default());
        self.whole_until.is_some_and(|whole| now >= whole).then_some(SessionError::TimedOut { limit_ms })
    }

    /// The action that makes the guardian rescue again, if it may believe otherwise.
    fn clear_seal(&mut self) -> Option<SourceAction> {
        let believed = std::mem::replace(&mut self.guardian, GuardianBelief::Ours);
        (believed == GuardianBelief::MaybeSealed).then_some(SourceAction::ClearSeal)
    }

    /// The action that lifts the throttle, if it is on.
    fn lift_throttle(&mut self) -> Option<SourceAction> {
        (std::mem::take(&mut self.throttle) > 0).then_some(SourceAction::SetThrottle { percent: 0 })
    }
}

/// Where the guest's token is while a move is called off.
#[derive(Debug)]
pub(crate) enum Held {
    /// In this machine, running.
    Running(RunningToken),
    /// In this machine, paused.
    Paused(PausedToken),
    /// With the driver, in an action in flight.
    Out,
}

/// A state before Commit, taken apart so that the move can be called off.
#[derive(Debug)]
pub(crate) struct Parts {
    common: Common,
    held: Held,
    in_flight: BTreeSet<Work>,
}

/// What all states before Commit do about events that are not theirs: call the move off, or nothing.
pub(crate) trait BeforeCommit: Sized {
    /// For the sentence about a message out of place.
    const NAME: &'static str;

    /// Back to the enum, unchanged.
    fn stay(self) -> SourceState;
    /// Apart.
    fn into_parts(self) -> Parts;
    /// Why the time is up, if it is.
    fn overdue(&self, now: Duration) -> Option<SessionError>;

    /// Calls the move off.
    fn call_off(self, cause: SessionError) -> Step {
        unwind::unwind(self.into_parts(), cause)
    }

    /// Everything that the state itself did not take.
    fn otherwise(self, event: SourceEvent, now: Duration) -> Step {
        match event {
            SourceEvent::Cancel => self.call_off(SessionError::Cancelled),
            SourceEvent::Tick => match self.overdue(now) {
                Some(cause) => self.call_off(cause),
                None => (self.stay(), Vec::new()),
            },
            SourceEvent::ControlLost(why) => self.call_off(SessionError::LinkLost(why)),
            SourceEvent::PeerBroke(why) => self.call_off(SessionError::PeerMisbehaved(why)),
            SourceEvent::Message(message) => self.on_stray_message(message),
            SourceEvent::ThrottleFailed(_) => (self.stay(), Vec::new()),
            SourceEvent::WorkFailed(work, error) => {
                let mut parts = self.into_parts();
                parts.in_flight.remove(&work);
                unwind::unwind(parts, error)
            }
            SourceEvent::LanesOpened
            | SourceEvent::Attached
            | SourceEvent::RoundDone(_)
            | SourceEvent::Paused(_)
            | SourceEvent::PauseFailed(..)
            | SourceEvent::LastSent
            | SourceEvent::StateSaved
            | SourceEvent::LanesFinished(_)
            | SourceEvent::SealRecorded
            | SourceEvent::Reconnected
            | SourceEvent::Resumed(_)
            | SourceEvent::ResumeFailed(..)
            | SourceEvent::Retired
            | SourceEvent::RetireFailed(_) => self
                .call_off(SessionError::Bug(format!("an answer to nothing that {} asked for", Self::NAME))),
        }
    }

    /// A message that the state itself did not take.
    fn on_stray_message(self, message: Message) -> Step {
        match message {
            Message::Ping(number) => (self.stay(), vec![SourceAction::Send(Message::Pong(number))]),
            Message::Pong(_) => (self.stay(), Vec::new()),
            Message::Abort(reason) | Message::Refuse(reason) | Message::NeverRan { reason, .. } => {
                self.call_off(SessionError::PeerEnded(reason))
            }
            Message::Offer(_)
            | Message::Answer(_)
            | Message::Final(_)
            | Message::Ready(_)
            | Message::Commit
            | Message::Running(_)
            | Message::Unknown { .. }
            | Message::Ask { .. }
            | Message::Heard => {
                let what = format!("it sent {} while the source was {}", message.name(), Self::NAME);
                self.call_off(SessionError::PeerMisbehaved(what))
            }
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
