//! How vmferry speaks with a VMM of its own: a socket in a private folder, one JSON object a line.
//!
//! The workload process and the micro-VM each have their words; what they share is here. What must never happen: a line or
//! a length from the other end that makes this one allocate without a limit.

mod caller;
mod line;
mod memory;
mod socket;

pub(crate) use caller::{Answer, Caller};
pub(crate) use line::Line;
pub(crate) use memory::MemoryPlace;
pub(crate) use socket::{Socket, socket_path};
