//! The receiving side of an RDMA link: the ring that the peer writes, and the private copy that is handed out.
//!
//! ```text
//!   ring, open to the peer:   |....#######......|    head ─► tail, both only go up
//!                                  │ copied once
//!   inbox, private:           |######......|         what `arrived` shows, in one piece
//! ```
//!
//! Ring space goes back to the peer as soon as its bytes were copied, so the ring stays small.

use super::verbs::Region;
use crate::frame::FrameFault;

/// Credit is due when this part of the ring was taken out and not told.
const CREDIT_PART: u64 = 4;

/// The ring and the copy.
pub(super) struct Inbox {
    ring: Region,
    /// Bytes that the peer wrote, that were copied out, and that the peer knows to be.
    wrote: u64,
    taken: u64,
    told: u64,
    private: Box<[u8]>,
    head: usize,
    tail: usize,
}

impl Inbox {
    pub(super) fn new(ring: Region, private_bytes: usize) -> Inbox {
        let private = vec![0; private_bytes].into_boxed_slice();
        Inbox { ring, wrote: 0, taken: 0, told: 0, private, head: 0, tail: 0 }
    }

    /// The peer says that it wrote so many bytes behind the last ones.
    pub(super) fn wrote(&mut self, len: usize) -> Result<(), FrameFault> {
        let ring = self.ring.len() as u64;
        let straight = ring - self.wrote % ring;
        let room = ring - (self.wrote - self.told);
        if len == 0 || len as u64 > straight.min(room) {
            return Err(FrameFault::RingOverrun);
        }
        self.wrote += len as u64;
        Ok(())
    }

    /// Copies what fits out of the ring; whether there was anything.
    pub(super) fn fill(&mut self) -> bool {
        if self.wrote == self.taken || self.tail - self.head == self.private.len() {
            return false;
        }
        if self.head > 0 {
            self.private.copy_within(self.head..self.tail, 0);
            (self.head, self.tail) = (0, self.tail - self.head);
        }
        let ring = self.ring.len() as u64;
        let mut any = false;
        while self.wrote > self.taken && self.tail < self.private.len() {
            let at = self.taken % ring;
            let ready = (self.wrote - self.taken).min(ring - at);
            let room = &mut self.private[self.tail..];
            let len = usize::try_from(ready).unwrap_or(usize::MAX).min(room.len());
            if !self.ring.copy_out(usize::try_from(at).unwrap_or(usize::MAX), &mut room[..len]) {
                return any;
            }
            self.taken += len as u64;
            self.tail += len;
            any = true;
        }
        any
    }

    /// What to tell the peer that was taken out, when it is worth a message; it is then taken for told.
    pub(super) fn credit_due(&mut self) -> Option<u64> {
        let due = self.taken - self.told >= self.ring.len() as u64 / CREDIT_PART;
        due.then(|| {
            self.told = self.taken;
            self.taken
        })
    }

    pub(super) fn arrived(&mut self) -> &mut [u8] {
        &mut self.private[self.head..self.tail]
    }

    pub(super) fn consume(&mut self, len: usize) {
        self.head = self.tail.min(self.head + len);
    }
}
