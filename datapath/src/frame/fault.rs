//! What can be wrong with what the peer sent.

use thiserror::Error;

use super::{BODY_BYTES_MAX, Kind, VERSION};

/// What is wrong with what the peer sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum FrameFault {
    /// Not a record at all.
    #[error("the bytes are not a vmferry record")]
    BadMagic,
    /// A version that nobody agreed on.
    #[error("a record of version {0} came, but version {VERSION} was agreed on")]
    BadVersion(u8),
    /// A kind that does not exist.
    #[error("a record of unknown kind {0} came")]
    BadKind(u8),
    /// A field that the kind does not use, or that contradicts another.
    #[error("a record's {0} contradicts its kind")]
    BadField(&'static str),
    /// A body longer than any honest one.
    #[error("a record announced a body of {0} bytes, more than {BODY_BYTES_MAX}")]
    TooLong(u32),
    /// Replayed, dropped or reordered.
    #[error("record {got} came where record {expected} was due")]
    OutOfOrder {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        got: u64,
    },
    /// The tag does not match: altered on the way, or sealed with another key.
    #[error("record {0} was altered on the way or sealed with another key")]
    Forged(u64),
    /// A page that the guest does not have.
    #[error("a record names pages that the guest does not have")]
    NoSuchPage,
    /// A chunk or a state stream that belongs to another lane.
    #[error("a chunk or a device's state came on a lane that it does not belong to")]
    WrongLane,
    /// A state stream that nobody agreed on.
    #[error("state stream {0} came, which was not agreed on")]
    UnknownStream(u16),
    /// A kind that does not travel in this direction, on this lane or at this time.
    #[error("a record of kind {0:?} came where none may come")]
    Unexpected(Kind),
    /// A body that does not decompress to its announced length.
    #[error("a compressed body does not expand to its announced length")]
    BadCompression,
    /// Credit for more than was sent, or less than before.
    #[error("credit came for records that were never sent")]
    BadCredit,
    /// A card of an RDMA link that no honest end sends.
    #[error("a card of an RDMA link contradicts its kind")]
    BadCard,
    /// More bytes in an RDMA ring than there was room for.
    #[error("the other host wrote past the room that it was given in the ring")]
    RingOverrun,
    /// The lane's totals are not what the control channel said.
    #[error("the lane carried {got} records, but the other host counted {expected}")]
    TotalsDiffer {
        /// What the other host counted.
        expected: u64,
        /// What came.
        got: u64,
    },
}
