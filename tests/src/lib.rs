//! Proves; ships nothing.
//!
//! - [`world`]: two hosts, one guest, a link that fails, a clock moved by hand; the machines are the real ones.
//! - [`fuzz`]: what must hold for any bytes that a peer sends.
//! - [`handover`]: the same machines in a world without time, small enough for a model checker.
//! - `cable`, `card`, `command`, `microvm`, `proxy`, `workload`: the real programs, real sockets and real guests, struck at a
//!   chosen moment.

pub mod cable;
pub mod card;
pub mod command;
pub mod fuzz;
pub mod handover;
pub mod microvm;
pub mod proxy;
pub mod workload;
pub mod world;
