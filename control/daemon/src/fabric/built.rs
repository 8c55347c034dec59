//! A build that has lanes over RDMA.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use vmferry_datapath::link::rdma::memlock;
use vmferry_datapath::{GuestRam, Link, OpenRam, Pin, RdmaConnection, RdmaError, RdmaLink, RdmaListener};

use super::PinWish;
use crate::channel::HANDSHAKE_TIMEOUT;
use crate::failure::Failure;

/// How often a listener looks whether it should end.
const LISTEN_STEP: Duration = Duration::from_millis(200);

/// What direct mode opens of a guest at once.
const REGION: u64 = vmferry_datapath::limits::RDMA_REGION_BYTES;

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
    pub fn target(ram: Arc<GuestRam>, pins: &Pins, lanes: u16) -> Self {
        Self::Target(OpenRam::new(ram, pins.pin, usize::from(lanes)))
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

/// What a target pins, and how many lanes fit that.
pub struct Pins {
    pin: Pin,
    /// Lanes that may come.
    pub lanes_max: u16,
}

/// Decides what a target pins, and refuses what this process may not lock: what its lanes need, and in direct mode the
/// guest of so many bytes that the source writes to, unless the card at `address` pages by itself.
pub fn pins_of_target(
    lanes_max: u16,
    direct: Option<(u64, PinWish)>,
    address: SocketAddr,
) -> Result<Pins, Failure> {
    let Some((ram_bytes, wish)) = direct else {
        check(memlock::receiving(lanes_max))?;
        return Ok(Pins { pin: Pin::AsNeeded, lanes_max });
    };
    let any_port = SocketAddr::new(address.ip(), 0);
    let pages_by_itself = RdmaListener::bind(any_port).is_ok_and(|listener| listener.writes_on_demand());
    let limit = memlock::limit().filter(|_| !pages_by_itself);
    let failed = |error: memlock::MemlockTooLow| Failure::Permission(error.to_string());
    let pins = match wish {
        PinWish::None => {
            Pins { pin: memlock::pin_within(limit, lanes_max, ram_bytes).map_err(failed)?, lanes_max }
        }
        PinWish::AtMost(bytes) => {
            let lanes_max = lanes_max.min(u16::try_from(bytes / REGION).unwrap_or(u16::MAX));
            if lanes_max == 0 {
                let text = format!("--rdma-pin-max is {bytes} bytes: give it {REGION} or more for each lane");
                return Err(Failure::Refused(text));
            }
            Pins { pin: Pin::AtMost(bytes), lanes_max }
        }
        PinWish::All => Pins { pin: Pin::All, lanes_max },
    };
    let guest = match pins.pin {
        Pin::AtMost(bytes) => bytes.min(ram_bytes),
        Pin::AsNeeded | Pin::All => ram_bytes,
    };
    let guest = if pages_by_itself { 0 } else { guest };
    check(memlock::receiving(pins.lanes_max).saturating_add(guest))?;
    if let (PinWish::None, Pin::AtMost(bytes)) = (wish, pins.pin) {
        eprintln!(
            "vmferry: at most {bytes} bytes of the guest are locked at a time, as the limit of locked memory allows"
        );
    }
    Ok(pins)
}

fn check(needed: u64) -> Result<(), Failure> {
    memlock::check(needed).map_err(|error| Failure::Permission(error.to_string()))
}
