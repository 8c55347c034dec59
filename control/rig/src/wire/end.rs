//! Where frames come from and answers go: a datagram socket that a QEMU's NIC is at, or a card of this host.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::RigError;

/// A NIC that takes no frame for so long loses it.
const DELIVERY_TIMEOUT: Duration = Duration::from_millis(2);
/// How often a port looks whether its wire is gone.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// One end of the wire.
#[derive(Debug)]
pub(super) enum End {
    /// A socket, and the NIC's.
    Datagrams(UnixDatagram, PathBuf),
    /// Every frame that a card takes in.
    Card(OwnedFd),
}

impl End {
    pub(super) fn datagrams(ours: &Path, theirs: &Path) -> Result<End, RigError> {
        let what = || format!("cannot open the port {}", ours.display());
        let socket = UnixDatagram::bind(ours).map_err(RigError::host(what()))?;
        socket.set_read_timeout(Some(LOOK_EVERY)).map_err(RigError::host(what()))?;
        socket.set_write_timeout(Some(DELIVERY_TIMEOUT)).map_err(RigError::host(what()))?;
        Ok(End::Datagrams(socket, theirs.to_path_buf()))
    }

    pub(super) fn card(name: &str) -> Result<End, RigError> {
        let what = || format!("cannot listen at the card {name}");
        let address = card_address(name)?;
        let open = || {
            let (family, kind) = (AddressFamily::Packet, SockType::Raw);
            let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
            bind(socket.as_raw_fd(), &address)?;
            let look = TimeVal::new(0, i64::from(LOOK_EVERY.subsec_micros()));
            setsockopt(&socket, sockopt::ReceiveTimeout, &look)?;
            Ok(socket)
        };
        open().map(End::Card).map_err(|errno: nix::Error| RigError::host(what())(errno.into()))
    }

    /// The next frame, or `WouldBlock` within a moment.
    pub(super) fn receive(&self, frame: &mut [u8]) -> io::Result<usize> {
        match self {
            End::Datagrams(socket, _) => socket.recv(frame),
            End::Card(socket) => Ok(recv(socket.as_raw_fd(), frame, MsgFlags::empty())?),
        }
    }

    /// Sends a frame back.
    pub(super) fn answer(&self, frame: &[u8]) -> io::Result<()> {
        match self {
            End::Datagrams(socket, nic) => socket.send_to(frame, nic).map(|_| ()),
            End::Card(socket) => Ok(send(socket.as_raw_fd(), frame, MsgFlags::empty()).map(|_| ())?),
        }
    }
}

fn card_address(name: &str) -> Result<LinkAddr, RigError> {
    let cards = nix::ifaddrs::getifaddrs()
        .map_err(|errno| RigError::host("cannot list this host's cards")(errno.into()))?;
    let mut addresses = cards.filter(|card| card.interface_name == name).filter_map(|card| card.address);
    let found = addresses.find_map(|address| address.as_link_addr().copied());
    found.ok_or_else(|| RigError::Missing(format!("this host has no card {name}")))
}
