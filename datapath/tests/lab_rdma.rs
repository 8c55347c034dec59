//! RDMA on a real card (the lab's soft one).
#![expect(clippy::disallowed_methods, reason = "tests that wait need a deadline")]

#[cfg(test)]
#[path = "lab_rdma/cable.rs"]
mod cable;
#[cfg(test)]
#[path = "lab_rdma/links.rs"]
mod links;
#[cfg(test)]
#[expect(dead_code, reason = "the transfers over TCP and memory use the rest")]
#[path = "transfer/world.rs"]
mod world;
