//! The embedded guest: a workload process over a memfd, which needs neither KVM nor QEMU.
//!
//! ```text
//!   vmferry workload --name a             vmferry send --guest process:a
//!     crew: writer threads ──► memfd ◄─── mapped, tracked from outside like a QEMU's RAM
//!     server ◄──── control socket ─────── pause, save, resume, quit
//! ```
//!
//! Its registers (the version of every page) are its own state, so after a move it proves by itself that no page
//! is stale, torn or lost. With `--device` it has fake devices, whose states move as those of passed-through devices
//! do. What must never happen: a page written while the workload says that it is paused.

mod args;
mod client;
mod crew;
mod device_stream;
mod devices;
mod machine;
mod server;
mod source;
mod state;
mod target;
mod wire;

use std::path::PathBuf;

pub use args::WorkloadArgs;
pub use client::WorkloadControl;
pub use server::run;
pub use wire::{DeviceStatus, Phase, WorkloadStatus};

use crate::inspect::{InspectedDevice, Inspection, by_process};
use crate::{GuestError, SourceGuest, TargetGuest, control};

/// Opens a workload that runs here.
pub(crate) fn open_source(name: &str) -> Result<Box<dyn SourceGuest>, GuestError> {
    Ok(Box::new(source::ProcessSource::open(name)?))
}

/// Opens a workload that waits for its memory.
pub(crate) fn open_target(name: &str) -> Result<Box<dyn TargetGuest>, GuestError> {
    Ok(Box::new(target::ProcessTarget::open(name)?))
}

/// Looks at a workload without touching it.
pub(crate) fn inspect(name: &str) -> Result<Inspection, GuestError> {
    let identity = WorkloadControl::connect(name)?.identity()?;
    let mut seen = by_process(identity.pid)?;
    seen.name = format!("{name}, {}", seen.name);
    seen.status = Some(format!("{:?}", identity.phase).to_lowercase());
    seen.devices = device_stream::facts(&identity).into_iter().map(InspectedDevice::from).collect();
    Ok(seen)
}

/// Makes a workload run again after its sender died.
pub(crate) fn rescue(name: &str) -> Result<(), GuestError> {
    let mut control = WorkloadControl::connect(name)?;
    control.throttle(0)?;
    control.resume()
}

/// Where the workload `name` listens: `$XDG_RUNTIME_DIR` or `/tmp`, then `vmferry-UID/NAME.sock`.
pub fn socket_path(name: &str) -> Result<PathBuf, GuestError> {
    control::socket_path("workload", name, "sock")
}
