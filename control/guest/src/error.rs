//! Why a guest could not be moved, sorted by who is to blame.
//!
//! Every sentence ends with what to do. The blame decides what happens next: a mistake and a refusal of this host
//! are told to the operator before the first page, a misbehaving guest ends the move, a bug is told to us.

use std::io;

use thiserror::Error;
use vmferry_datapath::{LayoutError, RamError};

/// Who is to blame for a [`GuestError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The way in which the guest was started or named.
    User,
    /// This host's kernel or its permissions.
    Host,
    /// The VMM.
    Guest,
    /// This program.
    Bug,
}

/// Why a guest could not be moved.
#[derive(Debug, Error)]
pub enum GuestError {
    /// The guest was started or named in a way that vmferry cannot work with; the sentence has the exact fix.
    #[error("{0}")]
    UserMistake(String),
    /// The host forbids something; the sentence names the permission.
    #[error("{what}: {source}")]
    HostRefused {
        /// What was refused, and what the operator can do.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The VMM did what no healthy VMM does, or went away.
    #[error("{0}")]
    GuestMisbehaved(String),
    /// The VMM had ended before it was told what to do: surely none of it happened.
    #[error("{0}")]
    Ended(String),
    /// The guest did not do in time what it was asked for; it runs on as it was.
    #[error("{0}")]
    Unresponsive(String),
    /// Whoever asked for it called it off.
    #[error("cancelled while the guest was waited for")]
    Cancelled,
    /// The sink or source of device state failed under us: the link's error, not the guest's.
    #[error("the device state could not be relayed: {0}")]
    Relay(#[source] io::Error),
    /// This program is wrong.
    #[error("a bug in vmferry: {0}; please report it")]
    Bug(String),
}

impl GuestError {
    /// Who is to blame.
    #[must_use]
    pub fn blame(&self) -> Blame {
        match self {
            GuestError::UserMistake(_) | GuestError::Cancelled => Blame::User,
            GuestError::HostRefused { .. } | GuestError::Relay(_) => Blame::Host,
            GuestError::GuestMisbehaved(_) | GuestError::Ended(_) | GuestError::Unresponsive(_) => {
                Blame::Guest
            }
            GuestError::Bug(_) => Blame::Bug,
        }
    }

    pub(crate) fn mistake(sentence: impl Into<String>) -> GuestError {
        GuestError::UserMistake(sentence.into())
    }

    pub(crate) fn misbehaved(sentence: impl Into<String>) -> GuestError {
        GuestError::GuestMisbehaved(sentence.into())
    }

    /// For `map_err`: the host's answer to `what`.
    pub(crate) fn refused<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> GuestError {
        let what = what.into();
        move |error| GuestError::HostRefused { what, source: error.into() }
    }
}

impl From<LayoutError> for GuestError {
    fn from(error: LayoutError) -> GuestError {
        GuestError::UserMistake(error.to_string())
    }
}

impl From<RamError> for GuestError {
    fn from(error: RamError) -> GuestError {
        match error {
            RamError::FileTooShort { .. } => GuestError::UserMistake(error.to_string()),
            RamError::HostRefused { ref block, service, errno } => GuestError::HostRefused {
                what: format!(
                    "{service} of RAM block `{block}` was refused; run vmferry as root or as the VMM's user"
                ),
                source: errno.into(),
            },
            RamError::FileCount { .. } | RamError::NoSuchPage { .. } | RamError::ReadOnly => {
                GuestError::Bug(error.to_string())
            }
        }
    }
}
