//! A micro-VM that waits for a guest.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use vmferry_datapath::{Access, ByteLen, GuestRam};

use super::client::MicroVmControl;
use super::microvm::SAVED_BYTES_MAX;
use super::states;
use super::wire::MicroVmPhase;
use crate::{Description, DeviceFacts, GuestError, TargetGuest};

pub(super) struct KvmTarget {
    control: MicroVmControl,
    description: Description,
    ram: Arc<GuestRam>,
    devices: Vec<DeviceFacts>,
}

impl KvmTarget {
    pub(super) fn open(name: &str) -> Result<Self, GuestError> {
        let mut control = MicroVmControl::connect(name)?;
        let identity = control.identity()?;
        if identity.phase != MicroVmPhase::Waiting {
            return Err(GuestError::mistake(format!(
                "micro-VM '{name}' has a guest already: start the target with 'vmferry microvm --incoming --name ...'"
            )));
        }
        let place = identity.place(name, true)?;
        let layout = place.description.layout.clone();
        let ram = Arc::new(GuestRam::map(layout, vec![place.file], Access::ReadWrite)?);
        Ok(Self { control, description: place.description, ram, devices: identity.devices })
    }
}

impl TargetGuest for KvmTarget {
    fn description(&self) -> &Description {
        &self.description
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    fn devices(&self) -> &[DeviceFacts] {
        &self.devices
    }

    fn device_sinks(&mut self) -> Result<Vec<Box<dyn Write + Send>>, GuestError> {
        states::arriving(&self.description.name, &self.devices)
    }

    fn prepare(&mut self) -> Result<(), GuestError> {
        // Devices that a receiver which died left waiting for their states begin anew.
        self.control.discard()?;
        Ok(self.ram.discard_all()?)
    }

    fn load_state(&mut self, from: &mut dyn Read, age: Duration) -> Result<ByteLen, GuestError> {
        let mut bytes = Vec::new();
        from.take(SAVED_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(GuestError::Relay)?;
        if bytes.len() as u64 > SAVED_BYTES_MAX {
            return Err(GuestError::misbehaved(format!(
                "the micro-VM's state is longer than the {SAVED_BYTES_MAX} bytes that one can have: it is damaged"
            )));
        }
        self.control.load(&bytes, age)?;
        Ok(ByteLen(bytes.len() as u64))
    }

    fn run(&mut self) -> Result<(), GuestError> {
        self.control.run()
    }

    fn settle(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn discard(&mut self) {
        // The process waits again with what it was sent still in its memory: `prepare` clears it.
        let _ = self.control.discard();
    }
}
