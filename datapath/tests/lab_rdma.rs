//! RDMA on a real card (the lab's soft one).
#![expect(clippy::disallowed_methods, reason = "tests that wait need a deadline")]

#[cfg(test)]
#[path = "rdma/cable.rs"]
mod cable;
#[cfg(test)]
#[path = "rdma/direct.rs"]
mod direct;
#[cfg(test)]
#[path = "rdma/links.rs"]
mod links;
#[cfg(test)]
#[path = "rdma/locked.rs"]
mod locked;
#[cfg(test)]
#[path = "rdma/urgent.rs"]
mod urgent;
#[cfg(test)]
#[expect(dead_code, reason = "the transfers over TCP and memory use the rest")]
#[path = "transfer/world.rs"]
mod world;
