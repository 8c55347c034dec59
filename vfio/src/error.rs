//! What can go wrong with a passthrough device, by who is to blame.

use std::io;

use thiserror::Error;

use crate::state::MigState;

/// Why a device did not do what it was asked.
#[derive(Debug, Error)]
pub enum VfioError {
    /// The device was named or set up in a way that cannot work; the sentence has the fix.
    #[error("{0}")]
    UserMistake(String),
    /// This host's kernel forbids something; the sentence names what to do.
    #[error("{what}: {source}")]
    HostRefused {
        /// What was refused, and what the operator can do.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The device has no migration.
    #[error("device `{device}` cannot be moved: {why}")]
    NotMigratable {
        /// The operator's name for it.
        device: String,
        /// The reason and what to do.
        why: String,
    },
    /// The device refused a state, and was asked where it is.
    #[error("device `{device}` did not go from {from} to {to} and is {left}: {source}")]
    StateRefused {
        /// The operator's name for it.
        device: String,
        /// Where it was.
        from: MigState,
        /// Where it should have gone.
        to: MigState,
        /// Where it is.
        left: Left,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The target's device refused the state that it was given.
    #[error(
        "device `{device}` refused the state of its twin: {source}; both hosts need the same driver, firmware and model"
    )]
    DataRefused {
        /// The operator's name for it.
        device: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The device's state could not be read.
    #[error("the state of device `{device}` cannot be read: {source}")]
    DataLost {
        /// The operator's name for it.
        device: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Something went wrong, and then so did the way back.
    #[error("{cause}; on the way back: {}", .back.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NotUndone {
        /// What went wrong first.
        #[source]
        cause: Box<VfioError>,
        /// What could not be undone, in the order in which it was tried.
        back: Vec<VfioError>,
    },
    /// What the caller does between the steps failed.
    #[error("{0}")]
    Caller(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// This program is wrong.
    #[error("a bug in vmferry: {0}; please report it")]
    Bug(String),
}

/// Where a device is after a failed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It said so.
    In(MigState),
    /// It does not answer: only a reset helps.
    Unknown,
}

impl std::fmt::Display for Left {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Left::In(MigState::Error) => f.write_str("in ERROR: only a reset helps, and its state is lost"),
            Left::In(state) => write!(f, "in {state}"),
            Left::Unknown => f.write_str("in a state that it does not tell: reset it"),
        }
    }
}

impl VfioError {
    /// For `map_err`: the host's answer to `what`.
    pub(crate) fn refused<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> VfioError {
        let what = what.into();
        move |error| VfioError::HostRefused { what, source: error.into() }
    }

    /// For `map_err`: what vfio-ioctls made of the host's answer to `what`.
    pub(crate) fn vfio(what: impl Into<String>) -> impl FnOnce(vfio_ioctls::VfioError) -> VfioError {
        let what = what.into();
        move |error| VfioError::HostRefused { what, source: io::Error::other(error) }
    }

    /// For `map_err`: what the caller's own step said.
    pub fn caller(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> VfioError {
        VfioError::Caller(error.into())
    }

    /// The first cause: what went wrong before the way back did.
    #[must_use]
    pub fn cause(&self) -> &VfioError {
        match self {
            VfioError::NotUndone { cause, .. } => cause.cause(),
            VfioError::UserMistake(_)
            | VfioError::HostRefused { .. }
            | VfioError::NotMigratable { .. }
            | VfioError::StateRefused { .. }
            | VfioError::DataRefused { .. }
            | VfioError::DataLost { .. }
            | VfioError::Caller(_)
            | VfioError::Bug(_) => self,
        }
    }
}
