//! What a link over RDMA counts: one writer, any reader, also after a lane took the link over.

use std::sync::Arc;

use crate::meter::Count;

/// What was counted on one link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RdmaCount {
    /// Work requests posted for sending.
    pub requests: u64,
    /// Of those, runs of pages that went straight into a guest.
    pub placed: u64,
    /// Of those, the ones that carried bytes of slots.
    pub writes: u64,
    /// Times that the lane slept.
    pub sleeps: u64,
}

/// What a lane's thread counts and anyone reads.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) requests: Count,
    pub(super) placed: Count,
    pub(super) writes: Count,
    pub(super) sleeps: Count,
}

/// Reads the counts of a link that a lane has taken over.
#[derive(Clone, Debug)]
pub struct RdmaCounts(Arc<Counts>);

impl RdmaCounts {
    pub(super) fn of(counts: &Arc<Counts>) -> RdmaCounts {
        RdmaCounts(Arc::clone(counts))
    }

    /// What was counted so far.
    #[must_use]
    pub fn read(&self) -> RdmaCount {
        let Counts { requests, placed, writes, sleeps } = &*self.0;
        RdmaCount {
            requests: requests.get(),
            placed: placed.get(),
            writes: writes.get(),
            sleeps: sleeps.get(),
        }
    }
}
