//! A QEMU that waits for a guest.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use vmferry_datapath::{ByteLen, GuestRam};

use crate::{Description, GuestError, TargetGuest};

/// A QEMU started with `-incoming defer`.
pub struct QemuTarget {
    description: Description,
    ram: Arc<GuestRam>,
}

fn absent() -> GuestError {
    GuestError::Bug("the QEMU adapter is not there yet".into())
}

impl QemuTarget {
    /// Connects to a QEMU that was started with `-incoming defer`.
    pub fn open(qmp: &Path) -> Result<QemuTarget, GuestError> {
        let _ = qmp;
        Err(absent())
    }
}

impl TargetGuest for QemuTarget {
    fn description(&self) -> &Description {
        &self.description
    }
    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }
    fn prepare(&mut self) -> Result<(), GuestError> {
        Err(absent())
    }
    fn load_state(&mut self, _: &mut dyn Read) -> Result<ByteLen, GuestError> {
        Err(absent())
    }
    fn run(&mut self) -> Result<(), GuestError> {
        Err(absent())
    }
    fn discard(&mut self) {}
}
