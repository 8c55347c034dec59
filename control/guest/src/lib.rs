//! Adapters to guests: they pause, save, load and resume a guest, and say who writes its memory; they move no page.
//!
//! ```text
//!   session driver ──► SourceGuest / TargetGuest ──┬─ qemu: QMP, any running and unmodified QEMU
//!                            │                     ├─ kvm: our micro-VM, which tracks itself
//!                            │                     └─ process: the embedded workload
//!                            └─ attach: dirty tracking from outside, for both
//! ```

pub mod attach;
mod clock;
mod control;
mod device;
mod error;
pub mod failover;
mod guest;
pub mod inspect;
pub mod kvm;
mod open;
pub mod process;
pub mod qemu;
mod spec;
mod throttle;

pub use device::{DeviceFacts, DeviceMigration, DeviceStream, DmaTracking, StateEstimate, StateRead};
pub use error::{Blame, GuestError};
pub use guest::{Description, SourceGuest, TargetGuest};
pub use open::{open_source, open_source_with, open_target, open_target_with, rescue};
pub use spec::GuestSpec;
