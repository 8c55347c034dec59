//! A link inside one process: for tests, and for a world that breaks links on purpose.
//!
//! Two ends over two bounded queues of bytes. A [`Tap`] is an end without the buffers of a link: whoever holds one
//! reads and writes the raw bytes, and so can be the hostile host between two links.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Breaker, Link, LinkPlan, LinkTrouble};
use crate::error::LinkFault;

/// Bytes that one direction holds before its writer must wait, as a socket's buffer would.
const QUEUE_BYTES: usize = 1 << 20;

#[derive(Default)]
struct Wire {
    /// Towards end 0 and towards end 1.
    queues: [VecDeque<u8>; 2],
    severed: bool,
}

#[derive(Default)]
struct Shared {
    wire: Mutex<Wire>,
    moved: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends as much as there is room for; how much that was.
    fn write(&self, to: usize, bytes: &[u8]) -> Result<usize, LinkFault> {
        let mut wire = self.lock();
        if wire.severed {
            return Err(LinkFault::Closed);
        }
        let queue = &mut wire.queues[to];
        let len = bytes.len().min(QUEUE_BYTES.saturating_sub(queue.len()));
        queue.extend(&bytes[..len]);
        drop(wire);
        self.moved.notify_all();
        Ok(len)
    }

    /// Takes what is there, at most `into.len()` bytes. The end is reported once everything was taken.
    fn read(&self, of: usize, into: &mut [u8]) -> Result<usize, LinkFault> {
        let mut wire = self.lock();
        let queue = &mut wire.queues[of];
        let len = into.len().min(queue.len());
        let (front, back) = queue.as_slices();
        let first = front.len().min(len);
        into[..first].copy_from_slice(&front[..first]);
        into[first..len].copy_from_slice(&back[..len - first]);
        queue.drain(..len);
        let severed = wire.severed;
        drop(wire);
        self.moved.notify_all();
        if len == 0 && severed && !into.is_empty() { Err(LinkFault::Closed) } else { Ok(len) }
    }

    fn sever(&self) {
        self.lock().severed = true;
        self.moved.notify_all();
    }
}

/// One end of a link in memory.
pub struct MemoryLink {
    shared: Arc<Shared>,
    end: usize,
    slots: Vec<Vec<u8>>,
    queue: VecDeque<(usize, usize, usize)>,
    received: Vec<u8>,
    head: usize,
    tail: usize,
}

impl MemoryLink {
    fn at(shared: &Arc<Shared>, end: usize) -> MemoryLink {
        let (slots, queue, received) = (Vec::new(), VecDeque::new(), Vec::new());
        MemoryLink { shared: Arc::clone(shared), end, slots, queue, received, head: 0, tail: 0 }
    }

    /// Two connected ends.
    pub fn pair() -> (MemoryLink, MemoryLink) {
        let shared = Arc::new(Shared::default());
        (MemoryLink::at(&shared, 0), MemoryLink::at(&shared, 1))
    }

    /// One end, and the raw bytes of the other.
    pub fn tapped() -> (MemoryLink, Tap) {
        let shared = Arc::new(Shared::default());
        (MemoryLink::at(&shared, 0), Tap { shared, end: 1 })
    }

    /// Moves bytes both ways without waiting; whether any moved.
    fn pump(&mut self) -> Result<bool, LinkTrouble> {
        let mut any = false;
        while let Some((slot, sent, len)) = self.queue.front_mut() {
            let done = self
                .shared
                .write(1 - self.end, &self.slots[*slot][*sent..*len])
                .map_err(LinkTrouble::Lost)?;
            *sent += done;
            any |= done > 0;
            if *sent < *len {
                break;
            }
            self.queue.pop_front();
        }
        if self.head > 0 {
            self.received.copy_within(self.head..self.tail, 0);
            (self.head, self.tail) = (0, self.tail - self.head);
        }
        match self.shared.read(self.end, &mut self.received[self.tail..]) {
            Ok(len) => {
                self.tail += len;
                Ok(any || len > 0)
            }
            // What was sent before the end still counts as progress.
            Err(_) if any => Ok(true),
            Err(fault) => Err(LinkTrouble::Lost(fault)),
        }
    }
}

impl Link for MemoryLink {
    fn prepare(&mut self, plan: LinkPlan) -> Result<(), LinkTrouble> {
        self.slots = vec![vec![0; plan.slot_bytes]; plan.send_slots];
        self.queue = VecDeque::with_capacity(plan.send_slots);
        self.received = vec![0; plan.receive_bytes];
        Ok(())
    }

    fn breaker(&self) -> Result<Box<dyn Breaker>, LinkTrouble> {
        Ok(Box::new(MemoryBreaker(Arc::clone(&self.shared))))
    }

    fn free_slot(&self) -> Option<usize> {
        (0..self.slots.len()).find(|slot| self.queue.iter().all(|(queued, ..)| queued != slot))
    }

    fn slot_mut(&mut self, slot: usize) -> &mut [u8] {
        if self.queue.iter().any(|(queued, ..)| *queued == slot) {
            return &mut [];
        }
        self.slots.get_mut(slot).map_or(&mut [], Vec::as_mut_slice)
    }

    fn submit(&mut self, slot: usize, len: usize) -> Result<(), LinkTrouble> {
        self.queue.push_back((slot, 0, len));
        self.progress(Duration::ZERO).map(|_| ())
    }

    fn unsent(&self) -> usize {
        self.queue.len()
    }

    fn arrived(&mut self) -> &mut [u8] {
        &mut self.received[self.head..self.tail]
    }

    fn consume(&mut self, len: usize) {
        self.head = self.tail.min(self.head + len);
    }

    fn expect_bytes(&mut self, _more: usize) {}

    fn progress(&mut self, wait: Duration) -> Result<bool, LinkTrouble> {
        let moved = self.pump()?;
        if moved || wait.is_zero() {
            return Ok(moved);
        }
        self.wait(wait);
        self.pump()
    }

    fn name(&self) -> &'static str {
        "memory"
    }
}

impl MemoryLink {
    /// Sleeps until something can move, at most `wait`.
    fn wait(&self, wait: Duration) {
        let (end, sending) = (self.end, !self.queue.is_empty());
        let stuck = |wire: &mut Wire| {
            let room = sending && wire.queues[1 - end].len() < QUEUE_BYTES;
            wire.queues[end].is_empty() && !room && !wire.severed
        };
        let waited = self.shared.moved.wait_timeout_while(self.shared.lock(), wait, stuck);
        drop(waited);
    }
}

impl Drop for MemoryLink {
    fn drop(&mut self) {
        self.shared.sever();
    }
}

struct MemoryBreaker(Arc<Shared>);

impl Breaker for MemoryBreaker {
    fn sever(&self) {
        self.0.sever();
    }
}

/// The raw bytes of one end.
pub struct Tap {
    shared: Arc<Shared>,
    end: usize,
}

impl Tap {
    /// What has arrived, waiting at most `wait` for something; empty when nothing came, an error at the end.
    pub fn read(&mut self, wait: Duration) -> Result<Vec<u8>, LinkFault> {
        let end = self.end;
        let stuck = |wire: &mut Wire| wire.queues[end].is_empty() && !wire.severed;
        drop(self.shared.moved.wait_timeout_while(self.shared.lock(), wait, stuck));
        let mut bytes = vec![0; QUEUE_BYTES];
        let len = self.shared.read(end, &mut bytes)?;
        bytes.truncate(len);
        Ok(bytes)
    }

    /// Sends all of these bytes, waiting for room.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), LinkFault> {
        let to = 1 - self.end;
        while !bytes.is_empty() {
            let done = self.shared.write(to, bytes)?;
            bytes = &bytes[done..];
            let full = |wire: &mut Wire| wire.queues[to].len() >= QUEUE_BYTES && !wire.severed;
            drop(self.shared.moved.wait_while(self.shared.lock(), full));
        }
        Ok(())
    }

    /// Closes the link.
    pub fn sever(&self) {
        self.shared.sever();
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.sever();
    }
}
