//! A QEMU guest that runs here.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use vmferry_datapath::{ByteLen, DirtyLog, GuestRam, PageSet};

use crate::{Description, GuestError, SourceGuest};

/// A running QEMU guest.
pub struct QemuSource {
    description: Description,
    ram: Arc<GuestRam>,
}

fn absent() -> GuestError {
    GuestError::Bug("the QEMU adapter is not there yet".into())
}

impl QemuSource {
    /// Connects to QEMU and looks at the guest, without touching it.
    pub fn open(qmp: &Path) -> Result<QemuSource, GuestError> {
        let _ = qmp;
        Err(absent())
    }
}

impl SourceGuest for QemuSource {
    fn description(&self) -> &Description {
        &self.description
    }
    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }
    fn attach(&mut self) -> Result<Box<dyn DirtyLog>, GuestError> {
        Err(absent())
    }
    fn pinned(&self) -> PageSet {
        PageSet::new(self.ram.layout())
    }
    fn direct_io_nodes(&self) -> &[String] {
        &[]
    }
    fn new_writers(&mut self) -> Result<Vec<String>, GuestError> {
        Err(absent())
    }
    fn pause(&mut self) -> Result<(), GuestError> {
        Err(absent())
    }
    fn save_state(&mut self, _: &mut dyn Write) -> Result<ByteLen, GuestError> {
        Err(absent())
    }
    fn resume(&mut self) -> Result<(), GuestError> {
        Err(absent())
    }
    fn set_throttle(&mut self, _: u8) -> Result<(), GuestError> {
        Err(absent())
    }
    fn detach(&mut self) {}
    fn retire(&mut self) -> Result<(), GuestError> {
        Err(absent())
    }
}

/// Makes a guest run again after its sender died before Commit.
pub fn rescue(qmp: &Path) -> Result<(), GuestError> {
    let _ = qmp;
    Err(absent())
}
