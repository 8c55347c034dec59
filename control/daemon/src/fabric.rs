//! Lanes over RDMA, where this build has them: the only file here that knows whether it does.
//!
//! The control channel stays on TCP; `rdma://HOST:PORT` names its port, and lanes knock at the same port number of the
//! RDMA connection manager. A build without the feature `rdma` reads the address and says what is missing.

#[cfg(feature = "rdma")]
mod built;

#[cfg(not(feature = "rdma"))]
#[path = "fabric/absent.rs"]
mod built;

pub use built::{Direct, Lane, Listener, Pins, check_memlock, pins_of_target};

/// What the operator said about how much of a target's guest direct mode locks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PinWish {
    /// Nothing.
    None,
    /// At most so many bytes at a time.
    AtMost(u64),
    /// All of it, before the first page.
    All,
}
