//! The other end of a micro-VM's control socket.

use std::time::Duration;

use vmferry_datapath::{ByteLen, RamFile};

use super::microvm::SAVED_BYTES_MAX;
use super::wire::{Identity, MicroVmStatus, Reply, Request};
use super::{DEVICE_CHUNK_MAX, socket_path};
use crate::attach::BlockPlace;
use crate::control::{Caller, MemoryPlace};
use crate::{Description, DeviceFacts, GuestError, StateEstimate, StateRead};

/// The one block of a micro-VM's memory.
const BLOCK_NAME: &str = "ram";

/// Speaks with a running micro-VM.
#[derive(Debug)]
pub struct MicroVmControl {
    caller: Caller<Reply>,
}

impl MicroVmControl {
    /// Finds the micro-VM `name`.
    pub fn connect(name: &str) -> Result<Self, GuestError> {
        let start = format!("vmferry microvm --name {name}");
        Ok(Self { caller: Caller::connect(&socket_path(name)?, "micro-VM", name, &start)? })
    }

    /// What the micro-VM knows about itself.
    pub fn status(&mut self) -> Result<MicroVmStatus, GuestError> {
        let reply = self.caller.ask(&Request::Status)?;
        if let Reply::Status(status) = reply {
            return Ok(status);
        }
        Err(self.caller.unexpected(&reply))
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

    pub(super) fn attach(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Attach)
    }

    pub(super) fn harvest(&mut self, max: u64) -> Result<Vec<u8>, GuestError> {
        self.bytes(&Request::Harvest, max)
    }

    pub(super) fn pause(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Pause)
    }

    pub(super) fn resume(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Resume)
    }

    pub(super) fn run(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Run)
    }

    pub(super) fn discard(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::Discard)
    }

    pub(super) fn save(&mut self) -> Result<Vec<u8>, GuestError> {
        self.bytes(&Request::Save, SAVED_BYTES_MAX)
    }

    pub(super) fn load(&mut self, bytes: &[u8], age: Duration) -> Result<(), GuestError> {
        let age_us = u64::try_from(age.as_micros()).unwrap_or(u64::MAX);
        self.caller.order_with(&Request::Load { len: bytes.len() as u64, age_us }, bytes)
    }

    /// What devices may write and the log of this connection cannot tell.
    pub(super) fn pinned(&mut self, max: u64) -> Result<Vec<u8>, GuestError> {
        self.bytes(&Request::Pinned, max)
    }

    pub(super) fn pre_copy(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::PreCopy)
    }

    pub(super) fn end_pre_copy(&mut self) -> Result<(), GuestError> {
        self.caller.order(&Request::EndPreCopy)
    }

    pub(super) fn read_device(&mut self, device: usize, into: &mut [u8]) -> Result<StateRead, GuestError> {
        let max = (into.len() as u64).min(DEVICE_CHUNK_MAX);
        match self.caller.ask(&Request::ReadDevice { device, max })? {
            Reply::Idle => Ok(StateRead::Idle),
            Reply::End => Ok(StateRead::End),
            Reply::Bytes { len } => {
                let bytes = self.caller.bytes(len, max)?;
                into[..bytes.len()].copy_from_slice(&bytes);
                Ok(StateRead::Bytes(bytes.len()))
            }
            reply @ (Reply::Done
            | Reply::Identity(_)
            | Reply::Status(_)
            | Reply::Remaining(_)
            | Reply::Refused(_)) => Err(self.caller.unexpected(&reply)),
        }
    }

    pub(super) fn remaining(&mut self, device: usize) -> Result<StateEstimate, GuestError> {
        let reply = self.caller.ask(&Request::Remaining { device })?;
        if let Reply::Remaining(estimate) = reply {
            return Ok(estimate);
        }
        Err(self.caller.unexpected(&reply))
    }

    pub(super) fn expect_device(&mut self, device: usize) -> Result<(), GuestError> {
        self.caller.order(&Request::ExpectDevice { device })
    }

    pub(super) fn write_device(&mut self, device: usize, bytes: &[u8]) -> Result<(), GuestError> {
        self.caller.order_with(&Request::WriteDevice { device, len: bytes.len() as u64 }, bytes)
    }

    pub(super) fn finish_device(&mut self, device: usize) -> Result<(), GuestError> {
        self.caller.order(&Request::FinishDevice { device })
    }

    pub(super) fn identity(&mut self) -> Result<Identity, GuestError> {
        let reply = self.caller.ask(&Request::Describe)?;
        if let Reply::Identity(identity) = reply {
            return Ok(identity);
        }
        Err(self.caller.unexpected(&reply))
    }

    fn bytes(&mut self, request: &Request, max: u64) -> Result<Vec<u8>, GuestError> {
        let reply = self.caller.ask(request)?;
        let Reply::Bytes { len } = reply else { return Err(self.caller.unexpected(&reply)) };
        self.caller.bytes(len, max)
    }
}

/// A micro-VM's memory as the lanes and the tracker see it.
pub(super) struct Place {
    pub(super) description: Description,
    pub(super) file: RamFile,
    pub(super) block: BlockPlace,
}

impl Identity {
    /// Opens the memory of this micro-VM.
    pub(super) fn place(&self, name: &str, writable: bool) -> Result<Place, GuestError> {
        let whose = format!("micro-VM '{name}'");
        let len = ByteLen(self.ram_bytes);
        let MemoryPlace { layout, file, block } =
            MemoryPlace::open(self.pid, self.memory_fd, len, BLOCK_NAME, &whose, writable)?;
        let mut facts = DeviceFacts::compared(&self.devices);
        facts.extend([
            ("micro-VM state".to_owned(), "1".to_owned()),
            ("cpus".to_owned(), self.cpus.to_string()),
            ("cpu features".to_owned(), self.features.clone()),
        ]);
        let notes = vec![format!("micro-VM process {}", self.pid)];
        let description = Description { kind: "kvm".to_owned(), name: name.to_owned(), facts, layout, notes };
        Ok(Place { description, file, block })
    }
}
