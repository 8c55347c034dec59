//! The connecting side: one attempt after another, until one succeeds, the peer refuses, or the time is over.
//!
//! ```text
//!   address ─► route ─► queue pair ─► request ─► established
//!      └────────┴────────────────────────┴─ a fault that passes: all of it anew, after AGAIN_AFTER
//! ```
//!
//! Shortly after a cable was cut, the neighbour table still says «failed», or the peer's connection manager still holds
//! an old connection of our queue pair's number and calls ours stale. Either passes in a moment, and a move that gave up
//! would have been given up for nothing. What must never happen: waiting past the time that the caller named.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_sys::rdma_cm_event_type as kind;
use rustix::io::Errno;

use super::cm::{Channel, CmId, Connection, RdmaConnection, errno_of_status, now};
use super::error::{FIX_CARD, RdmaError, refused};
use super::verbs::QueuePair;

/// How long the kernel may look for the peer's neighbour entry before it is asked again.
const RESOLVE_MS: i32 = 300;
/// Between two attempts.
const AGAIN_AFTER: Duration = Duration::from_millis(100);
/// Reject reasons of the connection manager that pass: no resources, a timeout, and a connection that is stale there.
const REJECTED_FOR_NOW: [i32; 3] = [3, 4, 10];

/// Whether the same attempt may succeed a moment later.
fn passes(error: &RdmaError) -> bool {
    match error {
        RdmaError::Silent { .. } => true,
        RdmaError::Rejected { reason, .. } => REJECTED_FOR_NOW.contains(reason),
        RdmaError::NoDevice { errno, .. } => {
            matches!(*errno, Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::TIMEDOUT)
        }
        RdmaError::HostRefused { .. } => false,
    }
}

/// What the fabric is told about a connection's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// Nothing: they are like any others.
    Bulk,
    /// They go first: DSCP 46, «expedited forwarding», in both directions. Switches and cards that know no classes ignore it.
    Urgent,
}

impl Service {
    /// The traffic class: DSCP in the upper six bits.
    fn traffic_class(self) -> Option<u8> {
        match self {
            Service::Bulk => None,
            Service::Urgent => Some(46 << 2),
        }
    }
}

impl RdmaConnection {
    /// Connects to a listener and says hello. What passes is tried again, all of it `within` the time.
    pub fn connect(address: SocketAddr, hello: &[u8], within: Duration) -> Result<RdmaConnection, RdmaError> {
        RdmaConnection::connect_as(Service::Bulk, address, hello, within)
    }

    /// The same, as a service of its own. The peer's packets get the same class, since its card takes it from the request.
    pub fn connect_as(
        service: Service,
        address: SocketAddr,
        hello: &[u8],
        within: Duration,
    ) -> Result<RdmaConnection, RdmaError> {
        let due = now() + within;
        loop {
            match attempt(service, address, hello, due) {
                Err(error) if passes(&error) && now() + AGAIN_AFTER < due => std::thread::sleep(AGAIN_AFTER),
                outcome => return outcome,
            }
        }
    }
}

/// One attempt.
fn attempt(
    service: Service,
    address: SocketAddr,
    hello: &[u8],
    due: Instant,
) -> Result<RdmaConnection, RdmaError> {
    let channel = Channel::new()?;
    let id = CmId::new(&channel)?;
    if let Some(class) = service.traffic_class() {
        id.set_traffic_class(class).map_err(refused("mark an RDMA connection as urgent", FIX_CARD))?;
    }
    let dial = Dial { channel: &channel, address, due };
    dial.resolve(&id)?;
    id.hurry();
    id.resolve_route(dial.left_ms()).map_err(|errno| RdmaError::NoDevice { address, errno })?;
    dial.expect(kind::RDMA_CM_EVENT_ROUTE_RESOLVED, "no route to it was found")?;
    let queue_pair = QueuePair::new(&id)?;
    id.connect(hello).map_err(refused("connect over RDMA", FIX_CARD))?;
    let connected = dial.expect(kind::RDMA_CM_EVENT_ESTABLISHED, "it did not answer the connection request");
    let inner = Connection::new(queue_pair, id, channel);
    connected?;
    inner.queue_pair.shorten_not_ready();
    Ok(RdmaConnection { inner: Arc::new(inner), established: true })
}

/// A connection that is being made: which peer, until when.
struct Dial<'a> {
    channel: &'a Channel,
    address: SocketAddr,
    due: Instant,
}

impl Dial<'_> {
    /// Waits until the connection manager says that a step is done.
    fn expect(&self, wanted: kind::Type, stage: &'static str) -> Result<(), RdmaError> {
        let address = self.address;
        let Some(event) = self.channel.await_next(self.due) else {
            return Err(RdmaError::Silent { address, stage });
        };
        let errno = errno_of_status(event.status);
        match event.kind {
            got if got == wanted => Ok(()),
            kind::RDMA_CM_EVENT_ADDR_ERROR => Err(RdmaError::NoDevice { address, errno }),
            kind::RDMA_CM_EVENT_REJECTED => Err(RdmaError::Rejected { address, reason: event.status }),
            _ => Err(RdmaError::Silent { address, stage }),
        }
    }

    /// Looks for the way to the peer. The kernel looks at its neighbour table once and then waits for news of it, which on a
    /// short wire can have come in between: so it is given little time, and the next attempt finds the neighbour known.
    fn resolve(&self, id: &CmId) -> Result<(), RdmaError> {
        let address = self.address;
        id.resolve_address(address, RESOLVE_MS).map_err(|errno| RdmaError::NoDevice { address, errno })?;
        match self.expect(kind::RDMA_CM_EVENT_ADDR_RESOLVED, "its address was not resolved") {
            Err(RdmaError::NoDevice { errno: Errno::TIMEDOUT, .. }) => {
                Err(RdmaError::Silent { address, stage: "its address was not resolved" })
            }
            outcome => outcome,
        }
    }

    fn left_ms(&self) -> i32 {
        i32::try_from(self.due.saturating_duration_since(now()).as_millis()).unwrap_or(i32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_is_tried_again_and_what_was_refused_is_not() {
        let address = SocketAddr::from(([192, 0, 2, 7], 7700));
        let rejected = |reason| RdmaError::Rejected { address, reason };
        let no_device = |errno| RdmaError::NoDevice { address, errno };
        assert!(passes(&RdmaError::Silent { address, stage: "" }));
        assert!(passes(&rejected(10)), "our queue pair's number had an earlier owner");
        assert!(passes(&no_device(Errno::HOSTUNREACH)), "the neighbour table still says failed");
        assert!(!passes(&rejected(8)), "nobody listens");
        assert!(!passes(&rejected(28)), "the listener turned us away");
        assert!(!passes(&no_device(Errno::NODEV)));
    }
}
