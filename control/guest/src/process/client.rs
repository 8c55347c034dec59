//! The other end of a workload's control socket.

use vmferry_datapath::{ByteLen, RamFile};
use vmferry_workload::{PAGE_BYTES, Report};

use super::socket_path;
use super::state::state_bytes_max;
use super::wire::{Identity, Reply, Request, WorkloadStatus};
use crate::attach::BlockPlace;
use crate::control::{Caller, MemoryPlace};
use crate::{Description, GuestError};

/// The one block of a workload's memory.
const BLOCK_NAME: &str = "workload";

/// Speaks with a running workload.
#[derive(Debug)]
pub struct WorkloadControl {
    caller: Caller<Reply>,
}

impl WorkloadControl {
    /// Finds the workload `name`.
    pub fn connect(name: &str) -> Result<Self, GuestError> {
        let start = format!("vmferry workload --name {name}");
        Ok(Self { caller: Caller::connect(&socket_path(name)?, "workload", name, &start)? })
    }

    /// What the workload knows about itself.
    pub fn status(&mut self) -> Result<WorkloadStatus, GuestError> {
        let reply = self.caller.ask(&Request::Status)?;
        if let Reply::Status(status) = reply {
            return Ok(status);
        }
        Err(self.caller.unexpected(&reply))
    }

    /// Verifies every page now.
    pub fn verify(&mut self) -> Result<Report, GuestError> {
        let reply = self.caller.ask(&Request::Verify)?;
        if let Reply::Verified(report) = reply {
            return Ok(report);
        }
        Err(self.caller.unexpected(&reply))
    }

    /// Changes `rate`, `pattern` or `set` of every writer.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), GuestError> {
        self.caller.order(&Request::Set { key: key.to_owned(), value: value.to_owned() })
    }

    /// The owner's stop: a move leaves it stopped.
    pub fn stop(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Stop)
    }

    /// Undoes `stop`.
    pub fn start(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Start)
    }

    /// Ends the process.
    pub fn quit(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Quit)
    }

    pub(crate) fn pause(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Pause)
    }

    pub(crate) fn resume(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Resume)
    }

    pub(crate) fn run(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Run)
    }

    pub(crate) fn discard(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Discard)
    }

    pub(crate) fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.caller.order(&Request::Throttle { percent })
    }

    pub(crate) fn save(&mut self, pages: u64) -> Result<Vec<u8>, GuestError> {
        let reply = self.caller.ask(&Request::Save)?;
        let Reply::Bytes { len } = reply else { return Err(self.caller.unexpected(&reply)) };
        self.caller.bytes(len, state_bytes_max(pages))
    }

    pub(crate) fn load(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        self.caller.order_with(&Request::Load { len: bytes.len() as u64 }, bytes)
    }

    /// The line, for the devices' words.
    pub(super) fn caller(&mut self) -> &mut Caller<Reply> {
        &mut self.caller
    }

    pub(crate) fn identity(&mut self) -> Result<Identity, GuestError> {
        let reply = self.caller.ask(&Request::Describe)?;
        if let Reply::Identity(identity) = reply {
            return Ok(identity);
        }
        Err(self.caller.unexpected(&reply))
    }
}

/// A workload's memory as the lanes and the tracker see it.
pub(crate) struct Place {
    pub(crate) description: Description,
    pub(crate) file: RamFile,
    pub(crate) block: BlockPlace,
}

impl Identity {
    /// Opens the memory of this workload.
    pub(crate) fn place(&self, name: &str, writable: bool) -> Result<Place, GuestError> {
        let len = ByteLen(self.pages.saturating_mul(PAGE_BYTES as u64));
        let whose = format!("workload '{name}'");
        let MemoryPlace { layout, file, block } =
            MemoryPlace::open(self.pid, self.memory_fd, len, BLOCK_NAME, &whose, writable)?;
        let facts = [("workload registers".to_owned(), "1".to_owned())].into();
        let notes = vec![format!("workload process {}", self.pid)];
        let description =
            Description { kind: "process".to_owned(), name: name.to_owned(), facts, layout, notes };
        Ok(Place { description, file, block })
    }
}
