//! How a verb can end badly: one variant per kind of blame, one exit code per variant.
//!
//! A sentence says what happened and what to do; nothing here is ever shown with a stack of causes that the
//! operator has to read backwards. The codes are `sysexits(3)` where it has a fitting one, because scripts of
//! virsh and QEMU users already know those.

/// A verb's bad end. The text is one sentence for the operator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The command line, a file or a guest needs another setting; nothing was tried.
    #[error("{0}")]
    Refused(String),
    /// The host forbids something that vmferry needs.
    #[error("{0}")]
    Permission(String),
    /// The peer cannot be reached, or the link was lost before Commit; the source guest runs on.
    #[error("{0}")]
    Unavailable(String),
    /// The move ended early on purpose: cancelled, timed out, did not converge; the source guest runs on.
    #[error("{0}")]
    Cancelled(String),
    /// Ctrl-C ended the move before Commit; the source guest runs on.
    #[error("{0}")]
    Interrupted(String),
    /// The peer broke the protocol: a wrong tag, a replay, a message out of place.
    #[error("{0}")]
    PeerMisbehaved(String),
    /// Commit was sent and no answer came in time: the source guest stays paused until an operator decides.
    #[error("{0}")]
    InDoubt(String),
    /// vmferry contradicted itself.
    #[error("{0}; this is a bug in vmferry, please report it")]
    Bug(String),
}

impl Failure {
    /// The exit code, one per kind of blame.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::InDoubt(_) => 3,
            Self::Unavailable(_) => 69,
            Self::Bug(_) => 70,
            Self::Cancelled(_) => 75,
            Self::PeerMisbehaved(_) => 76,
            Self::Permission(_) => 77,
            Self::Refused(_) => 78,
            Self::Interrupted(_) => 130,
        }
    }

    /// The `status` word of the JSON report, in QEMU's vocabulary where it has one.
    #[must_use]
    pub fn status(&self) -> &'static str {
        match self {
            Self::InDoubt(_) => "in-doubt",
            Self::Cancelled(_) | Self::Interrupted(_) => "cancelled",
            Self::Refused(_) | Self::Permission(_) => "refused",
            Self::Unavailable(_) | Self::PeerMisbehaved(_) | Self::Bug(_) => "failed",
        }
    }
}

/// The table that `vmferry help exit-codes` prints and the README shows.
pub const EXIT_CODES: &[(u8, &str)] = &[
    (0, "the guest runs on the target (send: handed over; receive: runs here)"),
    (2, "the command line is wrong"),
    (3, "in doubt: Commit was sent and no answer came; the source stays paused until you decide"),
    (69, "the peer cannot be reached or the link was lost; the source guest runs on"),
    (70, "a bug in vmferry"),
    (75, "cancelled, timed out or did not converge; the source guest runs on"),
    (76, "the peer broke the protocol (wrong tag, replay, wrong message); the source guest runs on"),
    (77, "the host forbids something: the sentence names the permission"),
    (78, "refused before the first page: guest, keys or settings do not fit; the sentence names the fix"),
    (130, "Ctrl-C before Commit; the source guest runs on"),
];
