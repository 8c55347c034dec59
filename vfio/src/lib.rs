//! Speaks to passthrough devices, and to nobody else.
//!
//! ```text
//!   Iommu (container or iommufd) ── DmaMaps, IommuLog
//!     └─ Passthrough : MigratableDevice ──┬─ state: the table of arcs        (state)
//!                     FakeDevice ─────────┤─ stream: out of it, into it      (stream)
//!                                         ├─ dma: what it wrote, who tells   (dma)
//!                                         └─ quiesce: the order of the stop  (quiesce)
//! ```
//!
//! It knows no page of a guest, no link and no session: whoever moves a guest brings the vCPUs, the memory and the bytes'
//! way. What is absent: DMA through a Rust reference, a state that is remembered instead of asked, a log error that
//! means "clean".

pub mod contract;
mod device;
pub mod dma;
mod error;
pub mod fake;
mod iommu;
mod passthrough;
pub mod quiesce;
pub mod state;
pub mod stream;
mod sys;

pub use device::{
    Bitmap, DataFile, DataRead, DmaLog, MigratableDevice, Migration, PrecopyInfo, READ_WAIT_MS,
};
pub use dma::{Dirty, DmaMaps, IovaRange, Pins, RateInterval, Teller, Watch, WatchedLog};
pub use error::{Left, VfioError};
pub use fake::{FakeDevice, FakeLog};
pub use iommu::{Iommu, IommuLog};
pub use passthrough::{DeviceLog, Passthrough, Region, Regions};
pub use quiesce::{Crew, Held, LastMile, Milestone, Plan, Rest, Step, Vcpus};
pub use state::{Features, MigState};
pub use stream::{Chunk, Loaded, Refused, Remaining, StateSink, StateStream, StopMark};
