//! What can go wrong with the data, sorted by who is to blame.
//!
//! The blame decides what happens next: a peer that misbehaves is never tried again, a lost link is, a refusal of
//! this host is told to its operator, and a bug is told to us. Errors are `Clone`, because a lane's failure is
//! kept and handed to everyone who asks.

use rustix::io::Errno;
use thiserror::Error;

use crate::frame::FrameFault;
use crate::guest_ram::RamError;
use crate::link::completion::CompletionStatus;

/// Who is to blame for an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The other host sent what no honest host sends.
    Peer,
    /// The network between the hosts.
    Link,
    /// This host's kernel or its settings.
    Host,
    /// This program.
    Bug,
}

/// Why pages or device state could not be moved.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DataError {
    /// The other host sent what no honest host sends.
    #[error("lane {lane}: {fault}; nothing of it was written to the guest, and the move was stopped")]
    PeerMisbehaved {
        /// The lane it came in on.
        lane: u16,
        /// What was wrong with it.
        #[source]
        fault: FrameFault,
    },
    /// The network between the hosts.
    #[error("lane {lane}: {fault}; check the network between the hosts and try again")]
    LinkLost {
        /// The lane.
        lane: u16,
        /// What happened to it.
        #[source]
        fault: LinkFault,
    },
    /// This host's kernel refused a service.
    #[error("this host refused to {service}: {errno}; {fix}")]
    HostRefused {
        /// What was asked of it.
        service: &'static str,
        /// What its operator can do.
        fix: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// This program is wrong.
    #[error("a bug in vmferry: {0}; please report it")]
    Bug(&'static str),
}

/// What happened to a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LinkFault {
    /// The other host closed it before the end was sent.
    #[error("the other host closed the connection")]
    Closed,
    /// It was closed on this host, by `abort` or by dropping the sender or receiver.
    #[error("the transfer was stopped on this host")]
    Stopped,
    /// The other host took in nothing for a long time.
    #[error("the other host has taken in nothing for too long")]
    Stalled,
    /// The kernel reported an error on it.
    #[error("the connection failed: {0}")]
    Failed(#[source] Errno),
    /// The RDMA card gave a work request up.
    #[error("the RDMA queue pair failed: {0}")]
    Completed(CompletionStatus),
    /// The RDMA card went away under the connection.
    #[error("the RDMA device was removed")]
    DeviceGone,
}

impl From<RamError> for DataError {
    /// The receiver checks every page before it writes, so all but the kernel's refusals are bugs.
    fn from(error: RamError) -> DataError {
        match error {
            RamError::HostRefused { service: _, block: _, errno } => DataError::HostRefused {
                service: "write the guest's memory",
                fix: "make room for all of it (free memory, the size of /dev/shm) and run vmferry as the VMM's user",
                errno,
            },
            RamError::FileCount { .. }
            | RamError::FileTooShort { .. }
            | RamError::NoSuchPage { .. }
            | RamError::ReadOnly => {
                DataError::Bug("the guest's memory was not mapped as the receiver needs it")
            }
        }
    }
}

impl DataError {
    /// Who is to blame.
    pub const fn blame(&self) -> Blame {
        match self {
            DataError::PeerMisbehaved { .. } => Blame::Peer,
            DataError::LinkLost { .. } => Blame::Link,
            DataError::HostRefused { .. } => Blame::Host,
            DataError::Bug(_) => Blame::Bug,
        }
    }
}
