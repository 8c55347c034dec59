//! From one crate's blame to another's: what a lane or a guest did, told to the session; what the session concluded,
//! told to the operator.

use vmferry_datapath::{Blame as LaneBlame, DataError};
use vmferry_guest::{Blame as GuestBlame, GuestError};
use vmferry_session::{AbortKind, SessionError};

use crate::failure::Failure;

/// A lane's error for the session.
#[must_use]
pub fn lane_error(error: &DataError) -> SessionError {
    let text = error.to_string();
    match error.blame() {
        LaneBlame::Peer => SessionError::PeerMisbehaved(text),
        LaneBlame::Link => SessionError::LinkLost(text),
        LaneBlame::Host => SessionError::HostRefused(text),
        LaneBlame::Bug => SessionError::Bug(text),
    }
}

/// A guest's error for the session.
#[must_use]
pub fn guest_error(error: &GuestError) -> SessionError {
    match error {
        GuestError::Bug(text) => SessionError::Bug(text.clone()),
        GuestError::Unresponsive(text) => SessionError::GuestUnresponsive(text.clone()),
        GuestError::Cancelled => SessionError::Cancelled,
        GuestError::UserMistake(_)
        | GuestError::HostRefused { .. }
        | GuestError::GuestMisbehaved(_)
        | GuestError::Ended(_)
        | GuestError::Relay(_) => SessionError::HostRefused(error.to_string()),
    }
}

/// A guest that could not be opened, before anything began.
#[must_use]
pub fn refused_guest(error: &GuestError) -> Failure {
    let text = error.to_string();
    match error.blame() {
        GuestBlame::User | GuestBlame::Guest => Failure::Refused(text),
        GuestBlame::Host => Failure::Permission(text),
        GuestBlame::Bug => Failure::Bug(text),
    }
}

/// Why a move ended, for the operator; `where_it_is` says where the guest is now.
#[must_use]
pub fn ended(error: &SessionError, where_it_is: &str) -> Failure {
    let text = format!("{}; {where_it_is}", error.to_string().trim_end_matches('.'));
    match error {
        SessionError::Cancelled
        | SessionError::TimedOut { .. }
        | SessionError::NotConverging(_)
        | SessionError::GuestUnresponsive(_) => Failure::Cancelled(text),
        SessionError::Incompatible(_) => Failure::Refused(text),
        SessionError::PeerMisbehaved(_) | SessionError::MemoryDiffers => Failure::PeerMisbehaved(text),
        SessionError::PeerEnded(reason) => match reason.kind() {
            AbortKind::Cancelled | AbortKind::TimedOut | AbortKind::NotConverging => Failure::Cancelled(text),
            AbortKind::Incompatible | AbortKind::Plaintext => Failure::Refused(text),
            AbortKind::Misbehaved | AbortKind::MemoryDiffers => Failure::PeerMisbehaved(text),
            AbortKind::Busy
            | AbortKind::LinkLost
            | AbortKind::HostRefused
            | AbortKind::Bug
            | AbortKind::Other => Failure::Unavailable(text),
        },
        SessionError::PeerSilent { .. } | SessionError::LinkLost(_) => Failure::Unavailable(text),
        SessionError::HostRefused(_) => Failure::Permission(text),
        SessionError::Bug(_) => Failure::Bug(text),
    }
}
