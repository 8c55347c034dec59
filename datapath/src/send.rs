//! The sending half.
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Cipher, DataError, GuestRam, LaneKey, Link, PageSet};

/// The keys of one lane, one for each direction.
pub struct LaneKeys {
    /// Seals what this host sends.
    pub outbound: LaneKey,
    /// Opens what the other host sends.
    pub inbound: LaneKey,
}

/// This host's end of one lane.
pub struct LaneEnd {
    /// The transport.
    pub link: Box<dyn Link>,
    /// The keys; none when the transfer is plain.
    pub keys: Option<LaneKeys>,
    /// The CPU to pin the lane's thread to.
    pub cpu: Option<usize>,
}

/// Whether bodies are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Never.
    Off,
    /// With zstd, kept for each record only where it is smaller.
    Zstd {
        /// zstd's level.
        level: i32,
    },
}

/// How to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendPlan {
    /// How records are sealed.
    pub cipher: Cipher,
    /// Whether bodies are compressed.
    pub compression: Compression,
    /// Remember a hash of each page sent, 8 bytes a page: for guests with O_DIRECT disks.
    pub keep_hashes: bool,
    /// Bytes per second on the wire, all lanes together.
    pub rate_limit: Option<u64>,
}

/// What one lane carried: compared over the control channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneTotals {
    /// The lane.
    pub lane: u16,
    /// Records, END included.
    pub records: u64,
    /// Bytes on the wire.
    pub bytes: u64,
}

/// What one lane did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneMeter {
    /// The CPU it is pinned to.
    pub cpu: Option<usize>,
    /// Page bytes moved.
    pub bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Records.
    pub records: u64,
    /// Time not spent waiting.
    pub busy_ns: u64,
    /// Time since the lane began.
    pub elapsed_ns: u64,
}

/// What a sender or receiver did so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meter {
    /// Lane by lane.
    pub lanes: Vec<LaneMeter>,
    /// Bytes of all pages told about, zero pages included.
    pub page_bytes: u64,
    /// Pages that were zero.
    pub zero_pages: u64,
    /// Pages whose bytes travelled.
    pub data_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Bytes of device state.
    pub state_bytes: u64,
}

/// Sends pages and device state over all lanes.
pub struct Sender {}

const SKELETON: DataError = DataError::Bug("the sender is not built yet");

impl Sender {
    /// Starts a pinned thread for each lane; every buffer is allocated and registered when this returns.
    pub fn start(_ram: Arc<GuestRam>, _lanes: Vec<LaneEnd>, _plan: SendPlan) -> Result<Sender, DataError> {
        Err(SKELETON)
    }

    /// Sends the pages of a set. `go_on` is asked every few milliseconds; `Ok(false)` when it said no.
    pub fn send(&mut self, _pages: &PageSet, _go_on: &mut dyn FnMut() -> bool) -> Result<bool, DataError> {
        Err(SKELETON)
    }

    /// Tells the target that the pages of a set are zero, without reading them.
    pub fn send_zero(&mut self, _pages: &PageSet) -> Result<(), DataError> {
        Err(SKELETON)
    }

    /// Returns when the receiver has taken in everything that was sent.
    pub fn flush(&mut self) -> Result<(), DataError> {
        Err(SKELETON)
    }

    /// Sends bytes of the device state, on lane 0.
    pub fn send_state(&mut self, _bytes: &[u8]) -> Result<(), DataError> {
        Err(SKELETON)
    }

    /// The device state is complete.
    pub fn end_state(&mut self) -> Result<(), DataError> {
        Err(SKELETON)
    }

    /// Ends every lane, and gives what each carried. Nothing may be sent afterwards.
    pub fn finish(&mut self) -> Result<Vec<LaneTotals>, DataError> {
        Err(SKELETON)
    }

    /// With `keep_hashes`: which of the pages differ from what was last sent of them.
    pub fn changed_since_sent(&self, pages: &PageSet) -> PageSet {
        pages.clone()
    }

    /// What was sent so far.
    pub fn meter(&self) -> Meter {
        Meter::default()
    }

    /// The first failure of any lane.
    pub fn failure(&self) -> Option<DataError> {
        None
    }

    /// Changes the rate limit, all lanes together.
    pub fn set_rate_limit(&self, _bytes_per_s: Option<u64>) {}

    /// Closes every link and ends every lane at once, also when the peer is stuck.
    pub fn abort(&mut self) {}
}
