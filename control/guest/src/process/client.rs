//! The other end of a workload's control socket.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vmferry_datapath::{ByteLen, PageIndex, RamBlock, RamFile, RamLayout};
use vmferry_workload::{PAGE_BYTES, Report};

use super::socket_path;
use super::state::state_bytes_max;
use super::wire::{Identity, Line, Reply, Request, WorkloadStatus};
use crate::attach::{BlockPlace, Inode};
use crate::{Description, GuestError};

/// Verifying some gigabytes takes seconds; a workload that is silent for longer has hung.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// The one block of a workload's memory.
const BLOCK_NAME: &str = "workload";

/// Speaks with a running workload.
#[derive(Debug)]
pub struct WorkloadControl {
    name: String,
    line: Line,
}

impl WorkloadControl {
    /// Finds the workload `name`.
    pub fn connect(name: &str) -> Result<Self, GuestError> {
        let path = socket_path(name)?;
        let stream = UnixStream::connect(&path).map_err(|error| no_workload(name, error))?;
        stream
            .set_read_timeout(Some(ANSWER_TIMEOUT))
            .map_err(GuestError::refused("the socket takes no timeout"))?;
        Ok(Self { name: name.to_owned(), line: Line::new(stream) })
    }

    /// What the workload knows about itself.
    pub fn status(&mut self) -> Result<WorkloadStatus, GuestError> {
        let reply = self.ask(&Request::Status)?;
        if let Reply::Status(status) = reply {
            return Ok(status);
        }
        Err(self.unexpected(&reply))
    }

    /// Verifies every page now.
    pub fn verify(&mut self) -> Result<Report, GuestError> {
        let reply = self.ask(&Request::Verify)?;
        if let Reply::Verified(report) = reply {
            return Ok(report);
        }
        Err(self.unexpected(&reply))
    }

    /// Changes `rate`, `pattern` or `set` of every writer.
    pub fn set(&mut self, key: &str, value: &str) -> Result<(), GuestError> {
        self.order(&Request::Set { key: key.to_owned(), value: value.to_owned() })
    }

    /// The owner's stop: a move leaves it stopped.
    pub fn stop(&mut self) -> Result<(), GuestError> {
        self.order(&Request::Stop)
    }

    /// Undoes `stop`.
    pub fn start(&mut self) -> Result<(), GuestError> {
        self.order(&Request::Start)
    }

    /// Ends the process.
    pub fn quit(&mut self) -> Result<(), GuestError> {
        self.order(&Request::Quit)
    }

    pub(crate) fn pause(&mut self) -> Result<(), GuestError> {
        self.order(&Request::Pause)
    }

    pub(crate) fn resume(&mut self) -> Result<(), GuestError> {
        self.order(&Request::Resume)
    }

    pub(crate) fn run(&mut self) -> Result<(), GuestError> {
        self.order(&Request::Run)
    }

    pub(crate) fn discard(&mut self) -> Result<(), GuestError> {
        self.order(&Request::Discard)
    }

    pub(crate) fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.order(&Request::Throttle { percent })
    }

    pub(crate) fn save(&mut self, pages: u64) -> Result<Vec<u8>, GuestError> {
        let reply = self.ask(&Request::Save)?;
        let Reply::Bytes { len } = reply else { return Err(self.unexpected(&reply)) };
        let bytes = self.line.receive_bytes(len, state_bytes_max(pages));
        bytes.map_err(|error| self.lost("its state ended early", &error))
    }

    pub(crate) fn load(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        let announced = self.line.send(&Request::Load { len: bytes.len() as u64 });
        let sent = announced.and_then(|()| self.line.send_bytes(bytes));
        sent.map_err(|error| self.lost("it takes no state", &error))?;
        self.done()
    }

    pub(crate) fn identity(&mut self) -> Result<Identity, GuestError> {
        let reply = self.ask(&Request::Describe)?;
        if let Reply::Identity(identity) = reply {
            return Ok(identity);
        }
        Err(self.unexpected(&reply))
    }

    fn order(&mut self, request: &Request) -> Result<(), GuestError> {
        self.line.send(request).map_err(|error| self.lost("it takes no command", &error))?;
        self.done()
    }

    fn done(&mut self) -> Result<(), GuestError> {
        let reply = self.reply()?;
        if reply == Reply::Done { Ok(()) } else { Err(self.unexpected(&reply)) }
    }

    fn ask(&mut self, request: &Request) -> Result<Reply, GuestError> {
        self.line.send(request).map_err(|error| self.lost("it takes no command", &error))?;
        self.reply()
    }

    fn reply(&mut self) -> Result<Reply, GuestError> {
        match self.line.receive() {
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(GuestError::misbehaved(format!("the workload '{}' has ended", self.name))),
            Err(error) => Err(self.lost("it does not answer", &error)),
        }
    }

    fn unexpected(&self, reply: &Reply) -> GuestError {
        let name = &self.name;
        if let Reply::Refused(why) = reply {
            return GuestError::misbehaved(format!("the workload '{name}' refused: {why}"));
        }
        GuestError::misbehaved(format!("the workload '{name}' answered beside the point: {reply:?}"))
    }

    fn lost(&self, what: &str, error: &std::io::Error) -> GuestError {
        GuestError::misbehaved(format!("the workload '{}' is lost: {what} ({error})", self.name))
    }
}

fn no_workload(name: &str, error: std::io::Error) -> GuestError {
    if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) {
        return GuestError::mistake(format!(
            "no workload '{name}' runs here: start one with 'vmferry workload --name {name}'"
        ));
    }
    GuestError::refused(format!("the control socket of workload '{name}' cannot be reached; run as its user"))(
        error,
    )
}

/// A workload's memory as the lanes and the tracker see it.
pub(crate) struct Place {
    pub(crate) description: Description,
    pub(crate) file: RamFile,
    pub(crate) block: BlockPlace,
}

impl Identity {
    /// Opens the memory of this workload. The memfd has no path, so it is reached through the process that holds it.
    pub(crate) fn place(&self, name: &str, writable: bool) -> Result<Place, GuestError> {
        let path = format!("/proc/{}/fd/{}", self.pid, self.memory_fd);
        let what = format!("the memory of workload '{name}' cannot be opened; run vmferry as the same user");
        let file =
            OpenOptions::new().read(true).write(writable).open(path).map_err(GuestError::refused(what))?;
        let inode = inode_of(&file)?;
        let len = self.pages.saturating_mul(PAGE_BYTES as u64);
        let page_bytes = u32::try_from(PAGE_BYTES).unwrap_or(u32::MAX);
        let block = RamBlock { name: BLOCK_NAME.to_owned(), len: ByteLen(len), page_bytes };
        let layout = RamLayout::new(vec![block])?;
        let facts = [("workload registers".to_owned(), "1".to_owned())].into();
        let notes = vec![format!("workload process {}", self.pid)];
        let description =
            Description { kind: "process".to_owned(), name: name.to_owned(), facts, layout, notes };
        let block = BlockPlace { inode, offset: 0, len, first_page: PageIndex(0) };
        Ok(Place { description, file: RamFile { file, offset: 0 }, block })
    }
}

fn inode_of(file: &File) -> Result<Inode, GuestError> {
    let found = file.metadata().map_err(GuestError::refused("the workload's memory cannot be looked at"))?;
    let device = (rustix::fs::major(found.dev()), rustix::fs::minor(found.dev()));
    Ok(Inode { device, number: found.ino() })
}
