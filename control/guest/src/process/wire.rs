//! The words of a workload's control socket: one JSON object a line, some followed by raw bytes.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmferry_workload::Report;

/// The longest line; a longer one ends the connection.
const LINE_BYTES_MAX: u64 = 16 << 10;

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
    Status(WorkloadStatus),
    Verified(Report),
    Refused(String),
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
}

/// One end of the socket.
#[derive(Debug)]
pub(crate) struct Line {
    reader: BufReader<UnixStream>,
}

impl Line {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { reader: BufReader::new(stream) }
    }

    pub(crate) fn send(&mut self, message: &impl Serialize) -> std::io::Result<()> {
        let mut text = serde_json::to_vec(message)?;
        text.push(b'\n');
        self.reader.get_mut().write_all(&text)
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// The next message; `None` when the other side is gone.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self) -> std::io::Result<Option<T>> {
        let mut text = String::new();
        if self.reader.by_ref().take(LINE_BYTES_MAX).read_line(&mut text)? == 0 {
            return Ok(None);
        }
        serde_json::from_str(&text).map(Some).map_err(std::io::Error::from)
    }

    /// `len` raw bytes, refused above `max` before anything is allocated.
    pub(crate) fn receive_bytes(&mut self, len: u64, max: u64) -> std::io::Result<Vec<u8>> {
        if len > max {
            let why = format!("{len} bytes are announced where at most {max} make sense");
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, why));
        }
        let mut bytes = Vec::new();
        self.reader.by_ref().take(len).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != len {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(bytes)
    }
}
