//! From a spec to a guest.

use crate::{GuestError, GuestSpec, SourceGuest, TargetGuest, kvm, process, qemu};

/// Opens a guest that runs here, without touching it.
pub fn open_source(spec: &GuestSpec) -> Result<Box<dyn SourceGuest>, GuestError> {
    match spec {
        GuestSpec::Qemu { qmp } => Ok(Box::new(qemu::QemuSource::open(qmp)?)),
        GuestSpec::Kvm { name } => kvm::open_source(name),
        GuestSpec::Process { name } => process::open_source(name),
    }
}

/// Opens a VMM that waits for a guest.
pub fn open_target(spec: &GuestSpec) -> Result<Box<dyn TargetGuest>, GuestError> {
    match spec {
        GuestSpec::Qemu { qmp } => Ok(Box::new(qemu::QemuTarget::open(qmp)?)),
        GuestSpec::Kvm { name } => kvm::open_target(name),
        GuestSpec::Process { name } => process::open_target(name),
    }
}

/// Makes a source run again after its sender died before Commit: cancels a migration, lifts the throttle, resumes.
pub fn rescue(spec: &GuestSpec) -> Result<(), GuestError> {
    match spec {
        GuestSpec::Qemu { qmp } => qemu::rescue(qmp),
        GuestSpec::Kvm { name } => kvm::rescue(name),
        GuestSpec::Process { name } => process::rescue(name),
    }
}
