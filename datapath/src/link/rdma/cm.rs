//! How two queue pairs find each other: the connection manager, with every wait bounded.
//!
//! ```text
//!   connect: address ─► route ─► queue pair ─► hello ──────► knock ─► queue pair ─► accept    :accept
//!                                       established ◄──────► established (told by the link's own progress)
//! ```
//!
//! The hello travels as the private data of the request. It proves nothing; the first record under the lane's key does.
//! What must never happen: a stranger's half-made connection that holds up an honest one. So accepting waits for nobody.
#![expect(unsafe_code, reason = "librdmacm is a C library that works on pointers")]

use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_sys as sys;
use rdma_sys::rdma_cm_event_type as kind;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

use super::error::{FIX_CARD, RdmaError, refused};
use super::verbs::{QueuePair, writes_on_demand};

/// The longest hello: what the connection manager leaves of its private data.
pub const HELLO_BYTES_MAX: usize = 56;
/// Connections that may wait to be accepted.
const BACKLOG: i32 = 32;
/// The card asks again after 4.096 µs times two to this power, 0.54 s, and gives up after [`RETRIES`]: 3.8 s, a little
/// before the control channel does, so that the error names what the card saw. Seven retries would be endless ones to
/// the soft card rxe.
const ACK_TIMEOUT: u8 = 17;
const RETRIES: u8 = 6;
/// Without end: a peer that is there and has posted no receive is slow, not lost.
const NOT_READY_RETRIES: u8 = 7;
/// `RDMA_OPTION_ID`, and its `_TOS` and `_ACK_TIMEOUT`, of rdma_cma.h.
const OPTION_OF_ID: i32 = 0;
const OPTION_TRAFFIC_CLASS: i32 = 0;
const OPTION_ACK_TIMEOUT: i32 = 3;

/// The error number that an event's status is, below zero.
pub(super) fn errno_of_status(status: i32) -> Errno {
    Errno::from_io_error(&std::io::Error::from_raw_os_error(status.saturating_abs())).unwrap_or(Errno::IO)
}

fn outcome(code: i32) -> Result<(), Errno> {
    if code == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// What the connection manager told.
pub(super) struct Event {
    pub(super) kind: kind::Type,
    pub(super) status: i32,
    /// The new connection of a request.
    id: *mut sys::rdma_cm_id,
    hello: [u8; HELLO_BYTES_MAX],
}

/// Where the connection manager tells of one id, or of a listener and its requests.
pub(super) struct Channel(NonNull<sys::rdma_event_channel>);

impl Channel {
    pub(super) fn new() -> Result<Channel, RdmaError> {
        let cannot = refused("open the RDMA connection manager", FIX_CARD);
        // SAFETY: no argument.
        let raw = unsafe { sys::rdma_create_event_channel() };
        let last = || Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NODEV);
        let channel = Channel(NonNull::new(raw).ok_or_else(|| cannot(last()))?);
        let flags = fcntl_getfl(channel.fd()).map_err(&cannot)?;
        fcntl_setfl(channel.fd(), flags | OFlags::NONBLOCK).map_err(&cannot)?;
        Ok(channel)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the channel lives as long as we do.
        let fd = unsafe { (*self.0.as_ptr()).fd };
        // SAFETY: an open descriptor of the channel, borrowed with us.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    /// The next event, if there is one.
    fn next(&self) -> Option<Event> {
        let mut raw = null_mut();
        // SAFETY: the channel lives, and the place is ours. The descriptor does not block.
        let got = unsafe { sys::rdma_get_cm_event(self.0.as_ptr(), &raw mut raw) };
        let raw = NonNull::new(raw).filter(|_| got == 0)?;
        // SAFETY: the event is ours until it is acknowledged.
        let event = unsafe { raw.as_ref() };
        let mut hello = [0; HELLO_BYTES_MAX];
        if event.event == kind::RDMA_CM_EVENT_CONNECT_REQUEST {
            // SAFETY: a request of a connected port space carries connection parameters.
            let param = unsafe { event.param.conn };
            let len = usize::from(param.private_data_len).min(HELLO_BYTES_MAX);
            if !param.private_data.is_null() {
                // SAFETY: the event holds so many bytes there until it is acknowledged, and `hello` has room for them.
                unsafe { std::ptr::copy_nonoverlapping(param.private_data.cast(), hello.as_mut_ptr(), len) };
            }
        }
        let event = Event { kind: event.event, status: event.status, id: event.id, hello };
        // SAFETY: got above, acknowledged once; nothing of it is used afterwards.
        unsafe { sys::rdma_ack_cm_event(raw.as_ptr()) };
        Some(event)
    }

    /// The next event, waiting at most until `due`.
    pub(super) fn await_next(&self, due: Instant) -> Option<Event> {
        loop {
            if let Some(event) = self.next() {
                return Some(event);
            }
            let left = due.saturating_duration_since(now());
            if left.is_zero() {
                return None;
            }
            wait_for(&[self.fd()], left);
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: every id on it is gone, by the order of the fields of whoever owns us.
        unsafe { sys::rdma_destroy_event_channel(self.0.as_ptr()) };
    }
}

#[expect(clippy::disallowed_methods, reason = "a connection is driven here, and so the clock is read")]
pub(super) fn now() -> Instant {
    Instant::now()
}

/// Sleeps until one of the descriptors is readable, at most so long.
fn wait_for(fds: &[BorrowedFd<'_>], wait: Duration) {
    let mut polled: Vec<PollFd<'_>> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let (secs, nanos) = (i64::try_from(wait.as_secs()).unwrap_or(i64::MAX), wait.subsec_nanos());
    // An early return is as good as a late one: the caller looks again.
    let _ = poll(&mut polled, Some(&Timespec { tv_sec: secs, tv_nsec: nanos.into() }));
}

/// One identity of the connection manager: a listener, or one end of a connection.
pub(super) struct CmId(NonNull<sys::rdma_cm_id>);

impl CmId {
    pub(super) fn new(channel: &Channel) -> Result<CmId, RdmaError> {
        let mut raw = null_mut();
        let space = sys::rdma_port_space::RDMA_PS_TCP;
        // SAFETY: the channel lives, and the place is ours.
        let made = unsafe { sys::rdma_create_id(channel.0.as_ptr(), &raw mut raw, null_mut(), space) };
        outcome(made).map_err(refused("open the RDMA connection manager", FIX_CARD))?;
        NonNull::new(raw)
            .map(CmId)
            .ok_or_else(|| refused("open the RDMA connection manager", FIX_CARD)(Errno::INVAL))
    }

    pub(super) fn raw(&self) -> *mut sys::rdma_cm_id {
        self.0.as_ptr()
    }

    /// The device that the id is bound to.
    pub(super) fn verbs(&self) -> *mut sys::ibv_context {
        // SAFETY: the id lives as long as we do.
        unsafe { (*self.raw()).verbs }
    }

    /// Asks for the way to an address; the answer comes as an event, at the latest after so long.
    pub(super) fn resolve_address(&self, to: SocketAddr, within_ms: i32) -> Result<(), Errno> {
        let mut to = raw_address(to);
        // SAFETY: the id lives, and the address is whole.
        outcome(unsafe { sys::rdma_resolve_addr(self.raw(), null_mut(), (&raw mut to).cast(), within_ms) })
    }

    /// Asks for the route to the address that was resolved; the answer comes as an event.
    pub(super) fn resolve_route(&self, within_ms: i32) -> Result<(), Errno> {
        // SAFETY: the id lives; one without an address is refused by the library.
        outcome(unsafe { sys::rdma_resolve_route(self.raw(), within_ms) })
    }

    /// Asks the peer for a connection of this id's queue pair; the answer comes as an event.
    pub(super) fn connect(&self, hello: &[u8]) -> Result<(), Errno> {
        let mut wanted = parameters(hello);
        // SAFETY: the id lives; one without a route is refused. The hello outlives the call.
        outcome(unsafe { sys::rdma_connect(self.raw(), &raw mut wanted) })
    }

    /// The traffic class of all packets of the connection; before its route is asked for.
    pub(super) fn set_traffic_class(&self, mut class: u8) -> Result<(), Errno> {
        let place = (&raw mut class).cast();
        // SAFETY: the id lives; the option takes one byte, and `class` is one.
        outcome(unsafe { sys::rdma_set_option(self.raw(), OPTION_OF_ID, OPTION_TRAFFIC_CLASS, place, 1) })
    }

    /// A request for a lost segment goes out after half a second, not after two.
    pub(super) fn hurry(&self) {
        let mut timeout = ACK_TIMEOUT;
        let place = (&raw mut timeout).cast();
        // SAFETY: the option takes one byte, and `timeout` is one. A kernel that refuses keeps its own.
        let _ = unsafe { sys::rdma_set_option(self.raw(), OPTION_OF_ID, OPTION_ACK_TIMEOUT, place, 1) };
    }
}

impl Drop for CmId {
    fn drop(&mut self) {
        // SAFETY: made by the library, destroyed once; its queue pair is gone and its events are acknowledged.
        unsafe { sys::rdma_destroy_id(self.raw()) };
    }
}

/// One end of a connection: the queue pair goes first, then the id, then its channel.
pub(super) struct Connection {
    pub(super) queue_pair: QueuePair,
    id: CmId,
    channel: Channel,
}

// SAFETY: the library locks its ids and channels; nothing here has a thread of its own.
unsafe impl Send for Connection {}
// SAFETY: as above. Another thread than the lane's only disconnects.
unsafe impl Sync for Connection {}

/// What the connection manager said about a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Notice {
    /// The peer is there.
    Established,
    /// The peer is gone.
    Disconnected,
    /// The card is gone.
    DeviceGone,
}

impl Connection {
    pub(super) fn new(queue_pair: QueuePair, id: CmId, channel: Channel) -> Connection {
        Connection { queue_pair, id, channel }
    }

    /// What happened to the connection since the last look.
    pub(super) fn notice(&self) -> Option<Notice> {
        loop {
            match self.channel.next()?.kind {
                kind::RDMA_CM_EVENT_ESTABLISHED => return Some(Notice::Established),
                kind::RDMA_CM_EVENT_DEVICE_REMOVAL => return Some(Notice::DeviceGone),
                kind::RDMA_CM_EVENT_DISCONNECTED
                | kind::RDMA_CM_EVENT_CONNECT_ERROR
                | kind::RDMA_CM_EVENT_REJECTED
                | kind::RDMA_CM_EVENT_TIMEWAIT_EXIT => return Some(Notice::Disconnected),
                // Of a connection that stands, «unreachable» says that the kernel's neighbour table changed. The card
                // knows better: either it still gets through, or it says how it failed.
                _ => {}
            }
        }
    }

    /// Whether the card faults pages in by itself when the peer writes them.
    pub(super) fn writes_on_demand(&self) -> bool {
        writes_on_demand(&self.id)
    }

    /// Ends the connection: whatever is posted on either end comes back as flushed. May be called from any thread.
    pub(super) fn disconnect(&self) {
        // SAFETY: the id lives as long as we do. It fails where the connection has ended already, which is as good.
        let _ = unsafe { sys::rdma_disconnect(self.id.raw()) };
    }

    /// Sleeps until the card or the connection manager has something to say.
    pub(super) fn wait(&self, wait: Duration) {
        wait_for(&[self.queue_pair.notices(), self.channel.fd()], wait);
        self.queue_pair.take_notices();
    }
}

/// A connected queue pair, ready to become a link.
pub struct RdmaConnection {
    pub(super) inner: Arc<Connection>,
    pub(super) established: bool,
}

/// The address in the kernel's own form.
fn raw_address(address: SocketAddr) -> libc::sockaddr_storage {
    // SAFETY: plain numbers, for which zero is a value.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    match address {
        SocketAddr::V4(v4) => {
            let sin = libc::sockaddr_in {
                sin_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or(0),
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*v4.ip()).to_be() },
                sin_zero: [0; 8],
            };
            // SAFETY: the storage is large enough and aligned for every kind of address.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(sin) };
        }
        SocketAddr::V6(v6) => {
            let sin6 = libc::sockaddr_in6 {
                sin6_family: libc::sa_family_t::try_from(libc::AF_INET6).unwrap_or(0),
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: v6.flowinfo(),
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(sin6) };
        }
    }
    storage
}

/// The parameters of a connection, with a hello that outlives the call it is made for.
fn parameters(hello: &[u8]) -> sys::rdma_conn_param {
    sys::rdma_conn_param {
        private_data: hello.as_ptr().cast(),
        private_data_len: u8::try_from(hello.len().min(HELLO_BYTES_MAX)).unwrap_or(0),
        responder_resources: 1,
        initiator_depth: 1,
        flow_control: 0,
        retry_count: RETRIES,
        rnr_retry_count: NOT_READY_RETRIES,
        srq: 0,
        qp_num: 0,
    }
}

/// Listens for connections.
pub struct RdmaListener {
    id: CmId,
    channel: Arc<Channel>,
}

// SAFETY: the library locks its channels; nothing here has a thread of its own.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}
// SAFETY: the library locks its ids, and they have no thread of their own.
unsafe impl Send for CmId {}

/// Somebody who wants to connect; turned away when dropped.
pub struct RdmaKnock {
    id: CmId,
    /// The listener's, which the id is on until it is accepted.
    channel: Arc<Channel>,
    hello: [u8; HELLO_BYTES_MAX],
}

impl RdmaListener {
    /// Listens on an address of a card, or on all cards.
    pub fn bind(address: SocketAddr) -> Result<RdmaListener, RdmaError> {
        let channel = Channel::new()?;
        let id = CmId::new(&channel)?;
        let mut at = raw_address(address);
        // SAFETY: the id lives, and the address is whole.
        let bound = unsafe { sys::rdma_bind_addr(id.raw(), (&raw mut at).cast()) };
        let no_device = |errno| match errno {
            Errno::NODEV | Errno::ADDRNOTAVAIL => RdmaError::NoDevice { address, errno },
            _ => refused("listen for RDMA connections", "choose another port, or an address of this host")(
                errno,
            ),
        };
        outcome(bound).map_err(no_device)?;
        // SAFETY: the id is bound.
        let listening = unsafe { sys::rdma_listen(id.raw(), BACKLOG) };
        outcome(listening).map_err(no_device)?;
        Ok(RdmaListener { id, channel: Arc::new(channel) })
    }

    /// Whether the card that has the address faults pages in by itself when a peer writes them: then direct mode locks
    /// nothing of the guest.
    #[must_use]
    pub fn writes_on_demand(&self) -> bool {
        writes_on_demand(&self.id)
    }

    /// The next one who knocks, waiting at most so long.
    pub fn next(&self, wait: Duration) -> Option<RdmaKnock> {
        let due = now() + wait;
        loop {
            let event = self.channel.await_next(due)?;
            let id = NonNull::new(event.id).filter(|_| event.kind == kind::RDMA_CM_EVENT_CONNECT_REQUEST);
            if let Some(id) = id {
                let channel = Arc::clone(&self.channel);
                return Some(RdmaKnock { id: CmId(id), channel, hello: event.hello });
            }
        }
    }
}

impl RdmaKnock {
    /// What it said, padded with zeroes.
    #[must_use]
    pub fn hello(&self) -> &[u8; HELLO_BYTES_MAX] {
        &self.hello
    }

    /// Lets it in. Waits for nobody: the link learns by its own progress when the peer is there.
    pub fn accept(self) -> Result<RdmaConnection, RdmaError> {
        let cannot = refused("accept an RDMA connection", FIX_CARD);
        let channel = Channel::new()?;
        let RdmaKnock { id, channel: _listeners, hello: _ } = self;
        // SAFETY: both live, and the id's only event, the request, was acknowledged.
        outcome(unsafe { sys::rdma_migrate_id(id.raw(), channel.0.as_ptr()) }).map_err(&cannot)?;
        id.hurry();
        let queue_pair = QueuePair::new(&id)?;
        let mut wanted = parameters(&[]);
        // SAFETY: the id has a queue pair and a request to accept.
        outcome(unsafe { sys::rdma_accept(id.raw(), &raw mut wanted) }).map_err(&cannot)?;
        Ok(RdmaConnection { inner: Arc::new(Connection::new(queue_pair, id, channel)), established: false })
    }
}
