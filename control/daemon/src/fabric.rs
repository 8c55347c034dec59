//! Lanes over RDMA, where this build has them: the only file here that knows whether it does.
//!
//! The control channel stays on TCP; `rdma://HOST:PORT` names its port, and lanes knock at the same port number of the
//! RDMA connection manager. A build without the feature `rdma` reads the address and says what is missing.

use std::net::SocketAddr;
use std::time::Duration;

use crate::failure::Failure;

/// How often a listener looks whether it should end.
pub const LISTEN_STEP: Duration = Duration::from_millis(200);

#[cfg(feature = "rdma")]
mod built {
    use vmferry_datapath::link::rdma::memlock;
    use vmferry_datapath::{Link, RdmaConnection, RdmaError, RdmaLink, RdmaListener};

    use super::{Failure, LISTEN_STEP, SocketAddr};
    use crate::channel::HANDSHAKE_TIMEOUT;

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
            let listener = RdmaListener::bind(address).map_err(|error| match &error {
                RdmaError::NoDevice { .. } => Failure::Refused(format!("cannot listen for lanes: {error}")),
                _ => failure(&error),
            })?;
            Ok(Self(listener))
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
}

#[cfg(not(feature = "rdma"))]
mod built {
    use vmferry_datapath::Link;

    use super::{Failure, SocketAddr};

    /// There are none in this build.
    pub enum Lane {}

    impl Lane {
        /// Refuses.
        pub fn dial(_address: SocketAddr, _hello: &[u8]) -> Result<Self, Failure> {
            Err(missing())
        }

        /// There is none to make a link of.
        #[must_use]
        pub fn into_link(self) -> Box<dyn Link> {
            match self {}
        }
    }

    /// There is none in this build.
    pub enum Listener {}

    impl Listener {
        /// Refuses.
        pub fn bind(_address: SocketAddr) -> Result<Self, Failure> {
            Err(missing())
        }

        /// There is none that could be asked.
        pub fn next<T>(
            &self,
            _parse: impl Fn(&[u8]) -> Option<T>,
            _turned_away: impl Fn(&str),
        ) -> Option<(T, Lane)> {
            match *self {}
        }
    }

    /// Refuses.
    pub fn check_memlock(_lanes: u16, _sending: bool) -> Result<(), Failure> {
        Err(missing())
    }

    fn missing() -> Failure {
        Failure::Refused(
            "this vmferry was built without RDMA: build it with the feature rdma, or use tcp://".into(),
        )
    }
}

pub use built::{Lane, Listener, check_memlock};
