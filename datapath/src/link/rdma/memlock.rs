//! What RDMA locks in memory, compared with what this process may lock: before the start, with the exact numbers.
//!
//! A card works on physical addresses, so everything that it reaches stays where it is: the buffers of the lanes, and in
//! direct mode the target's guest. What must never happen: a move that ends in the middle for want of a number in a
//! unit file.

use std::fmt;

use rustix::process::{Resource, getrlimit};
use thiserror::Error;

use super::placement::Pin;
use crate::limits::{
    CREDIT_BYTES, CREDIT_SLOTS, RDMA_REGION_BYTES, RDMA_RING_PART, RECEIVE_BYTES, SEND_SLOTS, SLOT_BYTES,
};

/// Bytes that one sending lane locks: slots, the ring for credit, the slots for notes.
pub const SENDING_LANE_LOCKED: u64 = (SEND_SLOTS * SLOT_BYTES + CREDIT_BYTES / RDMA_RING_PART + 4096) as u64;
/// Bytes that one receiving lane locks.
pub const RECEIVING_LANE_LOCKED: u64 = (CREDIT_SLOTS * 4096 + RECEIVE_BYTES / RDMA_RING_PART + 4096) as u64;

/// Bytes that so many receiving lanes lock.
#[must_use]
pub const fn receiving(lanes: u16) -> u64 {
    lanes as u64 * RECEIVING_LANE_LOCKED
}

/// The capability that lifts the limit.
const CAP_IPC_LOCK: u32 = 14;

/// The limit of locked memory is too low.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error(
    "RDMA needs {} bytes locked, the limit is {}: ulimit -l {}, or LimitMEMLOCK={} in the service's unit",
    Grouped(*needed), Grouped(*limit), needed.div_ceil(1024), needed
)]
pub struct MemlockTooLow {
    /// What is needed.
    pub needed: u64,
    /// What is allowed.
    pub limit: u64,
}

/// A number with its digits in threes.
struct Grouped(u64);

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = self.0.to_string();
        for (place, digit) in digits.chars().enumerate() {
            if place > 0 && (digits.len() - place).is_multiple_of(3) {
                f.write_str(" ")?;
            }
            write!(f, "{digit}")?;
        }
        Ok(())
    }
}

/// Whether so many bytes may be locked by a process with this limit; `None` is no limit.
fn compare(needed: u64, limit: Option<u64>, privileged: bool) -> Result<(), MemlockTooLow> {
    match limit {
        Some(limit) if needed > limit && !privileged => Err(MemlockTooLow { needed, limit }),
        _ => Ok(()),
    }
}

/// Checks that this process may lock so many bytes.
pub fn check(needed: u64) -> Result<(), MemlockTooLow> {
    compare(needed, getrlimit(Resource::Memlock).current, is_privileged())
}

/// Bytes that this process may lock; `None` is no limit.
#[must_use]
pub fn limit() -> Option<u64> {
    getrlimit(Resource::Memlock).current.filter(|_| !is_privileged())
}

/// What to pin of a guest where nobody said: all that pages come for, or as much at a time as the limit leaves beside
/// the lanes. It must leave a region for each lane.
pub fn pin_within(limit: Option<u64>, lanes: u16, ram_bytes: u64) -> Result<Pin, MemlockTooLow> {
    let room = limit.map_or(u64::MAX, |limit| limit.saturating_sub(receiving(lanes)));
    if room >= ram_bytes {
        return Ok(Pin::AsNeeded);
    }
    let least = ram_bytes.min(u64::from(lanes) * RDMA_REGION_BYTES);
    compare(receiving(lanes).saturating_add(least), limit, false)?;
    Ok(Pin::AtMost(room - room % RDMA_REGION_BYTES))
}

/// Whether this thread is above the limit.
fn is_privileged() -> bool {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> CAP_IPC_LOCK & 1 == 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_is_larger_than_the_limit_is_pinned_a_part_at_a_time() {
        const MIB: u64 = 1 << 20;
        let of_lanes = receiving(2);
        assert_eq!(pin_within(None, 2, 64 * MIB), Ok(Pin::AsNeeded));
        assert_eq!(pin_within(Some(of_lanes + 64 * MIB), 2, 64 * MIB), Ok(Pin::AsNeeded));
        assert_eq!(pin_within(Some(of_lanes + 63 * MIB), 2, 64 * MIB), Ok(Pin::AtMost(60 * MIB)));
        let low = pin_within(Some(of_lanes + 7 * MIB), 2, 64 * MIB).unwrap_err();
        assert_eq!(low.needed, of_lanes + 8 * MIB);
    }

    #[test]
    fn a_limit_that_is_too_low_is_told_with_both_numbers_and_both_remedies() {
        let low = compare(1 << 30, Some(8 << 20), false).unwrap_err();
        assert_eq!(
            low.to_string(),
            "RDMA needs 1 073 741 824 bytes locked, the limit is 8 388 608: ulimit -l 1048576, or LimitMEMLOCK=1073741824 in the service's unit"
        );
        assert_eq!(compare(1 << 30, Some(1 << 30), false), Ok(()));
        assert_eq!(compare(1 << 30, None, false), Ok(()));
        assert_eq!(compare(1 << 30, Some(0), true), Ok(()));
    }
}
