//! Every limit, named.
/// The most lanes of one transfer.
pub const LANES_MAX: usize = 16;
