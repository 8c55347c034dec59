//! What the card works with: a completion queue, a queue pair, and memory that it may reach.
//!
//! ```text
//!   Region, Key ── Piece ──► QueuePair::post_* ──► card ──► Completions::poll ──► Completion
//! ```
//!
//! Everything that the card is told by address it checks against a key, so a wrong address is a failed work request
//! and never a stray write; a key ends before its memory does. What must never happen: a Rust reference to memory that
//! the peer may write. Memory that is open to the peer is only ever copied out of.
#![expect(unsafe_code, reason = "libibverbs is a C library that works on pointers and addresses")]

use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};

use rdma_sys as sys;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::cm::CmId;
use super::error::{FIX_CARD, FIX_LOCKED, RdmaError, refused};
use super::wire::{CARD_BYTES, Card, Window};
use crate::guest_ram::GuestRange;
use crate::limits::{RDMA_RECEIVES, RDMA_SENDS};
use crate::link::completion::CompletionStatus;
use crate::link::ring::{Mapped, map_slots};

/// Marks the work requests that receive; the rest of the number is the slot of its note.
const RECEIVE: u64 = 1 << 63;

/// What a finished work request was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    /// The oldest one that was posted for sending.
    Sent,
    /// A write with an immediate came.
    Immediate(u32),
    /// A note came, into this slot.
    Note(usize),
    /// The oldest one that was posted for sending did not come to its end.
    Failed(CompletionStatus),
    /// A receive did not: the queue pair is over.
    Over,
}

/// The last error of the C library, where it returned a null pointer.
fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// The answer of a call that returns an error number.
fn answer(code: i32) -> Result<(), Errno> {
    if code == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::from_raw_os_error(code.saturating_abs())).unwrap_or(Errno::IO))
}

/// A completion queue and the descriptor that tells of it.
struct Completions {
    channel: NonNull<sys::ibv_comp_channel>,
    queue: NonNull<sys::ibv_cq>,
}

impl Completions {
    fn new(verbs: *mut sys::ibv_context) -> Result<Completions, Errno> {
        // SAFETY: `verbs` is the open device of a bound id, which outlives the queue pair that owns us.
        let channel = unsafe { sys::ibv_create_comp_channel(verbs) };
        let channel = NonNull::new(channel).ok_or_else(last_errno)?;
        let depth = i32::try_from(RDMA_SENDS + RDMA_RECEIVES).unwrap_or(i32::MAX);
        // SAFETY: as above, with a channel that was just made.
        let queue = unsafe { sys::ibv_create_cq(verbs, depth, null_mut(), channel.as_ptr(), 0) };
        let Some(queue) = NonNull::new(queue) else {
            let errno = last_errno();
            // SAFETY: made above, used by nobody.
            unsafe { sys::ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(errno);
        };
        let made = Completions { channel, queue };
        let flags = fcntl_getfl(made.fd())?;
        fcntl_setfl(made.fd(), flags | OFlags::NONBLOCK)?;
        Ok(made)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel lives as long as we do.
        let fd = unsafe { (*self.channel.as_ptr()).fd };
        // SAFETY: an open descriptor of the channel, borrowed with us.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    fn arm(&self) -> Result<(), Errno> {
        // SAFETY: the queue lives as long as we do.
        answer(unsafe { sys::ibv_req_notify_cq(self.queue.as_ptr(), 0) })
    }

    /// Takes the notices off the descriptor. Each is acknowledged at once, or the queue could not be destroyed.
    fn take_notices(&self) {
        let (mut queue, mut context) = (null_mut(), null_mut());
        // SAFETY: the channel lives, both places are ours. The descriptor does not block.
        while unsafe { sys::ibv_get_cq_event(self.channel.as_ptr(), &raw mut queue, &raw mut context) } == 0 {
            // SAFETY: the queue that the call above named is the one of this channel: ours.
            unsafe { sys::ibv_ack_cq_events(queue, 1) };
        }
    }

    fn poll(&self) -> Result<Option<sys::ibv_wc>, Errno> {
        let mut completion = MaybeUninit::<sys::ibv_wc>::zeroed();
        // SAFETY: the queue lives, and there is room for the one completion that is asked for.
        let count = unsafe { sys::ibv_poll_cq(self.queue.as_ptr(), 1, completion.as_mut_ptr()) };
        match count {
            // SAFETY: plain numbers, all of them written, by us or by the library.
            1 => Ok(Some(unsafe { completion.assume_init() })),
            0 => Ok(None),
            _ => Err(Errno::IO),
        }
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        // SAFETY: the queue pair that used it is gone, and every notice was acknowledged.
        unsafe { sys::ibv_destroy_cq(self.queue.as_ptr()) };
        // SAFETY: the only queue of the channel is gone.
        unsafe { sys::ibv_destroy_comp_channel(self.channel.as_ptr()) };
    }
}

/// A key for memory that the card may reach: given back on drop, before the memory is.
pub(super) struct Key(NonNull<sys::ibv_mr>);

// SAFETY: a handle of the library, without thread affinity; it is only read until its drop.
unsafe impl Send for Key {}
// SAFETY: as above.
unsafe impl Sync for Key {}

/// What the card may do with registered memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// This host's work requests read from it and write to it.
    Local,
    /// The peer writes to it.
    PeerWrites,
    /// The peer writes to it, and the card faults pages in as it needs them.
    PeerWritesOnDemand,
}

impl Reach {
    fn flags(self) -> i32 {
        use sys::ibv_access_flags as access;
        let local = access::IBV_ACCESS_LOCAL_WRITE.0;
        let peer = local | access::IBV_ACCESS_REMOTE_WRITE.0;
        let flags = match self {
            Reach::Local => local,
            Reach::PeerWrites => peer,
            Reach::PeerWritesOnDemand => peer | access::IBV_ACCESS_ON_DEMAND.0,
        };
        i32::try_from(flags).unwrap_or(0)
    }
}

impl Key {
    /// Registers `len` bytes from `start`. The card checks every access against them.
    fn register(queue_pair: &QueuePair, start: *mut u8, len: usize, reach: Reach) -> Result<Key, Errno> {
        let pd = queue_pair.protection_domain();
        // SAFETY: the library only hands the range to the kernel, which refuses what is not mapped.
        let key = unsafe { sys::ibv_reg_mr(pd, start.cast(), len, reach.flags()) };
        NonNull::new(key).map(Key).ok_or_else(last_errno)
    }

    /// Registers guest memory. The card reads and writes it beside the guest, as any device does.
    pub(super) fn of_guest(
        queue_pair: &QueuePair,
        range: &GuestRange<'_>,
        reach: Reach,
    ) -> Result<Key, Errno> {
        Key::register(queue_pair, range.as_ptr().cast_mut(), range.len(), reach)
    }

    fn raw(&self) -> sys::ibv_mr {
        // SAFETY: the handle is valid until drop, and its fields do not change.
        unsafe { *self.0.as_ptr() }
    }

    /// What the peer must know to write here.
    pub(super) fn window(&self) -> Window {
        let raw = self.raw();
        Window { address: raw.addr as u64, key: raw.rkey, len: raw.length as u64 }
    }

    /// A part of it, for a work request of this host.
    pub(super) fn piece(&self, at: usize, len: usize) -> Piece {
        let raw = self.raw();
        Piece {
            address: (raw.addr as u64).wrapping_add(at as u64),
            len: u32::try_from(len).unwrap_or(u32::MAX),
            key: raw.lkey,
        }
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        // SAFETY: registered by us, given back once. The card lets go of the memory before the call returns.
        unsafe { sys::ibv_dereg_mr(self.0.as_ptr()) };
    }
}

/// A part of registered memory, as a work request names it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    address: u64,
    len: u32,
    key: u32,
}

/// Memory of ours that the card may reach. The key goes first, then the memory.
pub(super) struct Region {
    key: Key,
    mapped: Mapped,
}

// SAFETY: private memory without thread affinity; it is changed through `&mut` only, and by the card.
unsafe impl Send for Region {}
// SAFETY: through `&self` it is only copied out of.
unsafe impl Sync for Region {}

impl Region {
    /// Fresh memory of `len` bytes, a multiple of the page size.
    pub(super) fn new(queue_pair: &QueuePair, len: usize, reach: Reach) -> Result<Region, RdmaError> {
        let mapped =
            map_slots(len).map_err(refused("allocate buffers", "free some memory, or use fewer lanes"))?;
        let key = Key::register(queue_pair, mapped.base().as_ptr(), len, reach)
            .map_err(refused("register buffers with the RDMA card", FIX_LOCKED))?;
        Ok(Region { key, mapped })
    }

    pub(super) fn len(&self) -> usize {
        self.mapped.len()
    }

    pub(super) fn key(&self) -> &Key {
        &self.key
    }

    /// Copies bytes out; `false`, with nothing copied, when they are not all inside.
    pub(super) fn copy_out(&self, at: usize, into: &mut [u8]) -> bool {
        if at.checked_add(into.len()).is_none_or(|end| end > self.len()) {
            return false;
        }
        // SAFETY: `at` lies inside the mapping, checked above.
        let from = unsafe { self.mapped.base().as_ptr().add(at) };
        // SAFETY: both sides are valid for so many bytes, and a slice of ours never overlaps the mapping. The card may
        // write at the same time: the bytes are then the peer's problem, since each is read once, into private memory.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        true
    }

    /// Bytes to fill, of memory that no peer may write; empty when they are not all inside. The caller leaves them
    /// alone while a work request reads them.
    pub(super) fn bytes_mut(&mut self, at: usize, len: usize) -> &mut [u8] {
        if at.checked_add(len).is_none_or(|end| end > self.len()) {
            return &mut [];
        }
        // SAFETY: `at` lies inside the mapping, checked above.
        let start = unsafe { self.mapped.base().as_ptr().add(at) };
        // SAFETY: inside the mapping, and borrowed with `self`.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }
}

/// A queue pair with its completions and the slots for the peer's notes.
pub(super) struct QueuePair {
    id: *mut sys::rdma_cm_id,
    queue: NonNull<sys::ibv_qp>,
    completions: Completions,
    notes: Option<Region>,
}

// SAFETY: the library locks its queues; nothing here has a thread of its own.
unsafe impl Send for QueuePair {}
// SAFETY: as above: posting, polling and disconnecting may happen on different threads.
unsafe impl Sync for QueuePair {}

impl QueuePair {
    /// Makes the queue pair of an id that knows its device, and posts every receive: a peer may speak at once.
    pub(super) fn new(id: &CmId) -> Result<QueuePair, RdmaError> {
        let cannot = refused("make an RDMA queue pair", FIX_CARD);
        let completions = Completions::new(id.verbs()).map_err(&cannot)?;
        let queue = completions.queue.as_ptr();
        let cap = sys::ibv_qp_cap {
            max_send_wr: u32::try_from(RDMA_SENDS).unwrap_or(u32::MAX),
            max_recv_wr: u32::try_from(RDMA_RECEIVES).unwrap_or(u32::MAX),
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 32,
        };
        let mut wanted = sys::ibv_qp_init_attr {
            qp_context: null_mut(),
            send_cq: queue,
            recv_cq: queue,
            srq: null_mut(),
            cap,
            qp_type: sys::ibv_qp_type::IBV_QPT_RC,
            sq_sig_all: 1,
        };
        // SAFETY: the id is bound to a device; a null domain means the library's own for this device, which all ids of
        // this process on it share.
        let made = unsafe { sys::rdma_create_qp(id.raw(), null_mut(), &raw mut wanted) };
        if made != 0 {
            return Err(cannot(last_errno()));
        }
        // SAFETY: the id lives; the call above set its queue pair.
        let queue = unsafe { (*id.raw()).qp };
        let queue = NonNull::new(queue).ok_or_else(|| cannot(Errno::INVAL))?;
        let mut queue_pair = QueuePair { id: id.raw(), queue, completions, notes: None };
        let bytes = (RDMA_RECEIVES * CARD_BYTES).next_multiple_of(4096);
        queue_pair.notes = Some(Region::new(&queue_pair, bytes, Reach::Local)?);
        for slot in 0..RDMA_RECEIVES {
            queue_pair.post_receive(slot).map_err(&cannot)?;
        }
        Ok(queue_pair)
    }

    fn protection_domain(&self) -> *mut sys::ibv_pd {
        // SAFETY: the queue pair lives as long as we do.
        unsafe { (*self.queue.as_ptr()).pd }
    }

    /// Whether keys of the other one are good here.
    pub(super) fn shares_keys_with(&self, other: &QueuePair) -> bool {
        self.protection_domain() == other.protection_domain()
    }

    /// Lets the peer wait 0.64 ms, and not the default 655 ms, when no receive is posted.
    pub(super) fn shorten_not_ready(&self) {
        const TIMER_640_US: u8 = 12;
        let attributes = MaybeUninit::<sys::ibv_qp_attr>::zeroed();
        // SAFETY: plain numbers and enumerations without a forbidden zero.
        let mut attributes = unsafe { attributes.assume_init() };
        attributes.min_rnr_timer = TIMER_640_US;
        let mask = i32::try_from(sys::ibv_qp_attr_mask::IBV_QP_MIN_RNR_TIMER.0).unwrap_or(0);
        // SAFETY: the queue pair lives, and only the named attribute is looked at. A card that refuses keeps its own.
        let _ = unsafe { sys::ibv_modify_qp(self.queue.as_ptr(), &raw mut attributes, mask) };
    }

    /// Posts the receive of a note's slot (again).
    pub(super) fn post_receive(&self, slot: usize) -> Result<(), Errno> {
        let Some(notes) = &self.notes else { return Err(Errno::INVAL) };
        let mut place = entry(notes.key().piece(slot * CARD_BYTES, CARD_BYTES));
        let (next, sg_list) = (null_mut(), &raw mut place);
        let mut request = sys::ibv_recv_wr { wr_id: RECEIVE | slot as u64, next, sg_list, num_sge: 1 };
        let mut bad = null_mut();
        // SAFETY: the queue pair lives, the request is whole, and the library copies it before it returns.
        answer(unsafe { sys::ibv_post_recv(self.queue.as_ptr(), &raw mut request, &raw mut bad) })
    }

    /// The note that came into a slot.
    pub(super) fn note(&self, slot: usize) -> [u8; CARD_BYTES] {
        let mut bytes = [0; CARD_BYTES];
        if let Some(notes) = &self.notes {
            notes.copy_out(slot * CARD_BYTES, &mut bytes);
        }
        bytes
    }

    /// Writes a piece into the peer's memory; the immediate wakes the peer and comes after the bytes.
    pub(super) fn post_write(
        &self,
        from: Option<Piece>,
        address: u64,
        key: u32,
        immediate: Option<u32>,
    ) -> Result<(), Errno> {
        let to = sys::rdma_t { remote_addr: address, rkey: key };
        let opcode = match immediate {
            Some(_) => sys::ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM,
            None => sys::ibv_wr_opcode::IBV_WR_RDMA_WRITE,
        };
        let signaled = sys::ibv_send_flags::IBV_SEND_SIGNALED.0;
        self.post(from, opcode, signaled, to, immediate.unwrap_or(0))
    }

    /// Sends a note; its bytes are taken along at once.
    pub(super) fn post_note(&self, card: &Card) -> Result<(), Errno> {
        use zerocopy::IntoBytes;
        let bytes = card.as_bytes();
        let len = u32::try_from(bytes.len()).map_err(|_| Errno::INVAL)?;
        let piece = Piece { address: bytes.as_ptr() as u64, len, key: 0 };
        let flags = sys::ibv_send_flags::IBV_SEND_SIGNALED.0 | sys::ibv_send_flags::IBV_SEND_INLINE.0;
        let nowhere = sys::rdma_t { remote_addr: 0, rkey: 0 };
        self.post(Some(piece), sys::ibv_wr_opcode::IBV_WR_SEND, flags, nowhere, 0)
    }

    fn post(
        &self,
        piece: Option<Piece>,
        opcode: sys::ibv_wr_opcode::Type,
        send_flags: u32,
        to: sys::rdma_t,
        immediate: u32,
    ) -> Result<(), Errno> {
        let mut place = entry(piece.unwrap_or(Piece { address: 0, len: 0, key: 0 }));
        let nothing = sys::tso_t { hdr: null_mut(), hdr_sz: 0, mss: 0 };
        let mut request = sys::ibv_send_wr {
            wr_id: 0,
            next: null_mut(),
            sg_list: &raw mut place,
            num_sge: i32::from(piece.is_some()),
            opcode,
            send_flags,
            imm_data_invalidated_rkey_union: sys::imm_data_invalidated_rkey_union_t {
                imm_data: immediate.to_be(),
            },
            wr: sys::wr_t { rdma: to },
            qp_type: sys::qp_type_t { xrc: sys::xrc_t { remote_srqn: 0 } },
            bind_mw_tso_union: sys::bind_mw_tso_union_t { tso: nothing },
        };
        let mut bad = null_mut();
        // SAFETY: the queue pair lives, the request is whole, and the library copies it (and inline bytes) before it
        // returns. What it names is checked by the card against its key.
        answer(unsafe { sys::ibv_post_send(self.queue.as_ptr(), &raw mut request, &raw mut bad) })
    }

    /// Asks to be told by [`QueuePair::notices`] of the next completion.
    pub(super) fn arm(&self) -> Result<(), Errno> {
        self.completions.arm()
    }

    /// The descriptor that becomes readable.
    pub(super) fn notices(&self) -> BorrowedFd<'_> {
        self.completions.fd()
    }

    /// Takes what made it readable.
    pub(super) fn take_notices(&self) {
        self.completions.take_notices();
    }

    /// The next finished work request.
    pub(super) fn poll(&self) -> Result<Option<Done>, Errno> {
        let Some(completion) = self.completions.poll()? else { return Ok(None) };
        let succeeded = completion.status == sys::ibv_wc_status::IBV_WC_SUCCESS;
        match (completion.wr_id & RECEIVE == 0, succeeded) {
            (true, true) => return Ok(Some(Done::Sent)),
            (true, false) => return Ok(Some(Done::Failed(CompletionStatus(completion.status)))),
            (false, true) => {}
            (false, false) => return Ok(Some(Done::Over)),
        }
        let slot = usize::try_from(completion.wr_id & !RECEIVE).unwrap_or(0);
        if completion.opcode != sys::ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM {
            return Ok(Some(Done::Note(slot)));
        }
        self.post_receive(slot)?;
        // SAFETY: this kind of completion carries an immediate.
        let immediate = unsafe { completion.imm_data_invalidated_rkey_union.imm_data };
        Ok(Some(Done::Immediate(u32::from_be(immediate))))
    }
}

/// Whether the card of an id can fault pages in by itself when a peer writes them. An id on all cards has none.
pub(super) fn writes_on_demand(id: &CmId) -> bool {
    let Some(verbs) = NonNull::new(id.verbs()) else { return false };
    let mut attributes = MaybeUninit::<sys::ibv_device_attr_ex>::zeroed();
    let place = attributes.as_mut_ptr();
    // SAFETY: the id's open device, and room for the answer.
    let asked = unsafe { sys::ibv_query_device_ex(verbs.as_ptr(), std::ptr::null(), place) };
    // SAFETY: plain numbers, zeroed before the call filled them in.
    let attributes = unsafe { attributes.assume_init() };
    let write = sys::ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_WRITE.0;
    asked == 0 && attributes.odp_caps.per_transport_caps.rc_odp_caps & write != 0
}

fn entry(piece: Piece) -> sys::ibv_sge {
    sys::ibv_sge { addr: piece.address, length: piece.len, lkey: piece.key }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        // SAFETY: the connection that owns us drops its id after us, and this is the id's queue pair.
        unsafe { sys::rdma_destroy_qp(self.id) };
    }
}
