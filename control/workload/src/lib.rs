//! A workload knows, at every moment, what each of its pages must hold; it knows nothing about migration.
//!
//! ```text
//!   Plan ──► Writer ── store ──► PageMemory (a memfd, mlocked anonymous memory, a test's vector)
//!              │                     │
//!           Versions ◄── compare ── Verifier
//! ```
//!
//! A page is a header and a body, and both follow from its index, its version and the plan's seed. So a page that
//! a move lost, left behind or tore in half is told apart from the right one without a second copy of the memory.
//! The versions are the workload's registers: they must never lie in the memory that they judge, or a page lost
//! together with its version would pass.

mod device;
mod image;
mod memory;
mod pace;
mod plan;
mod random;
mod registers;
mod verify;
mod writer;

pub use device::{DevicePlan, DevicePlanError, DeviceRead, Dma, FakeDevice};
pub use image::{PAGE_BYTES, PageImage, WORDS_PER_PAGE};
pub use memory::{MappedPages, PageMemory, VecPages};
pub use pace::Pace;
pub use plan::{Pattern, Plan, PlanError, Rate};
pub use registers::{Registers, RegistersError};
pub use verify::{Fault, FaultKind, Report, Verifier};
pub use writer::Writer;
