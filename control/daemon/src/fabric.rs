//! Lanes over RDMA, where this build has them: the only file here that knows whether it does.
//!
//! The control channel stays on TCP; `rdma://HOST:PORT` names its port, and lanes knock at the same port number of the
//! RDMA connection manager. A build without the feature `rdma` reads the address and says what is missing.

#[cfg(feature = "rdma")]
mod built;

#[cfg(not(feature = "rdma"))]
#[path = "fabric/absent.rs"]
mod built;

pub use built::{Direct, Lane, Listener, check_memlock, check_memlock_of_target};
