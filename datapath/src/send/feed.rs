//! One state stream on its way out: pieces in order, on the stream's own lane, beside the pages.
//!
//! ```text
//!   feeder thread ── piece, piece, … end ──► bounded queue ──► lane (stream % lanes), a piece after each chunk
//! ```
//!
//! What must never happen: a piece behind its stream's end; the receiver takes that for a lie.

use std::sync::Arc;

use crossbeam_channel::{SendTimeoutError, Sender as Queue};

use crate::error::DataError;
use crate::lane::Fate;
use crate::limits::{STATE_PIECE_BYTES, TICK};

/// What a lane is told about a state stream.
pub(crate) struct StateOrder {
    pub(crate) stream: u16,
    /// At most a piece long; an empty one ends the stream.
    pub(crate) bytes: Box<[u8]>,
}

/// Sends the bytes of one state stream, from any thread, while pages travel.
pub struct StateFeed {
    stream: u16,
    queue: Queue<StateOrder>,
    fate: Arc<Fate>,
    sent: u64,
    ended: bool,
}

impl StateFeed {
    pub(super) fn new(stream: u16, queue: Queue<StateOrder>, fate: Arc<Fate>) -> StateFeed {
        StateFeed { stream, queue, fate, sent: 0, ended: false }
    }

    /// Sends bytes. `go_on` is asked every few milliseconds while the lane is busy; after `Ok(false)`, when it said
    /// no, some of the bytes were sent and the stream is of no more use.
    pub fn send(&mut self, bytes: &[u8], go_on: &mut dyn FnMut() -> bool) -> Result<bool, DataError> {
        for piece in bytes.chunks(STATE_PIECE_BYTES) {
            if !self.order(piece, go_on)? {
                return Ok(false);
            }
            self.sent += piece.len() as u64;
        }
        Ok(true)
    }

    /// The state is complete: nothing may follow. Must be said before the lanes are finished.
    pub fn end(&mut self) -> Result<(), DataError> {
        self.order(&[], &mut || true)?;
        self.ended = true;
        Ok(())
    }

    /// Bytes handed to the lane so far.
    pub fn sent_bytes(&self) -> u64 {
        self.sent
    }

    fn order(&self, piece: &[u8], go_on: &mut dyn FnMut() -> bool) -> Result<bool, DataError> {
        if self.ended {
            return Err(DataError::Bug("device state was sent after its end"));
        }
        let mut order = StateOrder { stream: self.stream, bytes: piece.into() };
        loop {
            if self.fate.is_stopped() {
                return Err(self.fate.cause());
            }
            order = match self.queue.send_timeout(order, TICK) {
                Ok(()) => return Ok(true),
                Err(SendTimeoutError::Disconnected(_)) => return Err(self.fate.cause()),
                Err(SendTimeoutError::Timeout(order)) => order,
            };
            if !go_on() {
                return Ok(false);
            }
        }
    }
}
