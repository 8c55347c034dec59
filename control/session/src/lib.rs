//! Decides a move and touches neither a page, a socket nor a clock: time comes in as `now`, everything else as
//! events, and what comes out are actions.
//!
//! ```text
//!            events                                    actions
//!   driver ───────────► SourceSession (SourceState) ───────────► driver      on the sending host
//!   driver ───────────► TargetSession (TargetState) ───────────► driver      on the receiving host
//! ```
//!
//! # How a driver uses it
//!
//! ```no_run
//! # use std::time::Duration;
//! # use vmferry_session::*;
//! # fn now() -> Duration { unimplemented!() }
//! # fn perform(_: SourceAction) { unimplemented!() }
//! # fn next_event(_: Option<Duration>) -> Posted { unimplemented!() }
//! # enum Posted { Event(SourceEvent), Round(RoundReport) }
//! # fn drive(plan: SourcePlan) -> SourceOutcome {
//! let (mut session, mut actions) = SourceSession::begin(RunningToken::claim(), plan, now());
//! loop {
//!     for action in actions {
//!         perform(action); // at once, or on a worker thread that posts the answer
//!     }
//!     if let Some(outcome) = session.outcome() {
//!         return outcome.clone();
//!     }
//!     // Waits for an answer, a message, Ctrl-C, or the deadline, at which it gives `Tick`.
//!     actions = match next_event(session.deadline()) {
//!         Posted::Round(report) => session.round_done(&report, now()),
//!         Posted::Event(event) => session.handle(event, now()),
//!     };
//! }
//! # }
//! ```
//!
//! # The contract
//!
//! - Every action says in its doc which event answers it. An action with an answer is answered **exactly once**, also
//!   when it failed and also after `Interrupt`. Until then the guest is not resumed: a resume would race with it.
//! - Actions that carry a token take it: the driver turns it with the method that says what it did (`pause` before
//!   the VMM is told to stop, `resume` after it said that it runs) and hands it back in the answer.
//! - Events may come at any time and in any order; one that comes too late is ignored or calls the move off, and
//!   never loses a token.
//! - Work that blocks (a round, saving) runs beside the loop, so that a Cancel, a lost connection and a deadline are
//!   heard during it. `Interrupt` then asks it to return soon. A driver with one thread works too: it is only deaf
//!   while it works.
//! - `Send` writes to the newest control connection; a failed write is `ControlLost`, and so is the end of reading.
//!   After `Finish` nothing follows.
//!
//! What must never happen: a guest that runs twice. The [`token`] module says how types keep it from happening.

mod blackout;
mod codec;
mod converge;
mod devices;
mod error;
mod limits;
mod message;
mod negotiate;
mod phases;
mod predict;
pub mod source;
mod source_session;
pub mod target;
mod target_session;
pub mod token;
mod transport;

pub use codec::{BUFFER_BYTES_MAX, CodecError, Decoder, MESSAGE_BYTES_MAX, encode};
pub use converge::{Converge, ConvergePlan, Decision, LastReport, Next, OnNoConverge, RoundReport};
pub use devices::{DeviceDrain, DeviceIdentity, DeviceReport, DeviceTimes, device_facts, device_names};
pub use error::{AbortKind, AbortReason, SessionError};
pub use limits::{Limits, RESUME_TRIES};
pub use message::{
    AttemptId, CHOICES_MAX, FACTS_MAX, FinalTotals, GuestFacts, LaneTally, Message, Offer, TEXT_BYTES_MAX,
    TargetTimes,
};
pub use negotiate::{
    Agreement, CipherSuite, CompressionMode, LANES_MAX, NOTE_PREFIX, TargetTerms, VERSION,
    VERSION_WITH_DEVICES, VERSION_WITH_STATE_AGE, VERSIONS, check_answer, negotiate, versions_for,
};
pub use phases::{PhaseLog, PhaseSpan};
pub use predict::{
    DeviceForecast, DeviceRecord, Forecast, History, Interval, MoveRecord, Predictor, Priors, SaveOrder, Term,
};
pub use source::{SourceAction, SourceEvent, SourceOutcome, SourceState, Work};
pub use source_session::{Progress, SourcePlan, SourceSession};
pub use target::{RunFailure, TargetAction, TargetEvent, TargetOutcome, TargetState, TargetWork};
pub use target_session::TargetSession;
pub use token::{
    LoadedToken, PausedToken, ProofOfRefusal, RunLicence, RunningToken, SealedToken, VacantToken,
};
pub use transport::LaneTransport;
