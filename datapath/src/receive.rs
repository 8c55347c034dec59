//! The receiving half.
use std::io::{self, Read};
use std::sync::Arc;

use crate::{Cipher, DataError, GuestRam, LaneEnd, LaneTotals, Meter};

/// Takes in pages and device state from all lanes.
pub struct Receiver {}

/// The device state as it arrives on lane 0: ends where the sender ended it, fails when the lane does.
pub struct StateStream {}

const SKELETON: DataError = DataError::Bug("the receiver is not built yet");

impl Receiver {
    /// Starts a pinned thread for each lane; every buffer is allocated and registered when this returns.
    pub fn start(
        _ram: Arc<GuestRam>,
        _lanes: Vec<LaneEnd>,
        _cipher: Cipher,
    ) -> Result<(Receiver, StateStream), DataError> {
        Err(SKELETON)
    }

    /// Returns when every lane has ended with exactly these totals. `Ok(false)` when `go_on` said no.
    pub fn wait_complete(
        &mut self,
        _totals: &[LaneTotals],
        _go_on: &mut dyn FnMut() -> bool,
    ) -> Result<bool, DataError> {
        Err(SKELETON)
    }

    /// What was taken in so far.
    pub fn meter(&self) -> Meter {
        Meter::default()
    }

    /// The first failure of any lane.
    pub fn failure(&self) -> Option<DataError> {
        None
    }

    /// Closes every link and ends every lane at once.
    pub fn abort(&mut self) {}
}

impl Read for StateStream {
    fn read(&mut self, _into: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::other(SKELETON))
    }
}
