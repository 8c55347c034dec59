//! A link over TCP, on io_uring.
//!
//! Sends are queued here and given to the kernel one at a time, because two sends in flight on one socket may
//! overtake each other when the first comes up short. One receive is always posted into the free part of the
//! receive ring. A lane that waits for the rest of a long record is woken once for it, not once for each segment.

use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use super::ring::{Done, Ring, errno_of};
use super::zero_copy::{SendHow, Trial};
use super::{Breaker, Link, LinkPlan, LinkTrouble};
use crate::error::LinkFault;

/// The most bytes to sleep for: less than any receive buffer, so that the peer can always send them.
const LOW_WATER_MAX: usize = 128 << 10;

/// A slot on its way: how much of it was sent, and how.
#[derive(Clone, Copy, Debug)]
struct Outgoing {
    slot: usize,
    sent: usize,
    len: usize,
    how: SendHow,
}

/// A link over a connected TCP stream.
pub struct TcpLink {
    stream: TcpStream,
    ring: Option<Ring>,
    slots: usize,
    queue: VecDeque<Outgoing>,
    /// The head of the queue is with the kernel.
    sending: bool,
    trial: Trial,
    fault: Option<LinkFault>,
}

impl TcpLink {
    /// Takes over a connected stream.
    pub fn new(stream: TcpStream) -> TcpLink {
        let queue = VecDeque::new();
        TcpLink { stream, ring: None, slots: 0, queue, sending: false, trial: Trial::new(false), fault: None }
    }

    /// Whether a slot is neither queued nor read by the kernel.
    fn is_free(&self, slot: usize) -> bool {
        let idle = self.ring.as_ref().is_some_and(|ring| !ring.is_busy(slot));
        idle && self.queue.iter().all(|out| out.slot != slot)
    }

    /// Gives the next slot to the kernel, if none is there.
    fn send_next(&mut self) -> Result<(), LinkTrouble> {
        let (Some(ring), Some(next), false) = (self.ring.as_mut(), self.queue.front_mut(), self.sending)
        else {
            return Ok(());
        };
        if next.sent == 0 {
            next.how = self.trial.next(next.len);
        }
        self.sending = true;
        ring.push_send(next.slot, next.sent, next.len - next.sent, next.how)
    }

    /// Enters the kernel; while the trial runs, what a send costs is booked on it.
    fn enter(&mut self, wait: Duration) -> Result<(), LinkTrouble> {
        let Some(ring) = self.ring.as_mut() else { return Err(not_prepared()) };
        let tried = self.queue.front().filter(|_| self.sending && self.trial.decided().is_none()).copied();
        let Some(tried) = tried else { return ring.enter(wait) };
        let before = cpu_time();
        ring.enter(wait)?;
        self.trial.sent(tried.how, tried.len, cpu_time().saturating_sub(before));
        Ok(())
    }

    fn reap_all(&mut self) -> Result<bool, LinkTrouble> {
        let mut any = false;
        while let Some(done) = self.ring.as_mut().and_then(Ring::reap) {
            any = true;
            match done {
                Done::Send { outcome, held } => self.sent(outcome, held),
                Done::Receive { outcome: Ok(0) } => self.broke(LinkFault::Closed),
                Done::Receive { outcome: Ok(_) } => {}
                Done::Receive { outcome: Err(Errno::INTR | Errno::AGAIN) } => {}
                Done::Receive { outcome: Err(errno) } => self.broke(fault_of(errno)),
                Done::Released { copied: true, .. } => self.trial.lost(),
                Done::Released { .. } => {}
            }
        }
        self.send_next()?;
        Ok(any)
    }

    fn sent(&mut self, outcome: Result<usize, Errno>, _held: bool) {
        self.sending = false;
        let Some(head) = self.queue.front_mut() else { return };
        match outcome {
            Ok(bytes) => head.sent += bytes,
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOMEM) if head.how == SendHow::ZeroCopy => {
                head.how = SendHow::Copy;
                self.trial.lost();
            }
            Err(errno) => return self.broke(fault_of(errno)),
        }
        if self.queue.front().is_some_and(|head| head.sent >= head.len) {
            self.queue.pop_front();
        }
    }

    /// Keeps the first fault; bytes that arrived before it are still handed out.
    fn broke(&mut self, fault: LinkFault) {
        self.fault.get_or_insert(fault);
    }

    fn check(&self) -> Result<(), LinkTrouble> {
        self.fault.map_or(Ok(()), |fault| Err(LinkTrouble::Lost(fault)))
    }
}

/// A reset is how a peer that is gone looks from here.
fn fault_of(errno: Errno) -> LinkFault {
    match errno {
        Errno::CONNRESET | Errno::PIPE => LinkFault::Closed,
        _ => LinkFault::Failed(errno),
    }
}

fn not_prepared() -> LinkTrouble {
    LinkTrouble::Refused {
        service: "use a link",
        fix: "report this as a bug: it was not prepared",
        errno: Errno::INVAL,
    }
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

impl Link for TcpLink {
    fn prepare(&mut self, plan: LinkPlan) -> Result<(), LinkTrouble> {
        let refused = |error: std::io::Error| LinkTrouble::Refused {
            service: "set up a connection",
            fix: "check that it is a connected TCP socket",
            errno: errno_of(&error),
        };
        self.stream.set_nodelay(true).map_err(refused)?;
        // On a non-blocking socket io_uring would report EAGAIN instead of waiting by itself.
        self.stream.set_nonblocking(false).map_err(refused)?;
        let ring = Ring::new(self.stream.as_fd(), plan)?;
        self.trial = Trial::new(ring.registered());
        self.queue = VecDeque::with_capacity(plan.send_slots);
        self.slots = plan.send_slots;
        self.ring = Some(ring);
        Ok(())
    }

    fn breaker(&self) -> Result<Box<dyn Breaker>, LinkTrouble> {
        let stream = self.stream.try_clone().map_err(|error| LinkTrouble::Refused {
            service: "duplicate a socket",
            fix: "raise the limit of open files (ulimit -n)",
            errno: errno_of(&error),
        })?;
        Ok(Box::new(SocketBreaker(stream)))
    }

    fn free_slot(&self) -> Option<usize> {
        (0..self.slots).find(|&slot| self.is_free(slot))
    }

    fn slot_mut(&mut self, slot: usize) -> &mut [u8] {
        if !self.is_free(slot) {
            return &mut [];
        }
        self.ring.as_mut().map_or(&mut [], |ring| ring.slot_mut(slot))
    }

    fn submit(&mut self, slot: usize, len: usize) -> Result<(), LinkTrouble> {
        self.check()?;
        self.queue.push_back(Outgoing { slot, sent: 0, len, how: SendHow::Copy });
        self.send_next()?;
        self.enter(Duration::ZERO)?;
        self.reap_all()?;
        self.check()
    }

    fn unsent(&self) -> usize {
        (0..self.slots).filter(|&slot| !self.is_free(slot)).count()
    }

    fn arrived(&mut self) -> &mut [u8] {
        self.ring.as_mut().map_or(&mut [], Ring::arrived)
    }

    fn consume(&mut self, len: usize) {
        if let Some(ring) = self.ring.as_mut() {
            ring.consume(len);
        }
    }

    fn expect_bytes(&mut self, more: usize) {
        if let Some(ring) = self.ring.as_mut() {
            ring.set_low_water(more.min(LOW_WATER_MAX));
        }
    }

    fn progress(&mut self, wait: Duration) -> Result<bool, LinkTrouble> {
        self.check()?;
        self.ring.as_mut().ok_or_else(not_prepared)?.push_receive()?;
        self.send_next()?;
        self.enter(wait)?;
        let any = self.reap_all()?;
        // Bytes that came together with the fault are handed out first; the next call reports it.
        if any { Ok(true) } else { self.check().map(|()| false) }
    }

    fn name(&self) -> &'static str {
        match (&self.ring, self.trial.decided()) {
            (None, _) => "tcp",
            (Some(_), Some(SendHow::ZeroCopy)) => "tcp (io_uring, zero-copy)",
            (Some(_), _) => "tcp (io_uring)",
        }
    }
}

impl Drop for TcpLink {
    fn drop(&mut self) {
        // Ends the operations that the ring waits for; the peer still gets what was sent.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

struct SocketBreaker(TcpStream);

impl Breaker for SocketBreaker {
    fn sever(&self) {
        // It fails only when the peer closed first, which is as good.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
