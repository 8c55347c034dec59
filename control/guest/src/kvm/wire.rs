//! The words of a micro-VM's control socket.

use serde::{Deserialize, Serialize};

use super::args::TrackingWord;
use crate::control::Answer;
use crate::{DeviceFacts, StateEstimate};

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    Describe,
    /// Track what is written; the log belongs to this connection and ends with it.
    Attach,
    /// Answered by `Bytes`: the words of the pages that this connection's log has found since the last time.
    Harvest,
    /// Stop for a move.
    Pause,
    /// Undo `Pause`; a guest that its owner stopped stays stopped.
    Resume,
    /// Answered by `Bytes`.
    Save,
    /// Followed by `len` raw bytes, which were saved so long ago.
    Load {
        len: u64,
        age_us: u64,
    },
    /// Begin to run what was loaded.
    Run,
    /// Answered by `Bytes`: the words of the pages that devices may write and this connection's log cannot tell.
    Pinned,
    /// The states of the devices begin to leave while they work; that ends with this connection.
    PreCopy,
    /// Undoes `PreCopy`, unless the guest is paused.
    EndPreCopy,
    /// Answered by `Bytes` (at least one, at most `max`), `Idle` or `End`. Devices are counted among those that can move.
    ReadDevice {
        device: usize,
        max: u64,
    },
    /// Answered by `Remaining`.
    Remaining {
        device: usize,
    },
    /// A device's state will come.
    ExpectDevice {
        device: usize,
    },
    /// Followed by `len` raw bytes of it.
    WriteDevice {
        device: usize,
        len: u64,
    },
    /// All of it came: load it.
    FinishDevice {
        device: usize,
    },
    /// Forget what was loaded and wait again.
    Discard,
    Status,
    /// The owner's pause.
    Stop,
    /// Undoes `Stop`.
    Start,
    Quit,
}

/// What the micro-VM answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    Done,
    Identity(Identity),
    /// Followed by `len` raw bytes.
    Bytes {
        len: u64,
    },
    Status(MicroVmStatus),
    /// A device has nothing right now.
    Idle,
    /// A device's state is complete.
    End,
    Remaining(StateEstimate),
    Refused(String),
}

impl Answer for Reply {
    fn is_done(&self) -> bool {
        *self == Reply::Done
    }

    fn refusal(&self) -> Option<&str> {
        if let Reply::Refused(why) = self { Some(why) } else { None }
    }
}

/// What a micro-VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MicroVmPhase {
    /// It waits for a guest to come in.
    Waiting,
    /// Its guest runs.
    Running,
    /// A move paused it.
    Paused,
    /// Its owner stopped it.
    Stopped,
    /// A guest came in, and waits for the word to run.
    Loaded,
    /// Its guest is no more.
    Ended,
}

/// What a mover has to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) pid: i32,
    /// The memfd's number in that process.
    pub(crate) memory_fd: i32,
    pub(crate) ram_bytes: u64,
    pub(crate) cpus: u8,
    pub(crate) features: String,
    /// How its log finds dirty pages.
    pub(crate) tracking: TrackingWord,
    /// The threads of its processors, while they run.
    pub(crate) tasks: Vec<i32>,
    pub(crate) phase: MicroVmPhase,
    /// What is passed through to its guest.
    pub(crate) devices: Vec<DeviceFacts>,
}

/// A micro-VM's view of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MicroVmStatus {
    /// What it does now.
    pub phase: MicroVmPhase,
    /// How often a full dirty ring stopped a processor since it runs.
    pub ring_full_exits: u64,
    /// When it last began to run here, on this host's `CLOCK_MONOTONIC`.
    pub running_since_ns: u64,
    /// When it last stopped here.
    pub stopped_at_ns: u64,
}
