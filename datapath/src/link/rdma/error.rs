//! Why no RDMA connection came about, in sentences that say what to do.

use std::net::SocketAddr;

use rustix::io::Errno;
use thiserror::Error;

/// Why two hosts did not connect.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RdmaError {
    /// This host has no card on the way to the peer.
    #[error(
        "no RDMA device of this host is on the way to {address} ({errno}); see 'rdma link' for what there is, or use tcp://"
    )]
    NoDevice {
        /// Where the peer listens.
        address: SocketAddr,
        /// What the kernel said.
        errno: Errno,
    },
    /// The peer is there and takes no connection.
    #[error(
        "{address} takes no RDMA connection (reject reason {reason}); is 'vmferry receive --listen rdma://{address}' running there?"
    )]
    Rejected {
        /// Where the peer was expected.
        address: SocketAddr,
        /// The reason as the connection manager numbers it.
        reason: i32,
    },
    /// The peer does not answer.
    #[error(
        "{address} does not answer over RDMA: {stage}; check the fabric between the hosts, or use tcp://"
    )]
    Silent {
        /// Where the peer was expected.
        address: SocketAddr,
        /// How far the connection came.
        stage: &'static str,
    },
    /// This host's kernel or card refused a service.
    #[error("this host refused to {service}: {errno}; {fix}")]
    HostRefused {
        /// What was asked of it.
        service: &'static str,
        /// What its operator can do.
        fix: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
}

pub(super) const FIX_CARD: &str = "load the modules ib_uverbs and rdma_ucm and the card's own, and run vmferry as a user who may open /dev/infiniband";
pub(super) const FIX_LOCKED: &str =
    "raise the limit of locked memory (ulimit -l, or LimitMEMLOCK= of the service)";

/// A refusal of this host.
pub(super) fn refused(service: &'static str, fix: &'static str) -> impl Fn(Errno) -> RdmaError {
    move |errno| RdmaError::HostRefused { service, fix, errno }
}
