//! A build that has lanes over RDMA.

use std::net::SocketAddr;
use std::time::Duration;

use vmferry_datapath::link::rdma::memlock;
use vmferry_datapath::{Link, RdmaConnection, RdmaError, RdmaLink, RdmaListener};

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

    /// The lane's link.
    #[must_use]
    pub fn into_link(self) -> Box<dyn Link> {
        Box::new(RdmaLink::new(self.0))
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

/// What so many lanes lock in memory on the side that sends, or on the one that receives.
fn lanes_locked(lanes: u16, sending: bool) -> u64 {
    let each = if sending { memlock::SENDING_LANE_LOCKED } else { memlock::RECEIVING_LANE_LOCKED };
    u64::from(lanes) * each
}

/// Whether this process may lock what its lanes need.
pub fn check_memlock(lanes: u16, sending: bool) -> Result<(), Failure> {
    memlock::check(lanes_locked(lanes, sending)).map_err(|error| Failure::Permission(error.to_string()))
}
