//! Proves; ships nothing.
//!
//! - `command`, `proxy`, `workload`: the real programs, real sockets and real guests, struck at a chosen moment.

pub mod command;
pub mod proxy;
pub mod workload;
