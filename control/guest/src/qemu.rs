//! Any running, unmodified QEMU, spoken to over its QMP socket.
//!
//! ```text
//!   qmp ──► facts (machine, processors, devices)      what negotiation compares
//!       ──► blocks (info ramblock → /proc/PID → file) RAM that the lanes carry; the rest stays in QEMU's stream
//!       ──► migration (x-ignore-shared, events)       settings, borrowed and given back; our mark in the VMM
//!   source ── socket pair, `getfd`, `migrate` ──► stream ──► `migrate-incoming` ── target
//! ```
//!
//! QEMU saves and loads its own devices; we relay the bytes and read none of them. What must never happen: a second
//! `cont` for one guest; the source's is only ever sent before Commit, the target's only after.

mod blocks;
mod devices;
mod facts;
mod failover;
mod inspect;
mod migration;
mod qmp;
mod source;
mod stream;
mod target;

pub(crate) use inspect::inspect;
pub use source::{QemuSource, rescue};
pub use target::QemuTarget;
