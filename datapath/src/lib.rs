//! Moves pages, decides nothing.
//!
//! ```text
//!   guest RAM ── Sender ── lane 0..n ── link (io_uring TCP, RDMA, memory) ── lane 0..n ── Receiver ── guest RAM
//!       ▲            seal                                                        open
//!   DirtyLog: which pages were written since we last looked
//! ```
//!
//! A lane is one pinned thread, one link, one key and one counter in each direction. A page always travels on the
//! same lane (its chunk number modulo the lanes), so a newer copy can never be overtaken by an older one. What to
//! send and when is decided elsewhere; here is only *how*.

pub mod compression;
pub mod digest;
pub mod dirty;
pub mod error;
pub mod frame;
pub mod fuzz;
pub mod guest_ram;
pub mod hot;
pub mod lane;
pub mod layout;
pub mod limits;
pub mod link;
pub mod meter;
pub mod page;
pub mod page_set;
pub mod probe;
pub mod receive;
pub mod seal;
pub mod send;
#[cfg(test)]
mod testing;

pub use compression::CompressionSample;
pub use digest::{BlockDigest, RamDigest};
pub use dirty::combined::CombinedLog;
pub use dirty::departing::DepartingLog;
pub use dirty::kvm_log::KvmLog;
pub use dirty::kvm_ring::{EXIT_DIRTY_RING_FULL, KvmRingLog, KvmRings, RingRequest};
pub use dirty::kvm_sys::KvmSlot;
pub use dirty::pagemap::PagemapLog;
pub use dirty::soft_dirty::SoftDirtyLog;
pub use dirty::{DirtyLog, TrackError, WatchedArea};
pub use error::{Blame, DataError, LinkFault};
pub use guest_ram::{Access, GuestRam, GuestRange, RamError, RamFile};
pub use hot::HotLedger;
pub use lane::{LaneEnd, LaneKeys};
pub use layout::{LayoutError, RAM_BLOCKS_MAX, RamBlock, RamLayout};
pub use link::Link;
pub use link::completion::CompletionStatus;
pub use link::file::FileLink;
pub use link::memory::MemoryLink;
#[cfg(feature = "rdma")]
pub use link::rdma::{OpenRam, Pin, RdmaConnection, RdmaError, RdmaLink, RdmaListener, Service};
pub use link::tcp::TcpLink;
pub use meter::{LaneMeter, Meter, MeterReader};
pub use page::{ByteLen, CHUNK_BYTES, CHUNK_PAGES, ChunkIndex, PAGE_BYTES, PageCount, PageIndex};
pub use page_set::PageSet;
pub use receive::{Receiver, StateStream};
pub use seal::{Cipher, LaneKey, Provider, fastest_provider};
pub use send::{Compression, LaneTotals, SendPlan, Sender, StateFeed, UrgentSender};
