//! How a device that cannot migrate leaves its guest for the time of a move, and comes back.
//!
//! ```text
//!   source:  remember ─► plug standby ─► standby ready ─► unplug primary ─► traffic moved ─► (the move)
//!            forget   ◄─ unplug standby ◄─────────────────── plug primary ◄──────────────────── any failure
//!   target:  (the guest runs) ─► plug the target's own primary ─► the guest takes it
//! ```
//!
//! The primary is the fast device of one host (an SR-IOV virtual function), the standby a virtio NIC with the same MAC
//! that moves like any other; the guest's `net_failover` driver makes one interface of the two. What is here is pure:
//! the plan, its undoing and the operator's choices; who carries a step out is a [`Hands`]. What must never happen: a
//! guest that is left without the device it had, because a later step failed. Every step is undone, last one first,
//! the failed one included, because it may have half happened.

mod device;
mod options;
mod plan;
mod scripted;

pub use device::DeviceOptions;
pub use options::{CancelFlag, FailoverMode, FailoverOptions, OnUnplugTimeout};
pub use plan::{Hands, Ledger, Plan, Primary, Standby, Step};
pub use scripted::ScriptedHands;
