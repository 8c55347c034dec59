//! A build that has lanes over RDMA.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use vmferry_datapath::link::rdma::memlock;
use vmferry_datapath::{GuestRam, Link, OpenRam, RdmaConnection, RdmaError, RdmaLink, RdmaListener};

use crate::channel::HANDSHAKE_TIMEOUT;
use crate::failure::Failure;

/// How often a listener looks whether it should end.
const LISTEN_STEP: Duration = Duration::from_millis(200);

/// A lane that is connected and not yet a link.
pub struct Lane(RdmaConnection);

impl Lane {
    /// Connects and says hello.
    pub fn dial(address: SocketAddr, hello: &[u8]) -> Result<Self, Failure> {
        RdmaConnection::connect(address, hello, HANDSHAKE_TIMEOUT).map(Lane).map_err(|e| failure(&e))
    }

    /// The lane's link; in direct mode with the guest that it reaches.
    #[must_use]
    pub fn into_link(self, direct: Option<&Direct>) -> Box<dyn Link> {
        Box::new(match direct {
            None => RdmaLink::new(self.0),
            Some(Direct::Source(ram)) => RdmaLink::placing(self.0, Arc::clone(ram)),
            Some(Direct::Target(ram)) => RdmaLink::open(self.0, Arc::clone(ram)),
        })
    }
}

/// The guest that lanes in direct mode reach past their records.
pub enum Direct {
    /// Its pages are written into the target's.
    Source(Arc<GuestRam>),
    /// The source writes into it.
    Target(Arc<OpenRam>),
}

impl Direct {
    /// The source's guest.
    #[must_use]
    pub fn source(ram: Arc<GuestRam>) -> Self {
        Self::Source(ram)
    }

    /// The target's guest: one of these for all lanes of an attempt.
    #[must_use]
    pub fn target(ram: Arc<GuestRam>) -> Self {
        Self::Target(OpenRam::new(ram))
    }
}

fn failure(error: &RdmaError) -> Failure {
    let text = error.to_string();
    match error {
        RdmaError::HostRefused { .. } => Failure::Permission(text),
        RdmaError::NoDevice { .. } | RdmaError::Rejected { .. } | RdmaError::Silent { .. } => {
            Failure::Unavailable(text)
        }
    }
}

/// Where lanes knock.
pub struct Listener(RdmaListener);

impl Listener {
    /// Listens on an address of this host.
    pub fn bind(address: SocketAddr) -> Result<Self, Failure> {
        RdmaListener::bind(address).map(Self).map_err(|error| {
            // Here it is this host's own address that no card has.
            let ours = matches!(error, RdmaError::NoDevice { .. });
            if ours { Failure::Refused(format!("cannot listen for lanes: {error}")) } else { failure(&error) }
        })
    }

    /// The next lane whose hello is one, as `parse` reads it; `None` when none came for a moment. Others are
    /// turned away, and `turned_away` is told why.
    pub fn next<T>(
        &self,
        parse: impl Fn(&[u8]) -> Option<T>,
        turned_away: impl Fn(&str),
    ) -> Option<(T, Lane)> {
        let knock = self.0.next(LISTEN_STEP)?;
        let Some(hello) = parse(knock.hello()) else {
            turned_away("an RDMA connection that is no vmferry lane");
            return None;
        };
        match knock.accept() {
            Ok(connection) => Some((hello, Lane(connection))),
            Err(error) => {
                turned_away(&error.to_string());
                None
            }
        }
    }
}

/// Whether this process may lock what its sending lanes need.
pub fn check_memlock(lanes: u16) -> Result<(), Failure> {
    check(u64::from(lanes) * memlock::SENDING_LANE_LOCKED)
}

/// Whether this process may lock what its receiving lanes need, and in direct mode what the source writes to: all of the
/// guest, unless the card at `address` pages by itself.
pub fn check_memlock_of_target(lanes: u16, direct: Option<u64>, address: SocketAddr) -> Result<(), Failure> {
    let lanes = u64::from(lanes) * memlock::RECEIVING_LANE_LOCKED;
    let any_port = SocketAddr::new(address.ip(), 0);
    let pages_by_itself = || RdmaListener::bind(any_port).is_ok_and(|listener| listener.writes_on_demand());
    let guest = direct.filter(|_| !pages_by_itself()).unwrap_or(0);
    check(lanes.saturating_add(guest))
}

fn check(needed: u64) -> Result<(), Failure> {
    memlock::check(needed).map_err(|error| Failure::Permission(error.to_string()))
}
