//! Why a micro-VM could not be made, run, saved or restored, sorted by who is to blame.

use std::io;

use thiserror::Error;
use vmferry_datapath::{LayoutError, TrackError};

/// Why the micro-VM could not do what it was asked.
#[derive(Debug, Error)]
pub enum KvmError {
    /// It was asked for something impossible; the sentence has the fix.
    #[error("{0}")]
    UserMistake(String),
    /// This host's KVM, or its kernel, refused.
    #[error(
        "this host refused to {what}: {source}; look whether /dev/kvm is there and may be opened by this user"
    )]
    HostRefused {
        /// What was asked of it.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A state that does not fit this machine, or is none: what the other host sent.
    #[error("{0}")]
    StateRefused(String),
    /// The dirty pages are not known.
    #[error(transparent)]
    Tracking(#[from] TrackError),
    /// The guest did what ends it.
    #[error("{0}")]
    GuestCrashed(String),
}

impl KvmError {
    /// For `map_err`: the kernel's answer to `what`.
    pub(crate) fn refused<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> KvmError {
        let what = what.into();
        move |error| KvmError::HostRefused { what, source: error.into() }
    }

    pub(crate) fn mistake(sentence: impl Into<String>) -> KvmError {
        KvmError::UserMistake(sentence.into())
    }

    pub(crate) fn state(sentence: impl Into<String>) -> KvmError {
        KvmError::StateRefused(sentence.into())
    }
}

impl From<LayoutError> for KvmError {
    fn from(error: LayoutError) -> KvmError {
        KvmError::UserMistake(error.to_string())
    }
}
