//! A micro-VM on KVM that can be moved: it owns one guest, and moves no page itself.
//!
//! ```text
//!   GuestMemory (memfd) ◄── maps ── vmferry's lanes
//!     └─ Blank ── boot_linux │ boot_flat │ restore(State) ──► Machine ◄──pause / run──► RunningMachine
//!                                                               └─ save ──► State      └─ track ──► DirtyLog
//! ```
//!
//! It boots a Linux kernel with a serial console and an initramfs, and it is the worked example for authors of VMMs on the
//! rust-vmm crates: what a VMM has to bring to be moved by `vmferry-datapath` is a shared memory file, a [`State`], a log of
//! dirty pages (`KvmLog` or `KvmRings`, and the VMM's own writes) and the order in which they are used. `examples/`
//! moves a machine in one process.

pub mod boot;
pub mod bus;
mod clock;
mod cpuid;
mod error;
pub mod flat;
pub mod machine;
pub mod memory;
mod passthrough;
pub mod payload;
mod serial;
pub mod state;
mod vcpu;

pub use boot::LinuxBoot;
pub use bus::{Device, Place};
pub use cpuid::FeatureSet;
pub use error::KvmError;
pub use flat::Flat;
pub use machine::{Blank, Config, Machine, MachineLog, RunningMachine, Tracking};
pub use memory::GuestMemory;
pub use passthrough::PASSED_DEVICES_MAX;
pub use serial::{Console, Sink};
pub use state::{STATE_BYTES_MAX, State};
pub use vcpu::GuestEnd;
