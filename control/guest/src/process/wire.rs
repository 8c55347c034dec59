//! The words of a workload's control socket: one JSON object a line, some followed by raw bytes.

use serde::{Deserialize, Serialize};
use vmferry_workload::{DevicePlan, Report};

use crate::control::Answer;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Request {
    Describe,
    /// Stop for a move.
    Pause,
    /// Undo `Pause`; a workload that its owner stopped stays stopped.
    Resume,
    /// Answered by `Bytes`.
    Save,
    /// Followed by `len` raw bytes.
    Load {
        len: u64,
    },
    /// Begin to run what was loaded.
    Run,
    /// Forget what was loaded and wait again.
    Discard,
    Throttle {
        percent: u8,
    },
    Status,
    Verify,
    Set {
        key: String,
        value: String,
    },
    /// Begins a device's stream anew.
    DeviceOpen {
        name: String,
    },
    /// Answered by `Bytes`, `Idle` or `Ended`.
    DeviceRead {
        name: String,
        max: u64,
    },
    /// Answered by `Remaining`.
    DeviceRemaining {
        name: String,
    },
    /// Followed by `len` raw bytes.
    DeviceWrite {
        name: String,
        len: u64,
    },
    /// A device has its whole state.
    DeviceFinish {
        name: String,
    },
    /// The owner's pause.
    Stop,
    /// Undoes `Stop`.
    Start,
    Quit,
}

/// What the workload answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Reply {
    Done,
    Identity(Identity),
    /// Followed by `len` raw bytes.
    Bytes {
        len: u64,
    },
    /// A device has nothing right now.
    Idle,
    /// A device's stream is over.
    Ended,
    Remaining {
        expected: u64,
        at_most: u64,
    },
    Status(WorkloadStatus),
    Verified(Report),
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

/// What a workload is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It waits for a workload to come in.
    Waiting,
    /// It writes.
    Running,
    /// A move paused it.
    Paused,
    /// Its owner stopped it.
    Stopped,
    /// It came in, and waits for the word to run.
    Loaded,
}

/// Where a workload's memory is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) pid: i32,
    /// The memfd's number in that process.
    pub(crate) memory_fd: i32,
    pub(crate) pages: u64,
    pub(crate) phase: Phase,
    pub(crate) devices: Vec<DevicePlan>,
}

/// A workload's view of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadStatus {
    /// What it does now.
    pub phase: Phase,
    /// One plan for each writer, as a plan prints itself.
    pub plans: Vec<String>,
    /// Page writes so far, of this workload wherever it ran.
    pub writes: u64,
    /// Pages verified in the background since it runs here.
    pub verified: u64,
    /// Of those, wrong ones.
    pub wrong: u64,
    /// When the writers last began to run here, on this host's `CLOCK_MONOTONIC`.
    pub running_since_ns: u64,
    /// When they last stopped here.
    pub stopped_at_ns: u64,
    /// Its fake devices.
    pub devices: Vec<DeviceStatus>,
}

/// A fake device's view of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// Of all its state, right now.
    pub digest: u64,
    /// Whether its state came in from elsewhere, whole and with the digest that the source had.
    pub came_in: bool,
    /// Pages that it wrote unseen and that do not hold what it wrote.
    pub wrong_pinned_pages: u64,
}
