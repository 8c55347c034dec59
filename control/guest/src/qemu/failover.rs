//! Failover of a QEMU guest's devices through QMP: QEMU's own words (`failover=on`, `failover_pair_id`), our own timing.
//!
//! QEMU would ask the guest for the primary inside of `migrate` (its status is then `wait-unplug`), while the guest
//! runs. We run `migrate` in the blackout, where no guest can answer, so the primary is asked for before the first
//! round, and QEMU finds nothing to unplug. What must never happen: `migrate` with a primary in its slot.

mod hands;
mod pairs;
mod parked;
mod source;
mod target;

pub(crate) use pairs::{FoundStandby, Pairs};
pub(crate) use source::{SourceFailover, bring_back};
pub(crate) use target::TargetFailover;
