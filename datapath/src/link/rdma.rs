//! A link over RDMA: the peer's card writes into our ring, and nobody's processor copies bytes into a socket.
//!
//! ```text
//!   slot ─ WRITE_WITH_IMM(length) ─► ring of the peer ─ copy ─► private inbox ─► arrived()
//!        ◄─ WRITE_WITH_IMM(taken) ─  gives ring space back
//! ```
//!
//! *Sealed*: records go through the ring, as they go through a socket. The peer, and whoever can forge packets on the
//! fabric, may write to the ring at any time: so bytes are copied out of it once, and opened in memory that no card can
//! reach. *Direct* (the module `placement`): page bodies go one-sided into the guest's memory, and only what tells of them goes
//! through the ring, on the same queue pair and therefore after them.
//!
//! Requests of one queue pair are carried out in order, so a later copy of a page never lands before an earlier one.
//! What must never happen: a byte that is opened where the fabric can still change it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::completion::CompletionStatus;
use super::{Breaker, Link, LinkPlan, LinkTrouble};
use crate::error::LinkFault;
use crate::frame::FrameFault;
use crate::guest_ram::GuestRam;
use crate::limits::{RDMA_PIECE_BYTES_MIN, RDMA_RING_PART, RDMA_SENDS};
use crate::page::ChunkIndex;

mod cm;
mod counts;
mod dial;
mod error;
mod inbox;
mod lease;
pub mod memlock;
mod placement;
mod verbs;
mod wire;

pub use cm::{HELLO_BYTES_MAX, RdmaConnection, RdmaKnock, RdmaListener};
pub use counts::{RdmaCount, RdmaCounts};
pub use dial::Service;
pub use error::RdmaError;
pub use placement::{OpenRam, Pin};

use cm::{Connection, Notice};
use counts::Counts;
use inbox::Inbox;
use lease::Share;
use placement::{Place, Placer, cannot_open};
use verbs::{Done, Reach, Region};
use wire::{Immediate, Note, Window, low_bits, total_of};

/// Requests that are kept free for credit and notes.
const SENDS_RESERVED: usize = 8;

/// A slot on its way: how much of it was posted.
#[derive(Clone, Copy, Debug)]
struct Outgoing {
    slot: usize,
    posted: usize,
    len: usize,
}

/// A posted request, in the order in which they complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Posted {
    /// A piece of a slot.
    Slot(usize),
    /// A run of pages, on its way into a region of the target's guest.
    Placed { slot: usize, region: u32 },
    /// Credit: at most one is on its way.
    Credit,
    /// A note.
    Note,
}

/// What goes past the records.
enum Mode {
    /// Nothing.
    Sealed,
    /// This end writes pages into the peer's guest.
    Placing(Box<Placer>),
    /// The peer writes pages into this end's guest: into the regions that it holds.
    Open(Arc<OpenRam>, Share),
}

/// A link over a connected queue pair.
pub struct RdmaLink {
    mode: Mode,
    /// The slot that was handed out and not submitted: the lane is filling it.
    lent: Option<usize>,
    connection: Arc<Connection>,
    established: bool,
    buffers: Option<Buffers>,
    queue: VecDeque<Outgoing>,
    posted: VecDeque<Posted>,
    /// Notes that wait for a free request.
    notes: VecDeque<Note>,
    /// The peer's ring, once it said where it is.
    ring: Option<Window>,
    /// Bytes written to it, and bytes that the peer took out.
    written: u64,
    taken_by_peer: u64,
    fault: Option<LinkFault>,
    /// The queue pair carries nothing any more; why is known when every request has come back.
    over: bool,
    counts: Arc<Counts>,
}

/// What [`Link::prepare`] allocates and registers.
struct Buffers {
    slots: Region,
    slot_count: usize,
    slot_bytes: usize,
    inbox: Inbox,
}

impl RdmaLink {
    /// A link in sealed mode.
    #[must_use]
    pub fn new(connection: RdmaConnection) -> RdmaLink {
        RdmaLink::of_mode(connection, Mode::Sealed)
    }

    /// The source's end of a link in direct mode. Both sides must have agreed on it.
    #[must_use]
    pub fn placing(connection: RdmaConnection, ram: Arc<GuestRam>) -> RdmaLink {
        RdmaLink::of_mode(connection, Mode::Placing(Box::new(Placer::new(ram))))
    }

    /// The target's end of a link in direct mode; all lanes share `ram`. Both sides must have agreed on it.
    #[must_use]
    pub fn open(connection: RdmaConnection, ram: Arc<OpenRam>) -> RdmaLink {
        RdmaLink::of_mode(connection, Mode::Open(ram, Share::of(0)))
    }

    fn of_mode(connection: RdmaConnection, mode: Mode) -> RdmaLink {
        let RdmaConnection { inner, established } = connection;
        RdmaLink {
            mode,
            lent: None,
            connection: inner,
            established,
            buffers: None,
            queue: VecDeque::new(),
            posted: VecDeque::with_capacity(RDMA_SENDS),
            notes: VecDeque::new(),
            ring: None,
            written: 0,
            taken_by_peer: 0,
            fault: None,
            over: false,
            counts: Arc::default(),
        }
    }

    /// What reads this link's counts, also after a lane took it over.
    #[must_use]
    pub fn counts(&self) -> RdmaCounts {
        RdmaCounts::of(&self.counts)
    }

    fn is_free(&self, slot: usize) -> bool {
        self.buffers.as_ref().is_some_and(|buffers| slot < buffers.slot_count)
            && self.queue.iter().all(|out| out.slot != slot)
            && !self.posted.iter().any(|posted| match *posted {
                Posted::Slot(used) | Posted::Placed { slot: used, .. } => used == slot,
                Posted::Credit | Posted::Note => false,
            })
    }

    /// Keeps the first fault; bytes that arrived before it are still handed out.
    fn broke(&mut self, fault: LinkFault) {
        self.fault.get_or_insert(fault);
    }

    /// Moves both directions on without waiting; whether anything moved.
    fn pump(&mut self) -> Result<bool, LinkTrouble> {
        // Looked at before the completions: whatever the peer wrote before it left is then among them.
        let notice = self.connection.notice();
        let mut any = self.reap()?;
        match notice {
            Some(Notice::Established) => {
                self.established = true;
                self.connection.queue_pair.shorten_not_ready();
            }
            Some(Notice::Disconnected) => self.broke(LinkFault::Closed),
            Some(Notice::DeviceGone) => self.broke(LinkFault::DeviceGone),
            None => {}
        }
        if self.over && self.posted.is_empty() {
            self.broke(LinkFault::Closed);
        }
        any |= self.buffers.as_mut().is_some_and(|buffers| buffers.inbox.fill());
        if self.established && self.fault.is_none() && !self.over {
            self.post_all().map_err(cannot_post)?;
        }
        Ok(any)
    }

    /// Takes in what the card finished; whether a piece of a slot was among it. Notes and credit are the link's own.
    fn reap(&mut self) -> Result<bool, LinkTrouble> {
        let mut any = false;
        while let Some(done) = self.connection.queue_pair.poll().map_err(cannot_post)? {
            match done {
                Done::Sent => any |= self.sent(),
                Done::Immediate(wire) => self.immediate(Immediate::from_wire(wire))?,
                Done::Note(slot) => any |= self.note(slot)?,
                Done::Failed(status) => self.failed(status),
                Done::Over => self.over = true,
            }
        }
        Ok(any)
    }

    /// The oldest request has completed; whether it freed a piece of a slot.
    fn sent(&mut self) -> bool {
        match (self.posted.pop_front(), &mut self.mode) {
            (Some(Posted::Placed { region, .. }), Mode::Placing(placer)) => {
                placer.leases.completed(region);
                true
            }
            (Some(Posted::Slot(_) | Posted::Placed { .. }), _) => true,
            (Some(Posted::Credit | Posted::Note) | None, _) => false,
        }
    }

    /// A request that did not come to its end. One that was flushed tells only that the queue pair is over; the one that
    /// ended it comes before, or after the flushed receives.
    fn failed(&mut self, status: CompletionStatus) {
        self.posted.pop_front();
        self.over = true;
        if status != CompletionStatus::FLUSHED {
            self.broke(LinkFault::Completed(status));
        }
    }

    fn immediate(&mut self, immediate: Immediate) -> Result<(), LinkTrouble> {
        let fits = match immediate {
            Immediate::Bytes(len) => {
                let inbox = self.buffers.as_mut().map(|buffers| &mut buffers.inbox);
                inbox.ok_or(FrameFault::RingOverrun).and_then(|inbox| inbox.wrote(len as usize))
            }
            Immediate::Taken(low) => {
                total_of(low, self.taken_by_peer, self.written).map(|total| self.taken_by_peer = total)
            }
        };
        fits.map_err(LinkTrouble::Broken)
    }

    /// Takes in a note; whether it lets the lane go on.
    fn note(&mut self, slot: usize) -> Result<bool, LinkTrouble> {
        let note = Note::parse(&self.connection.queue_pair.note(slot)).map_err(LinkTrouble::Broken)?;
        self.connection.queue_pair.post_receive(slot).map_err(cannot_post)?;
        let understood = if let Note::Ring(window, regions) = note
            && self.ring.is_none()
        {
            self.ring = Some(window);
            self.allow(regions)
        } else {
            self.note_of_regions(note)?
        };
        understood.ok_or(LinkTrouble::Broken(FrameFault::BadCard))
    }

    /// Posts what may be posted: notes, credit, and as much of the slots as the peer's ring has room for.
    fn post_all(&mut self) -> Result<(), Errno> {
        while self.posted.len() < RDMA_SENDS
            && let Some(note) = self.notes.pop_front()
        {
            self.connection.queue_pair.post_note(&note.card())?;
            self.book(Posted::Note);
        }
        self.post_credit()?;
        while self.posted.len() + SENDS_RESERVED < RDMA_SENDS && self.post_piece()? {}
        Ok(())
    }

    fn book(&mut self, posted: Posted) {
        self.posted.push_back(posted);
        self.counts.requests.add(1);
    }

    /// Tells the peer what was taken out of our ring, if it is due and no other credit is on its way.
    fn post_credit(&mut self) -> Result<(), Errno> {
        let (Some(buffers), Some(ring)) = (self.buffers.as_mut(), self.ring) else { return Ok(()) };
        if self.posted.len() >= RDMA_SENDS || self.posted.contains(&Posted::Credit) {
            return Ok(());
        }
        let Some(taken) = buffers.inbox.credit_due() else { return Ok(()) };
        let immediate = Immediate::Taken(low_bits(taken)).to_wire();
        self.connection.queue_pair.post_write(None, ring.address, ring.key, Some(immediate))?;
        self.book(Posted::Credit);
        Ok(())
    }

    /// Posts one piece of the oldest slot; whether there was one, and room for it.
    fn post_piece(&mut self) -> Result<bool, Errno> {
        let (Some(ring), Some(out), Some(buffers)) = (self.ring, self.queue.front_mut(), &self.buffers)
        else {
            return Ok(false);
        };
        let on_its_way = self.written - self.taken_by_peer;
        let at = self.written % ring.len;
        let (room, straight) = (ring.len.saturating_sub(on_its_way), ring.len - at);
        let left = out.len - out.posted;
        let len = usize::try_from(room.min(straight)).unwrap_or(usize::MAX).min(left);
        let least = RDMA_PIECE_BYTES_MIN.min(usize::try_from(ring.len / 2).unwrap_or(1)).min(left);
        // A short piece before the ring's end is no waste; one into the last free bytes is.
        if len == 0 || (len < least && len as u64 != straight) {
            return Ok(false);
        }
        let piece = buffers.slots.key().piece(out.slot * buffers.slot_bytes + out.posted, len);
        let immediate = Immediate::Bytes(u32::try_from(len).unwrap_or(0)).to_wire();
        self.connection.queue_pair.post_write(Some(piece), ring.address + at, ring.key, Some(immediate))?;
        out.posted += len;
        let slot = out.slot;
        if out.posted >= out.len {
            self.queue.pop_front();
        }
        self.written += len as u64;
        self.counts.writes.add(1);
        self.book(Posted::Slot(slot));
        Ok(true)
    }

    fn check(&self) -> Result<(), LinkTrouble> {
        self.fault.map_or(Ok(()), |fault| Err(LinkTrouble::Lost(fault)))
    }
}

/// A card that takes no request at all has been taken from us.
fn cannot_post(errno: Errno) -> LinkTrouble {
    LinkTrouble::Lost(LinkFault::Failed(errno))
}

fn not_registered(error: &RdmaError) -> LinkTrouble {
    if let RdmaError::HostRefused { service, fix, errno } = *error {
        return LinkTrouble::Refused { service, fix, errno };
    }
    LinkTrouble::Lost(LinkFault::Closed)
}

impl Link for RdmaLink {
    fn prepare(&mut self, plan: LinkPlan) -> Result<(), LinkTrouble> {
        let queue_pair = &self.connection.queue_pair;
        let slot_bytes = plan.slot_bytes.next_multiple_of(4096);
        let slots = Region::new(queue_pair, plan.send_slots * slot_bytes, Reach::Local)
            .map_err(|error| not_registered(&error))?;
        let ring_bytes = (plan.receive_bytes / RDMA_RING_PART).next_multiple_of(4096);
        let ring =
            Region::new(queue_pair, ring_bytes, Reach::PeerWrites).map_err(|error| not_registered(&error))?;
        let regions = match &mut self.mode {
            Mode::Open(ram, share) => {
                *share = ram.admit(&self.connection).map_err(cannot_open)?;
                share.allowed()
            }
            Mode::Sealed | Mode::Placing(_) => 0,
        };
        self.notes.push_back(Note::Ring(ring.key().window(), regions));
        let inbox = Inbox::new(ring, plan.receive_bytes);
        self.queue = VecDeque::with_capacity(plan.send_slots);
        self.buffers =
            Some(Buffers { slots, slot_count: plan.send_slots, slot_bytes: plan.slot_bytes, inbox });
        self.pump().map(|_| ())
    }

    fn breaker(&self) -> Result<Box<dyn Breaker>, LinkTrouble> {
        Ok(Box::new(ConnectionBreaker(Arc::clone(&self.connection))))
    }

    fn free_slot(&self) -> Option<usize> {
        let count = self.buffers.as_ref().map_or(0, |buffers| buffers.slot_count);
        (0..count).find(|&slot| self.is_free(slot))
    }

    fn slot_mut(&mut self, slot: usize) -> &mut [u8] {
        if !self.is_free(slot) {
            return &mut [];
        }
        self.lent = Some(slot);
        let Some(buffers) = self.buffers.as_mut() else { return &mut [] };
        buffers.slots.bytes_mut(slot * buffers.slot_bytes, buffers.slot_bytes)
    }

    fn submit(&mut self, slot: usize, len: usize) -> Result<(), LinkTrouble> {
        self.check()?;
        self.lent = None;
        self.queue.push_back(Outgoing { slot, posted: 0, len });
        self.pump()?;
        self.check()
    }

    fn unsent(&self) -> usize {
        let count = self.buffers.as_ref().map_or(0, |buffers| buffers.slot_count);
        (0..count).filter(|&slot| !self.is_free(slot)).count()
    }

    fn arrived(&mut self) -> &mut [u8] {
        self.buffers.as_mut().map_or(&mut [], |buffers| buffers.inbox.arrived())
    }

    fn consume(&mut self, len: usize) {
        if let Some(buffers) = self.buffers.as_mut() {
            buffers.inbox.consume(len);
        }
    }

    fn expect_bytes(&mut self, _more: usize) {}

    fn progress(&mut self, wait: Duration) -> Result<bool, LinkTrouble> {
        if self.pump()? {
            return Ok(true);
        }
        self.check()?;
        if wait.is_zero() {
            return Ok(false);
        }
        // What completes between the last look and the arming makes no notice: so look again.
        self.connection.queue_pair.arm().map_err(cannot_post)?;
        if self.pump()? {
            return Ok(true);
        }
        self.check()?;
        self.counts.sleeps.add(1);
        self.connection.wait(wait);
        // A fault that this brought is reported by the next call, after the bytes that came with it.
        self.pump()
    }

    fn places(&self) -> bool {
        !matches!(self.mode, Mode::Sealed)
    }

    fn place(&mut self, chunk: ChunkIndex, pages: u64) -> Result<bool, LinkTrouble> {
        self.pump()?;
        self.check()?;
        let Mode::Placing(placer) = &mut self.mode else { return Err(cannot_open(Errno::OPNOTSUPP)) };
        match placer.place_of(chunk) {
            Place::There(region, to) => self.post_pages(chunk, pages, region, to).map_err(cannot_post),
            Place::Soon => Ok(false),
            Place::Nowhere => Err(cannot_open(Errno::INVAL)),
            Place::Ask { region, instead_of } => {
                self.notes.extend(instead_of.map(Note::GiveBack));
                self.notes.push_back(Note::Want(region));
                self.pump().map(|_| false)
            }
        }
    }

    fn name(&self) -> &'static str {
        if self.places() { "rdma (direct)" } else { "rdma (sealed)" }
    }
}

impl Drop for RdmaLink {
    fn drop(&mut self) {
        // What was submitted and still fits the peer's ring gets there; the peer may be waiting for it.
        for _ in 0..LAST_LOOKS {
            if self.posted.is_empty() && self.queue.is_empty() || self.fault.is_some() {
                break;
            }
            if self.progress(LAST_LOOK).is_err() {
                break;
            }
        }
        self.connection.disconnect();
    }
}

const LAST_LOOKS: u32 = 10;
const LAST_LOOK: Duration = Duration::from_millis(20);

struct ConnectionBreaker(Arc<Connection>);

impl Breaker for ConnectionBreaker {
    fn sever(&self) {
        // Every posted request comes back, which wakes the lane; the peer is told.
        self.0.disconnect();
    }
}
