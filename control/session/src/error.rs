//! What can end a move, sorted by who is to blame, and the little of it that the other host is told.
//!
//! The wire carries an [`AbortReason`], never our error: a kind for the machine, one bounded sentence for the other
//! operator. What must never happen: a peer's text that reaches a terminal with its control characters.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Why a move ended without the guest running on the target. The text is a sentence that says what to do.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Error)]
pub enum SessionError {
    /// The operator here ended it.
    #[error("the move was cancelled")]
    Cancelled,
    /// It did not finish within `--timeout`.
    #[error("the move did not finish within {limit_ms} ms; give it more with --timeout, or more --bandwidth")]
    TimedOut {
        /// The limit.
        limit_ms: u64,
    },
    /// The blackout cannot fit its limit; the sentence says why and what would.
    #[error("{0}")]
    NotConverging(String),
    /// The guest did not do in time what it was asked for; the sentence says what, and what would help.
    #[error("{0}")]
    GuestUnresponsive(String),
    /// The hosts or guests do not fit each other; the sentence holds the exact fix.
    #[error("{0}")]
    Incompatible(String),
    /// The other host sent what no honest host sends.
    #[error("the other host broke the protocol: {0}")]
    PeerMisbehaved(String),
    /// `--verify`: the two digests differ.
    #[error(
        "--verify: the memory that arrived differs from the source's; the guest was not handed over, please report it"
    )]
    MemoryDiffers,
    /// The other host ended the move and said why.
    #[error("the other host ended the move: {0}")]
    PeerEnded(AbortReason),
    /// The other host did not answer in time.
    #[error("the other host did not answer within {limit_ms} ms while {doing}; look at its log")]
    PeerSilent {
        /// What was waited for.
        doing: &'static str,
        /// How long.
        limit_ms: u64,
    },
    /// The control connection or a lane ended.
    #[error("{0}")]
    LinkLost(String),
    /// This host, its guest or its kernel refused something.
    #[error("{0}")]
    HostRefused(String),
    /// This program is wrong.
    #[error("a bug in vmferry: {0}; please report it")]
    Bug(String),
}

impl SessionError {
    /// What the other host is told of it.
    pub fn to_abort_reason(&self) -> AbortReason {
        let kind = match self {
            Self::Cancelled => AbortKind::Cancelled,
            Self::TimedOut { .. } | Self::GuestUnresponsive(_) | Self::PeerSilent { .. } => {
                AbortKind::TimedOut
            }
            Self::NotConverging(_) => AbortKind::NotConverging,
            Self::Incompatible(_) => AbortKind::Incompatible,
            Self::PeerMisbehaved(_) => AbortKind::Misbehaved,
            Self::MemoryDiffers => AbortKind::MemoryDiffers,
            Self::PeerEnded(reason) => reason.kind(),
            Self::LinkLost(_) => AbortKind::LinkLost,
            Self::HostRefused(_) => AbortKind::HostRefused,
            Self::Bug(_) => AbortKind::Bug,
        };
        AbortReason::new(kind, &self.to_string())
    }
}

/// The kind of an [`AbortReason`]: small, closed, and safe to add to (an unknown word reads as `Other`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AbortKind {
    /// An operator ended the move.
    Cancelled,
    /// It took too long.
    TimedOut,
    /// The blackout could not fit its limit.
    NotConverging,
    /// Hosts or guests do not fit each other.
    Incompatible,
    /// One side speaks plaintext and the other does not.
    Plaintext,
    /// Another move is going on there.
    Busy,
    /// The peer of the sender broke the protocol.
    Misbehaved,
    /// `--verify` found two digests that differ.
    MemoryDiffers,
    /// A connection ended.
    LinkLost,
    /// The sender's host or guest refused something.
    HostRefused,
    /// The sender is wrong.
    Bug,
    /// A word of a later version.
    #[serde(other)]
    Other,
}

/// What one host tells the other when it ends a move.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AbortReason {
    kind: AbortKind,
    sentence: Sentence,
}

impl AbortReason {
    /// The longest sentence, in bytes; a longer one is cut.
    pub const SENTENCE_BYTES_MAX: usize = 1024;

    /// A reason in one sentence.
    pub fn new(kind: AbortKind, sentence: &str) -> Self {
        Self { kind, sentence: Sentence::new(sentence) }
    }

    /// A plain connection knocked at a door that wants TLS.
    pub fn plaintext_refused() -> Self {
        Self::new(
            AbortKind::Plaintext,
            "this side wants TLS: give --tls-dir there, or --insecure-plaintext on both sides",
        )
    }

    /// Another move is going on here.
    pub fn busy() -> Self {
        Self::new(AbortKind::Busy, "another move into this guest is going on: wait for its end, or cancel it")
    }

    /// Its kind.
    pub const fn kind(&self) -> AbortKind {
        self.kind
    }

    /// Its sentence, bounded and without control characters.
    pub fn sentence(&self) -> &str {
        &self.sentence.0
    }
}

impl fmt::Display for AbortReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.sentence())
    }
}

/// Text that crossed the wire, or will: bounded, printable.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
struct Sentence(String);

impl Sentence {
    fn new(text: &str) -> Self {
        let mut kept = String::with_capacity(text.len().min(AbortReason::SENTENCE_BYTES_MAX));
        for c in text.chars().map(|c| if c.is_control() { ' ' } else { c }) {
            if kept.len() + c.len_utf8() > AbortReason::SENTENCE_BYTES_MAX {
                break;
            }
            kept.push(c);
        }
        Self(kept)
    }
}

impl From<Sentence> for String {
    fn from(sentence: Sentence) -> Self {
        sentence.0
    }
}

impl From<String> for Sentence {
    fn from(text: String) -> Self {
        Self::new(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_sentence_is_cut_and_cleaned() {
        let json = format!(r#"{{"kind":"from-the-future","sentence":"a\u001b[2Jb{}"}}"#, "ä".repeat(2000));
        let reason: AbortReason = serde_json::from_str(&json).unwrap();
        assert_eq!(reason.kind(), AbortKind::Other);
        assert!(reason.sentence().starts_with("a [2Jbä"));
        assert!(reason.sentence().len() <= AbortReason::SENTENCE_BYTES_MAX);
    }
}
