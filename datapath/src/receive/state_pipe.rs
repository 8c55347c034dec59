//! A state stream between its lane and its reader: a bounded pipe that knows the end from a failure.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::DataError;
use crate::limits::TICK;

struct Pipe {
    bytes: VecDeque<u8>,
    /// How it ended: complete, or why not.
    end: Option<Result<(), DataError>>,
    /// The reader is gone: what still comes is dropped.
    unread: bool,
}

/// The writing end, held by the stream's lane.
pub(crate) struct StatePipe {
    bytes_max: usize,
    pipe: Mutex<Pipe>,
    moved: Condvar,
}

impl StatePipe {
    pub(crate) fn new(bytes_max: usize) -> Arc<StatePipe> {
        let pipe = Pipe { bytes: VecDeque::with_capacity(bytes_max), end: None, unread: false };
        Arc::new(StatePipe { bytes_max, pipe: Mutex::new(pipe), moved: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Pipe> {
        self.pipe.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the state has ended, well or not.
    pub(crate) fn is_ended(&self) -> bool {
        self.lock().end.is_some()
    }

    /// Appends as much as there is room for, waiting at most a tick for some; how much that was.
    pub(crate) fn push(&self, bytes: &[u8]) -> usize {
        let full = |pipe: &mut Pipe| pipe.bytes.len() >= self.bytes_max && !pipe.unread && pipe.end.is_none();
        let waited = self.moved.wait_timeout_while(self.lock(), TICK, full);
        let mut pipe = waited.unwrap_or_else(PoisonError::into_inner).0;
        if pipe.unread || pipe.end.is_some() {
            return bytes.len();
        }
        let len = bytes.len().min(self.bytes_max.saturating_sub(pipe.bytes.len()));
        pipe.bytes.extend(&bytes[..len]);
        drop(pipe);
        self.moved.notify_all();
        len
    }

    /// The state is complete, or never will be. The first end counts.
    pub(crate) fn end(&self, end: Result<(), DataError>) {
        self.lock().end.get_or_insert(end);
        self.moved.notify_all();
    }
}

/// A state as it arrives on its lane: ends where the sender ended it, fails when the transfer does.
pub struct StateStream(pub(crate) Arc<StatePipe>);

impl Read for StateStream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let dry = |pipe: &mut Pipe| pipe.bytes.is_empty() && pipe.end.is_none();
        let waited = self.0.moved.wait_while(self.0.lock(), dry);
        let mut pipe = waited.unwrap_or_else(PoisonError::into_inner);
        let outcome = match &pipe.end {
            // A failed transfer has no usable state, not even the part that came.
            Some(Err(failure)) => Err(io::Error::other(failure.clone())),
            Some(Ok(())) | None => pipe.bytes.read(into),
        };
        drop(pipe);
        self.0.moved.notify_all();
        outcome
    }
}

impl Drop for StateStream {
    fn drop(&mut self) {
        self.0.lock().unread = true;
        self.0.moved.notify_all();
    }
}
