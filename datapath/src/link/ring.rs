//! One socket on one io_uring, with every buffer registered before the first byte.
//!
//! ```text
//!   slots    | slot 0 | slot 1 | slot 2 |        one mapping, registered as buffer 0
//!   receive  | ring of N bytes | the same N bytes again |   mapped twice: any N bytes are contiguous
//! ```
//!
//! The receive ring is mapped twice in a row, so a record that wraps around its end is still one slice, opened in
//! place and never moved. What must never happen: memory unmapped while the kernel may still write to it; so the
//! ring waits for its operations before it lets go, and rather leaks the memory than unmaps it under an operation.
#![expect(unsafe_code, reason = "maps and registers buffers, and hands their addresses to the kernel")]

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::{NonNull, null_mut};
use std::time::Duration;

use io_uring::types::{Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use super::zero_copy::SendHow;
use super::{LinkPlan, LinkTrouble};
use crate::error::LinkFault;

/// Submission entries: a send, a receive, and room.
const ENTRIES: u32 = 16;
const SLOTS_BUFFER: u16 = 0;
const SOCKET: Fixed = Fixed(0);
const ENTER_GETEVENTS: u32 = 1;
const SEND_ZC_REPORT_USAGE: u16 = 1 << 3;
const NOTIF_USAGE_ZC_COPIED: i32 = i32::MIN;

/// A finished operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// The send ended: bytes sent, or the error; `held` when a zero-copy slot is still being read.
    Send { outcome: Result<usize, Errno>, held: bool },
    /// The receive ended: bytes received, or the error.
    Receive { outcome: Result<usize, Errno> },
    /// The kernel no longer reads this slot; `copied` when its zero-copy send was none.
    Released { slot: usize, copied: bool },
}

/// A mapping of ours, unmapped on drop.
pub(super) struct Mapped {
    base: NonNull<u8>,
    len: usize,
}

impl Mapped {
    /// Its first byte.
    #[cfg(feature = "rdma")]
    pub(super) fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// Its length.
    #[cfg(feature = "rdma")]
    pub(super) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: mapped by us, with this length; its owner drops it only when no operation is left.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// The ring, the registered buffers, and what is in flight on them.
pub(crate) struct Ring {
    uring: IoUring,
    socket: RawFd,
    low_water: i32,
    slots: Option<Mapped>,
    receive: Option<Mapped>,
    plan: LinkPlan,
    registered: bool,
    /// The slot that the kernel reads by the send in flight.
    sending: Option<usize>,
    /// Zero-copy sends whose slot is not released yet.
    held: Vec<bool>,
    /// The bytes of the receive ring that the kernel may write: start and length.
    receiving: Option<(u64, usize)>,
    head: u64,
    tail: u64,
}

// SAFETY: the mappings are private memory without thread affinity, and everything is used through `&mut self`.
unsafe impl Send for Ring {}

fn refused(service: &'static str, fix: &'static str) -> impl Fn(Errno) -> LinkTrouble {
    move |errno| LinkTrouble::Refused { service, fix, errno }
}

pub(crate) fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

const FIX_MEMORY: &str = "free some memory, or use fewer lanes";
const FIX_URING: &str = "allow io_uring (sysctl kernel.io_uring_disabled=0, Linux 6.1 or newer)";

impl Ring {
    /// Makes the ring for a connected socket. The calling thread is the only one that may use it from now on.
    pub(crate) fn new(socket: BorrowedFd<'_>, plan: LinkPlan) -> Result<Ring, LinkTrouble> {
        let uring = build().map_err(|error| refused("set up an io_uring", FIX_URING)(errno_of(&error)))?;
        let slots =
            map_slots(plan.send_slots * plan.slot_bytes).map_err(refused("allocate buffers", FIX_MEMORY))?;
        let receive = map_twice(plan.receive_bytes).map_err(refused("allocate buffers", FIX_MEMORY))?;
        uring
            .submitter()
            .register_files(&[socket.as_raw_fd()])
            .map_err(|error| refused("register a socket", FIX_URING)(errno_of(&error)))?;
        let iovec = libc::iovec { iov_base: slots.base.as_ptr().cast(), iov_len: slots.len };
        // SAFETY: the slots are mapped until `Ring` drops them, after the ring's last operation.
        // Without CAP_IPC_LOCK this may exceed RLIMIT_MEMLOCK: then the slots are sent unregistered.
        let registered = unsafe { uring.submitter().register_buffers(&[iovec]) }.is_ok();
        Ok(Ring {
            uring,
            socket: socket.as_raw_fd(),
            low_water: 1,
            slots: Some(slots),
            receive: Some(receive),
            plan,
            registered,
            sending: None,
            held: vec![false; plan.send_slots],
            receiving: None,
            head: 0,
            tail: 0,
        })
    }

    /// Wakes a waiting receive only when so many bytes are there. Fewer wake-ups are the only effect: bytes that are
    /// there when a receive is posted are handed out at once.
    pub(crate) fn set_low_water(&mut self, bytes: usize) {
        let Ok(value) = i32::try_from(bytes.max(1)) else { return };
        if value == self.low_water {
            return;
        }
        let (level, name, len) = (libc::SOL_SOCKET, libc::SO_RCVLOWAT, INT_BYTES);
        // SAFETY: the option takes an int, and `value` is one. The socket is open as long as the link that owns us.
        let set = unsafe { libc::setsockopt(self.socket, level, name, (&raw const value).cast(), len) };
        if set == 0 {
            self.low_water = value;
        }
    }

    /// Whether the slots are registered, as zero-copy needs.
    pub(crate) fn registered(&self) -> bool {
        self.registered
    }

    /// Whether the kernel may still read a slot.
    pub(crate) fn is_busy(&self, slot: usize) -> bool {
        self.sending == Some(slot) || self.held.get(slot).copied().unwrap_or(true)
    }

    /// The bytes of a slot; empty while the kernel may read it.
    pub(crate) fn slot_mut(&mut self, slot: usize) -> &mut [u8] {
        let Some(start) = self.slot_start(slot).filter(|_| !self.is_busy(slot)) else { return &mut [] };
        // SAFETY: the slot lies inside our mapping, no operation uses it, and the borrow is of `self`.
        unsafe { std::slice::from_raw_parts_mut(start, self.plan.slot_bytes) }
    }

    fn slot_start(&self, slot: usize) -> Option<*mut u8> {
        let slots = self.slots.as_ref().filter(|_| slot < self.plan.send_slots)?;
        // SAFETY: the mapping has `send_slots` times `slot_bytes` bytes.
        Some(unsafe { slots.base.as_ptr().add(slot * self.plan.slot_bytes) })
    }

    /// The bytes that arrived and were not consumed.
    pub(crate) fn arrived(&mut self) -> &mut [u8] {
        let len = usize::try_from(self.tail - self.head).unwrap_or(0);
        let Some(start) = self.receive_start(self.head) else { return &mut [] };
        // SAFETY: `len` is at most the ring's size and starts in its first mapping, so it lies inside the two. The
        // kernel writes only from `tail` on, and the second mapping of these bytes is reached by no other slice,
        // because the borrow is of `self`.
        unsafe { std::slice::from_raw_parts_mut(start, len) }
    }

    fn receive_start(&self, at: u64) -> Option<*mut u8> {
        let offset = usize::try_from(at % self.plan.receive_bytes as u64).ok()?;
        // SAFETY: the offset is smaller than one of the two mappings.
        self.receive.as_ref().map(|receive| unsafe { receive.base.as_ptr().add(offset) })
    }

    /// Gives arrived bytes back.
    pub(crate) fn consume(&mut self, len: usize) {
        self.head = self.tail.min(self.head + len as u64);
    }

    /// Queues a send of a part of a slot. There is at most one in flight, or the kernel might reorder them.
    pub(crate) fn push_send(
        &mut self,
        slot: usize,
        from: usize,
        len: usize,
        how: SendHow,
    ) -> Result<(), LinkTrouble> {
        let fits = from.checked_add(len).is_some_and(|end| end <= self.plan.slot_bytes);
        let start = self.slot_start(slot).filter(|_| fits && self.sending.is_none());
        let (Some(start), Ok(len)) = (start, u32::try_from(len)) else { return Err(misuse()) };
        // SAFETY: `from` is inside the slot, checked above.
        let start = unsafe { start.add(from) };
        let flags = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;
        let entry = match how {
            SendHow::Copy => opcode::Send::new(SOCKET, start, len).flags(flags).build().user_data(SEND),
            SendHow::ZeroCopy => opcode::SendZc::new(SOCKET, start, len)
                .buf_index(Some(SLOTS_BUFFER))
                .flags(flags)
                .zc_flags(SEND_ZC_REPORT_USAGE)
                .build()
                .user_data(SEND_ZC | slot as u64),
        };
        self.sending = Some(slot);
        self.push(&entry)
    }

    /// Queues a receive into the free part of the ring, if there is none in flight and there is room.
    pub(crate) fn push_receive(&mut self) -> Result<(), LinkTrouble> {
        let used = usize::try_from(self.tail - self.head).unwrap_or(usize::MAX);
        let free = self.plan.receive_bytes.saturating_sub(used);
        if self.receiving.is_some() || free == 0 {
            return Ok(());
        }
        let (Some(start), Ok(len)) = (self.receive_start(self.tail), u32::try_from(free)) else {
            return Err(misuse());
        };
        self.receiving = Some((self.tail, free));
        let entry = opcode::Recv::new(SOCKET, start, len).build().user_data(RECEIVE);
        self.push(&entry)
    }

    fn push(&mut self, entry: &squeue::Entry) -> Result<(), LinkTrouble> {
        // SAFETY: the entry points into our mappings, which outlive the operation: `sending`, `held` and
        // `receiving` keep everyone else out until its completion, and drop waits for it.
        unsafe { self.uring.submission().push(entry) }.map_err(|_| misuse())
    }

    /// Submits what is queued and runs completions, waiting for one for at most `wait`.
    pub(crate) fn enter(&mut self, wait: Duration) -> Result<(), LinkTrouble> {
        let outcome = if wait.is_zero() {
            let queued = u32::try_from(self.uring.submission().len()).unwrap_or(0);
            // SAFETY: no argument is passed, so none can dangle.
            unsafe { self.uring.submitter().enter::<()>(queued, 0, ENTER_GETEVENTS, None) }
        } else {
            let time = Timespec::new().sec(wait.as_secs()).nsec(wait.subsec_nanos());
            self.uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
        };
        match outcome.map_err(|error| errno_of(&error)) {
            Ok(_) | Err(Errno::TIME | Errno::INTR | Errno::BUSY | Errno::AGAIN) => Ok(()),
            Err(errno) => Err(LinkTrouble::Lost(LinkFault::Failed(errno))),
        }
    }

    /// The next finished operation.
    pub(crate) fn reap(&mut self) -> Option<Done> {
        let entry = self.uring.completion().next()?;
        let slot = usize::try_from(entry.user_data() & SLOT_MASK).unwrap_or(usize::MAX);
        if cqueue::notif(entry.flags()) {
            self.hold(slot, false);
            return Some(Done::Released { slot, copied: entry.result() & NOTIF_USAGE_ZC_COPIED != 0 });
        }
        let outcome = outcome_of(entry.result());
        if entry.user_data() == RECEIVE {
            self.receiving = None;
            self.tail += outcome.unwrap_or(0) as u64;
            return Some(Done::Receive { outcome });
        }
        self.sending = None;
        let held = cqueue::more(entry.flags());
        if held {
            self.hold(slot, true);
        }
        Some(Done::Send { outcome, held })
    }

    fn hold(&mut self, slot: usize, held: bool) {
        if let Some(place) = self.held.get_mut(slot) {
            *place = held;
        }
    }

    fn in_flight(&self) -> bool {
        self.sending.is_some() || self.receiving.is_some() || self.held.contains(&true)
    }

    /// Waits for the last operations of a socket that was shut down. Whether none is left.
    pub(crate) fn drain(&mut self) -> bool {
        for _ in 0..DRAIN_ROUNDS {
            while self.reap().is_some() {}
            if !self.in_flight() {
                return true;
            }
            if self.enter(DRAIN_WAIT).is_err() {
                return false;
            }
        }
        !self.in_flight()
    }
}

/// What a completion says: a count, or an error number below zero.
fn outcome_of(result: i32) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| Errno::from_raw_os_error(result.saturating_neg()))
}

const SEND: u64 = 1 << 32;
const SEND_ZC: u64 = 2 << 32;
const RECEIVE: u64 = 3 << 32;
const SLOT_MASK: u64 = (1 << 32) - 1;
/// The size of an `int`, as `setsockopt` wants it.
const INT_BYTES: libc::socklen_t = 4;
const DRAIN_ROUNDS: u32 = 20;
const DRAIN_WAIT: Duration = Duration::from_millis(50);

fn misuse() -> LinkTrouble {
    refused("queue an operation", "report this as a bug")(Errno::INVAL)
}

fn build() -> std::io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_submit_all()
        .build(ENTRIES)
        .or_else(|_| IoUring::builder().build(ENTRIES))
}

/// Private memory, there before the first byte is.
pub(super) fn map_slots(len: usize) -> Result<Mapped, Errno> {
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::POPULATE);
    // SAFETY: a fresh mapping at an address that the kernel picks touches no memory of ours.
    let base = unsafe { mmap_anonymous(null_mut(), len, prot, flags) }?;
    let base = NonNull::new(base.cast::<u8>()).ok_or(Errno::FAULT)?;
    Ok(Mapped { base, len })
}

/// `len` bytes of memory, mapped twice in a row. `len` is a multiple of the page size.
fn map_twice(len: usize) -> Result<Mapped, Errno> {
    let file = memfd_create("vmferry-receive", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, len as u64)?;
    // SAFETY: reserves an address range for the two mappings, at an address that the kernel picks.
    let base = unsafe { mmap_anonymous(null_mut(), 2 * len, ProtFlags::empty(), MapFlags::PRIVATE) }?;
    let whole = Mapped { base: NonNull::new(base.cast::<u8>()).ok_or(Errno::FAULT)?, len: 2 * len };
    let (prot, flags) =
        (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED | MapFlags::FIXED | MapFlags::POPULATE);
    for half in [0, len] {
        // SAFETY: the range was just reserved for `2 * len` bytes.
        let at = unsafe { whole.base.as_ptr().add(half) };
        // SAFETY: replaces a part of our own reservation, which nobody uses yet.
        unsafe { mmap(at.cast(), len, prot, flags, &file, 0) }?;
    }
    // SAFETY: advice on our own mapping; the kernel may ignore it.
    let _ = unsafe { madvise(whole.base.as_ptr().cast(), whole.len, Advice::LinuxDontFork) };
    Ok(whole)
}

impl Drop for Ring {
    fn drop(&mut self) {
        if !self.drain() {
            // The kernel may still use the buffers: they are leaked, once, at the end of a broken connection.
            std::mem::forget(self.slots.take());
            std::mem::forget(self.receive.take());
        }
    }
}
