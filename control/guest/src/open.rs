//! From a spec to a guest.

use crate::failover::{DeviceOptions, FailoverOptions};
use crate::{GuestError, GuestSpec, SourceGuest, TargetGuest, kvm, process, qemu};

/// Opens a guest that runs here, without touching it. Primaries of failover pairs are unplugged when it is attached.
pub fn open_source(spec: &GuestSpec) -> Result<Box<dyn SourceGuest>, GuestError> {
    open_source_with(spec, FailoverOptions::default())
}

/// The same, with the operator's choices about devices that cannot migrate.
pub fn open_source_with(
    spec: &GuestSpec,
    failover: FailoverOptions,
) -> Result<Box<dyn SourceGuest>, GuestError> {
    match spec {
        GuestSpec::Qemu { qmp } => Ok(Box::new(qemu::QemuSource::open(qmp, failover)?)),
        GuestSpec::Kvm { .. } | GuestSpec::Process { .. } if !failover.standbys.is_empty() => {
            Err(only_qemu("--failover-standby"))
        }
        GuestSpec::Kvm { name } => kvm::open_source(name),
        GuestSpec::Process { name } => process::open_source(name),
    }
}

/// Opens a VMM that waits for a guest.
pub fn open_target(spec: &GuestSpec) -> Result<Box<dyn TargetGuest>, GuestError> {
    open_target_with(spec, &[])
}

/// The same, with this host's primaries for the guest's standbys.
pub fn open_target_with(
    spec: &GuestSpec,
    primaries: &[DeviceOptions],
) -> Result<Box<dyn TargetGuest>, GuestError> {
    match spec {
        GuestSpec::Qemu { qmp } => Ok(Box::new(qemu::QemuTarget::open(qmp, primaries)?)),
        GuestSpec::Kvm { .. } | GuestSpec::Process { .. } if !primaries.is_empty() => {
            Err(only_qemu("--failover-primary"))
        }
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

fn only_qemu(flag: &str) -> GuestError {
    GuestError::mistake(format!("{flag} is for qemu: guests; leave it out for this one"))
}
