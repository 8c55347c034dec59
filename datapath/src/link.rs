//! A lane's transport: registered buffers out, contiguous bytes in.
//!
//! ```text
//!   fill a slot ─► submit ─► (kernel, network card) ─► the slot is free again
//!   arrived() ◄─ bytes of whole or partial records ◄─ progress()
//! ```
//!
//! The trait is drafted for RDMA: every buffer exists and is registered before the first record, a submitted slot
//! belongs to the link until its completion was reaped, and received bytes lie in the link's own buffers until
//! they are consumed. TCP and memory are then the easy cases. What must never happen: two slots overtaking each
//! other, or a slot handed out while the kernel still reads it.

use std::time::Duration;

use rustix::io::Errno;

use crate::error::{DataError, LinkFault};
use crate::frame::FrameFault;
use crate::page::ChunkIndex;

pub mod completion;
pub mod contract;
pub mod file;
pub mod memory;
#[cfg(feature = "rdma")]
pub mod rdma;
pub(crate) mod ring;
pub mod tcp;
pub mod zero_copy;

/// The buffers that a lane needs of its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkPlan {
    /// How many outgoing slots.
    pub send_slots: usize,
    /// Bytes of each.
    pub slot_bytes: usize,
    /// Bytes that may have arrived and not be consumed.
    pub receive_bytes: usize,
}

/// What a link can report. The lane, which knows its number, makes a [`DataError`] of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkTrouble {
    /// The connection is gone.
    Lost(LinkFault),
    /// The other end broke the link's own rules.
    Broken(FrameFault),
    /// This host's kernel refused a service.
    Refused {
        /// What was asked of it.
        service: &'static str,
        /// What its operator can do.
        fix: &'static str,
        /// The kernel's answer.
        errno: Errno,
    },
}

impl LinkTrouble {
    /// The error of the lane that had this trouble.
    pub const fn on_lane(self, lane: u16) -> DataError {
        match self {
            LinkTrouble::Lost(fault) => DataError::LinkLost { lane, fault },
            LinkTrouble::Broken(fault) => DataError::PeerMisbehaved { lane, fault },
            LinkTrouble::Refused { service, fix, errno } => DataError::HostRefused { service, fix, errno },
        }
    }
}

/// Closes a link from another thread, also while its lane waits in the kernel.
pub trait Breaker: Send + Sync {
    /// Closes it; whoever waits on either end is woken.
    fn sever(&self);
}

/// One lane's two-way transport. Used by one thread, after [`Link::prepare`] on that thread.
pub trait Link: Send {
    /// Allocates and registers every buffer. Called once, first, on the lane's thread.
    fn prepare(&mut self, plan: LinkPlan) -> Result<(), LinkTrouble>;

    /// What closes this link from elsewhere.
    fn breaker(&self) -> Result<Box<dyn Breaker>, LinkTrouble>;

    /// A slot that may be filled now. The same one again until it is submitted.
    fn free_slot(&self) -> Option<usize>;

    /// The bytes of a slot; empty while the slot is on its way.
    fn slot_mut(&mut self, slot: usize) -> &mut [u8];

    /// Sends the first `len` bytes of a slot, after everything submitted before. Does not wait.
    fn submit(&mut self, slot: usize, len: usize) -> Result<(), LinkTrouble>;

    /// How many slots are on their way.
    fn unsent(&self) -> usize;

    /// Everything that arrived and was not consumed, in one piece.
    fn arrived(&mut self) -> &mut [u8];

    /// Gives the first `len` arrived bytes back to the link.
    fn consume(&mut self, len: usize);

    /// A hint: nothing can be done here before so many more bytes have arrived, and they are on their way. A link
    /// that would wake its lane for less may let it sleep.
    fn expect_bytes(&mut self, more: usize);

    /// Moves both directions on, waiting at most `wait` for something to happen. `Ok(false)` when nothing did.
    fn progress(&mut self, wait: Duration) -> Result<bool, LinkTrouble>;

    /// Whether page bodies go past the records, straight into the target's guest: [`Link::place`] on the one end, and
    /// records that tell of it believed on the other.
    fn places(&self) -> bool {
        false
    }

    /// Sends the bytes of these pages into the target's guest; what is submitted afterwards arrives after them.
    /// `Ok(false)`: not now, and nothing was sent.
    fn place(&mut self, _chunk: ChunkIndex, _pages: u64) -> Result<bool, LinkTrouble> {
        let (service, fix) = ("write pages past the records", "report this as a bug: the link cannot");
        Err(LinkTrouble::Refused { service, fix, errno: Errno::OPNOTSUPP })
    }

    /// How it works, for people.
    fn name(&self) -> &'static str;
}

#[cfg(test)]
mod tests;
