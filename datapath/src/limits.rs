//! Every limit of the data path, named, and the memory that they add up to.
//!
//! Buffers are allocated and registered before the first record and none after, so the sum below is what a
//! transfer costs, however large the guest is.

use std::time::Duration;

use crate::frame::RECORD_BYTES_MAX;
use crate::page::CHUNK_BYTES;

/// The most lanes of one transfer.
pub const LANES_MAX: usize = 16;

/// Buffers that a sending lane fills while others are on their way: one filling, one in the kernel, one waiting.
pub const SEND_SLOTS: usize = 3;
/// Bytes of one of them: the longest record, rounded up to whole pages.
pub const SLOT_BYTES: usize = RECORD_BYTES_MAX.next_multiple_of(4096);
/// Bytes that a receiving lane can hold before they are opened: a few of the longest records.
pub const RECEIVE_BYTES: usize = 1 << 20;
/// The same of the credit direction, in which only small records travel.
pub const CREDIT_BYTES: usize = 1 << 16;
/// Buffers for the credit direction.
pub const CREDIT_SLOTS: usize = 2;

/// Work requests that a lane over RDMA may have posted for sending: a page run each, in the worst chunk.
pub const RDMA_SENDS: usize = 128;
/// Receives that it keeps posted; each takes an immediate or a note.
pub const RDMA_RECEIVES: usize = 64;
/// The ring that its peer writes to is this part of what a link is asked to hold, and comes on top of it: records are
/// opened in a private copy, since no byte may be opened where the fabric can still change it.
pub const RDMA_RING_PART: usize = 4;
/// What a target in direct mode opens at once: the first page of it that comes locks all of it.
pub const RDMA_REGION_BYTES: u64 = 4 << 20;
/// Bytes that a lane in direct mode places before it tells of them.
pub const RDMA_PLACED_UNTOLD: u64 = 1 << 20;
/// The least that is written to a ring at once, unless less is left.
pub const RDMA_PIECE_BYTES_MIN: usize = 64 << 10;

/// Buffers of the urgent path, and the bytes of each: a record of one page.
pub const URGENT_SLOTS: usize = 4;
/// See [`URGENT_SLOTS`].
pub const URGENT_SLOT_BYTES: usize = 2 * 4096;
/// Bytes that its receiver can hold before they are opened: a dozen such records. A longer one never becomes whole.
pub const URGENT_RECEIVE_BYTES: usize = 64 << 10;

/// Wire bytes that a lane may be ahead of its receiver's last credit.
pub const WINDOW_BYTES: u64 = 8 << 20;
/// Wire bytes after which a receiver gives credit without being asked.
pub const CREDIT_EVERY_BYTES: u64 = 1 << 20;

/// Chunks that travel to a lane as one order, and orders that may wait there.
pub const ORDER_CHUNKS: usize = 16;
/// Orders that may wait at a lane: with the above 16 MiB of guest, so a stop takes effect soon.
pub const LANE_ORDERS: usize = 4;

/// The most devices whose states travel beside the VMM's own.
pub const DEVICE_STREAMS_MAX: usize = 16;
/// State that is handed to a lane at once. A lane with pages to send takes at most one such piece after each chunk,
/// so device state has at most a fifth of it.
pub const STATE_PIECE_BYTES: usize = 64 << 10;
/// Pieces of state that may wait at a lane.
pub const STATE_ORDERS: usize = 2;
/// State of the VMM that may wait for its reader on the target.
pub const STATE_PIPE_BYTES: usize = 1 << 20;
/// The same of each device.
pub const DEVICE_PIPE_BYTES: usize = 256 << 10;

/// How long a peer may take in nothing while something is owed before the link is given up.
pub const STALL_MAX: Duration = Duration::from_secs(10);
/// How often an idle lane looks at its link, and a waiting caller is asked whether to go on.
pub const TICK: Duration = Duration::from_millis(5);
/// How long an idle lane sleeps.
pub const IDLE: Duration = Duration::from_millis(50);

/// The guest that the budget is stated for.
const BUDGET_GUEST_PAGES: usize = (4 << 30) / 4096;
/// What a process may use for a guest of 4 GiB.
pub const BUDGET_BYTES: usize = 64 << 20;

/// A sending lane: slots, credit ring (over RDMA bounced), and the scratch of compression (one chunk gathered).
const SENDING_LANE_BYTES: usize =
    SEND_SLOTS * SLOT_BYTES + CREDIT_BYTES + CREDIT_BYTES / RDMA_RING_PART + 4096 + CHUNK_BYTES;
/// Orders waiting at a lane: two words a chunk, and pieces of state.
const ORDERS_BYTES: usize = LANE_ORDERS * ORDER_CHUNKS * 16 + STATE_ORDERS * STATE_PIECE_BYTES;
/// What the feeders of the state streams hold in their hands: a piece each.
const FEEDERS_BYTES: usize = (1 + DEVICE_STREAMS_MAX) * STATE_PIECE_BYTES;
/// What waits for the readers of the state streams.
const PIPES_BYTES: usize = STATE_PIPE_BYTES + DEVICE_STREAMS_MAX * DEVICE_PIPE_BYTES;
/// A receiving lane: ring, credit slots, the scratch of decompression, and over RDMA the bounce ring and the notes.
const RECEIVING_LANE_BYTES: usize =
    RECEIVE_BYTES + CREDIT_SLOTS * 4096 + CHUNK_BYTES + RECEIVE_BYTES / RDMA_RING_PART + 4096;

/// The urgent path on the source: a lane with small slots.
const URGENT_PATH_BYTES: usize =
    SENDING_LANE_BYTES - SEND_SLOTS * SLOT_BYTES + URGENT_SLOTS * URGENT_SLOT_BYTES + ORDERS_BYTES;

/// A source with every lane: lanes and their orders, the urgent path, state feeders, eight hashes bytes a page, twelve page
/// sets, and one of what was taken.
const SOURCE_BYTES: usize = LANES_MAX * (SENDING_LANE_BYTES + ORDERS_BYTES)
    + URGENT_PATH_BYTES
    + FEEDERS_BYTES
    + BUDGET_GUEST_PAGES * 8
    + 13 * BUDGET_GUEST_PAGES / 8;
/// A target with every lane: lanes and the urgent path, state streams, and twelve page sets.
const TARGET_BYTES: usize = LANES_MAX * RECEIVING_LANE_BYTES
    + URGENT_RECEIVE_BYTES
    + URGENT_RECEIVE_BYTES / RDMA_RING_PART
    + CREDIT_SLOTS * 4096
    + CHUNK_BYTES
    + 4096
    + PIPES_BYTES
    + 12 * BUDGET_GUEST_PAGES / 8;

const _: () =
    assert!(SOURCE_BYTES < BUDGET_BYTES / 2, "the source leaves half of the budget to everyone else");
const _: () =
    assert!(TARGET_BYTES < BUDGET_BYTES / 2, "the target leaves half of the budget to everyone else");
const _: () =
    assert!(RECEIVE_BYTES >= 2 * RECORD_BYTES_MAX, "a whole record must fit beside the next one's start");
const _: () = assert!(
    WINDOW_BYTES >= CREDIT_EVERY_BYTES + 2 * RDMA_PLACED_UNTOLD + RECORD_BYTES_MAX as u64,
    "what was placed must be told before the window is full"
);
const _: () = assert!(
    WINDOW_BYTES >= 2 * CREDIT_EVERY_BYTES + RECORD_BYTES_MAX as u64,
    "credit must outrun the window"
);
