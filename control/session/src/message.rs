//! What the two hosts say to each other on the control channel.
//!
//! ```text
//!   source                                target
//!     Offer ───────────────────────────────►        Prepare
//!           ◄─────────────────────────────── Answer (or Refuse)
//!     … lanes: rounds, last pages, device state …
//!     Final{totals} ───────────────────────►        verify, load
//!           ◄─────────────────────────────── Ready
//!     Commit ──────────────────────────────►        run             in doubt from here …
//!           ◄─────────────────────────────── Running                … to here
//!     Heard ───────────────────────────────►        (need not answer Asks any more)
//!
//!     Ask{attempt} ────────────────────────►        on a new connection, after the old one was lost in doubt
//!           ◄─────────────────────────────── Running | NeverRan | Unknown
//! ```
//!
//! What must never happen: a page in here, or device state. Every list and every text has a cap, checked when it is
//! decoded, before anybody looks at it.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmferry_datapath::RamLayout;

use crate::devices::DeviceTimes;
use crate::error::AbortReason;
use crate::negotiate::{Agreement, CipherSuite, CompressionMode};
use crate::transport::{LaneTransport, is_only_tcp, only_tcp};

/// The most facts a guest may state about itself.
pub const FACTS_MAX: usize = 64;
/// The longest key or value of a fact, and the longest name, in bytes.
pub const TEXT_BYTES_MAX: usize = 1024;
/// The most ciphers, compressions or protocol versions in one offer.
pub const CHOICES_MAX: usize = 16;

/// One attempt to move one guest: random, drawn by the source, the same on both hosts and in the lanes' greetings.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AttemptId([u8; 16]);

impl AttemptId {
    /// From 16 random bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for AttemptId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<AttemptId> for String {
    fn from(attempt: AttemptId) -> Self {
        attempt.to_string()
    }
}

impl TryFrom<String> for AttemptId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        const WRONG: &str = "an attempt id has 32 lower-case hexadecimal digits";
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(WRONG),
        };
        if text.len() != 32 {
            return Err(WRONG);
        }
        let mut bytes = [0; 16];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

/// What one side knows about its guest; the adapters of `vmferry-guest` fill it in.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestFacts {
    /// `qemu`, `process`, …: only equal kinds can move into each other.
    pub kind: String,
    /// The guest's name, for people only.
    pub name: String,
    /// What must be equal on both sides, such as `machine`, `cpus`, `cpu-model`; keys that only one side states and
    /// keys that begin with `note-` are not compared.
    pub facts: BTreeMap<String, String>,
    /// The RAM blocks, in order.
    pub layout: RamLayout,
}

/// The source's opening: what it wants to move and how it could.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// This attempt.
    pub attempt: AttemptId,
    /// Protocol versions that the source speaks.
    pub versions: Vec<u16>,
    /// Ciphers that it would use, best first.
    pub ciphers: Vec<CipherSuite>,
    /// Compressions that it would use, best first.
    pub compressions: Vec<CompressionMode>,
    /// Lanes that it would open.
    pub lanes: u16,
    /// What they would travel over, best first.
    #[serde(default = "only_tcp", skip_serializing_if = "is_only_tcp")]
    pub transports: Vec<LaneTransport>,
    /// Whether a digest of all memory is compared in the blackout.
    pub verify: bool,
    /// The guest.
    pub guest: GuestFacts,
}

/// What one lane carried, by the source's count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneTally {
    /// Lane number, from 0.
    pub lane: u16,
    /// Records, the end record included.
    pub records: u64,
    /// Bytes of record bodies.
    pub bytes: u64,
}

/// What the target must hold before it may load the state.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FinalTotals {
    /// One entry per lane.
    pub lanes: Vec<LaneTally>,
    /// Bytes of device state.
    pub state_bytes: u64,
    /// With `--verify`: the digest of all memory, as text that the datapath made.
    pub digest: Option<String>,
    /// How long ago the VMM's state was saved, microseconds by the source's own clock when this left; absent before
    /// version 3. The guest's clocks were read then, and have to have gone on since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_age_us: Option<u64>,
}

/// What the target measured of the blackout, for the source's report and for its next prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetTimes {
    /// From Final until all pages were there, microseconds.
    pub complete_us: u64,
    /// Loading the VMM's own state, microseconds.
    pub load_us: u64,
    /// From Commit until the guest ran, microseconds; zero in `Ready`.
    pub run_us: u64,
    /// Loading the states of the devices; absent without any, as in version 1.
    #[serde(default, skip_serializing_if = "DeviceTimes::is_none")]
    pub devices: DeviceTimes,
}

/// A message of the control channel.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "type", content = "body", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Message {
    /// Source: what it wants to move and how it could.
    Offer(Box<Offer>),
    /// Target: how it is done; its guest is prepared, its door takes lanes.
    Answer(Agreement),
    /// Target: it is not done.
    Refuse(AbortReason),
    /// Source: everything was sent, the guest is paused, this is what must have arrived.
    Final(FinalTotals),
    /// Target: memory is complete, the state is loaded, the guest waits for Commit.
    Ready(TargetTimes),
    /// Source: the guest is the target's.
    Commit,
    /// Target: it runs the guest.
    Running(TargetTimes),
    /// Target: it never ran the guest of this attempt and never will.
    NeverRan {
        /// The attempt that it speaks of.
        attempt: AttemptId,
        /// Why.
        reason: AbortReason,
    },
    /// Target: it does not know this attempt, or not how it ended. Proves nothing.
    Unknown {
        /// The attempt that it speaks of.
        attempt: AttemptId,
    },
    /// Source, in doubt, on a new connection: did you run it? It repeats the Commit.
    Ask {
        /// The attempt that it speaks of.
        attempt: AttemptId,
    },
    /// Source: the answer to Commit or Ask arrived; the target need not remember it any longer.
    Heard,
    /// Either side, before Commit: the move is over.
    Abort(AbortReason),
    /// Are you there?
    Ping(u64),
    /// Yes.
    Pong(u64),
}

/// A list or a text of a decoded message is longer than its cap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooLong(pub(crate) &'static str);

impl Message {
    /// Its name, for diagrams and sentences.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Offer(_) => "Offer",
            Self::Answer(_) => "Answer",
            Self::Refuse(_) => "Refuse",
            Self::Final(_) => "Final",
            Self::Ready(_) => "Ready",
            Self::Commit => "Commit",
            Self::Running(_) => "Running",
            Self::NeverRan { .. } => "NeverRan",
            Self::Unknown { .. } => "Unknown",
            Self::Ask { .. } => "Ask",
            Self::Heard => "Heard",
            Self::Abort(_) => "Abort",
            Self::Ping(_) => "Ping",
            Self::Pong(_) => "Pong",
        }
    }

    /// Everything that serde's types leave open.
    pub(crate) fn check_caps(&self) -> Result<(), TooLong> {
        match self {
            Self::Offer(offer) => offer.check_caps(),
            Self::Final(totals) => totals.check_caps(),
            Self::Answer(_)
            | Self::Refuse(_)
            | Self::Ready(_)
            | Self::Commit
            | Self::Running(_)
            | Self::NeverRan { .. }
            | Self::Unknown { .. }
            | Self::Ask { .. }
            | Self::Heard
            | Self::Abort(_)
            | Self::Ping(_)
            | Self::Pong(_) => Ok(()),
        }
    }
}

impl Offer {
    fn check_caps(&self) -> Result<(), TooLong> {
        let choices =
            [self.versions.len(), self.ciphers.len(), self.compressions.len(), self.transports.len()];
        if choices.iter().any(|&count| count > CHOICES_MAX) {
            return Err(TooLong("a list of choices"));
        }
        let guest = &self.guest;
        if guest.facts.len() > FACTS_MAX {
            return Err(TooLong("the list of facts"));
        }
        let texts =
            guest.facts.iter().flat_map(|(key, value)| [key, value]).chain([&guest.kind, &guest.name]);
        if texts.into_iter().any(|text| text.len() > TEXT_BYTES_MAX) {
            return Err(TooLong("a text"));
        }
        Ok(())
    }
}

impl FinalTotals {
    /// How old the VMM's state was when this left.
    pub(crate) fn state_age(&self) -> Duration {
        Duration::from_micros(self.state_age_us.unwrap_or(0))
    }

    fn check_caps(&self) -> Result<(), TooLong> {
        if self.lanes.len() > usize::from(crate::negotiate::LANES_MAX) {
            return Err(TooLong("the list of lanes"));
        }
        if self.digest.as_ref().is_some_and(|digest| digest.len() > TEXT_BYTES_MAX) {
            return Err(TooLong("the digest"));
        }
        Ok(())
    }
}
