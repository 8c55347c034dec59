//! Proves; ships nothing.
//!
//! - [`world`]: two hosts, one guest, a link that fails, a clock moved by hand; the machines are the real ones.
//! - `command`, `proxy`, `workload`: the real programs, real sockets and real guests, struck at a chosen moment.

pub mod command;
pub mod proxy;
pub mod workload;
pub mod world;
