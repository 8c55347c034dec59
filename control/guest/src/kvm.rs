//! The micro-VM: a guest on KVM in a process of ours, which saves, restores and tracks itself.
//!
//! ```text
//!   vmferry microvm --name a                    vmferry send --guest kvm:a
//!     vCPU threads ──► memfd ◄─────────────────── mapped
//!     server ◄──── control socket ─────────────── pause, save, resume, quit
//!     dirty log ◄── a connection of its own ───── harvest: the set as raw words
//!     devices ◄──── a connection a device ─────── its state, read and written
//! ```
//!
//! KVM answers only the process that made the VM, so the micro-VM harvests its own log on request. The log belongs to
//! the connection that asked for it: when the sender dies, even by `kill -9`, the connection ends and the tracking with
//! it. What must never happen: a guest that runs while the micro-VM says that it is paused.

mod args;
mod client;
mod cpus;
mod devices;
mod lines;
mod log;
mod microvm;
mod server;
mod source;
mod states;
mod target;
mod wire;

use std::path::PathBuf;

pub use args::{MicroVmArgs, PassedDevice, Route, TrackingWord};
pub use client::MicroVmControl;
pub use server::run;
pub use wire::{MicroVmPhase, MicroVmStatus};

use crate::inspect::{InspectedDevice, Inspection, Tracker, by_process};
use crate::throttle::Throttle;
use crate::{GuestError, SourceGuest, TargetGuest, control};

/// The longest piece of a device's state in one answer.
const DEVICE_CHUNK_MAX: u64 = 1 << 20;

/// Opens a micro-VM that runs here.
pub(crate) fn open_source(name: &str) -> Result<Box<dyn SourceGuest>, GuestError> {
    Ok(Box::new(source::KvmSource::open(name)?))
}

/// Opens a micro-VM that waits for a guest.
pub(crate) fn open_target(name: &str) -> Result<Box<dyn TargetGuest>, GuestError> {
    Ok(Box::new(target::KvmTarget::open(name)?))
}

/// Makes a micro-VM's guest run again after its sender died.
pub(crate) fn rescue(name: &str) -> Result<(), GuestError> {
    let mut control = MicroVmControl::connect(name)?;
    let identity = control.identity()?;
    let lifted = Throttle::of(identity.pid, identity.tasks).rescue();
    control.resume().and(lifted)
}

/// Looks at a micro-VM without touching it.
pub(crate) fn inspect(name: &str) -> Result<Inspection, GuestError> {
    let identity = MicroVmControl::connect(name)?.identity()?;
    let mut seen = by_process(identity.pid)?;
    seen.name = format!("{name}, {}", seen.name);
    seen.status = Some(format!("{:?}", identity.phase).to_lowercase());
    // It tracks itself; the other ways are for other processes that write its memory.
    let log = identity.tracking.name();
    seen.trackers.insert(0, Tracker { name: log, unavailable: None });
    let own = seen.writers.iter_mut().filter(|writer| writer.pid == identity.pid);
    own.for_each(|writer| writer.tracked = format!("by its own log, {log}"));
    seen.devices = identity.devices.into_iter().map(InspectedDevice::from).collect();
    Ok(seen)
}

/// Where the micro-VM `name` listens: beside the workloads' sockets, as `NAME.kvm`.
pub fn socket_path(name: &str) -> Result<PathBuf, GuestError> {
    control::socket_path("micro-VM", name, "kvm")
}

impl From<vmferry_kvm::KvmError> for GuestError {
    fn from(error: vmferry_kvm::KvmError) -> GuestError {
        use vmferry_kvm::KvmError;
        let sentence = error.to_string();
        match error {
            KvmError::UserMistake(_) => GuestError::UserMistake(sentence),
            KvmError::HostRefused { what, source } => GuestError::HostRefused {
                what: format!(
                    "this host refused to {what}; look whether /dev/kvm may be opened by this user"
                ),
                source,
            },
            KvmError::StateRefused(_) | KvmError::Tracking(_) | KvmError::GuestCrashed(_) => {
                GuestError::GuestMisbehaved(sentence)
            }
        }
    }
}
