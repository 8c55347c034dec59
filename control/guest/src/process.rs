//! The embedded guest: a workload process over a memfd, which needs neither KVM nor QEMU.

use crate::{GuestError, SourceGuest, TargetGuest};

/// Opens a workload that runs here.
pub(crate) fn open_source(name: &str) -> Result<Box<dyn SourceGuest>, GuestError> {
    Err(GuestError::Bug(format!("no process guest yet: {name}")))
}

/// Opens a workload that waits for its memory.
pub(crate) fn open_target(name: &str) -> Result<Box<dyn TargetGuest>, GuestError> {
    Err(GuestError::Bug(format!("no process guest yet: {name}")))
}

/// Makes a workload run again after its sender died.
pub(crate) fn rescue(name: &str) -> Result<(), GuestError> {
    Err(GuestError::Bug(format!("no process guest yet: {name}")))
}
