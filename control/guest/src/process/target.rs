//! A process that waits for a workload.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use vmferry_datapath::{Access, ByteLen, GuestRam};

use super::client::WorkloadControl;
use super::device_stream::{self, FakeDeviceSink};
use super::state::state_bytes_max;
use super::wire::{Identity, Phase};
use crate::{Description, DeviceFacts, GuestError, TargetGuest};

pub(crate) struct ProcessTarget {
    control: WorkloadControl,
    identity: Identity,
    description: Description,
    devices: Vec<DeviceFacts>,
    ram: Arc<GuestRam>,
}

impl ProcessTarget {
    pub(crate) fn open(name: &str) -> Result<Self, GuestError> {
        let mut control = WorkloadControl::connect(name)?;
        let identity = control.identity()?;
        if identity.phase != Phase::Waiting {
            return Err(GuestError::mistake(format!(
                "workload '{name}' has work already: start the target with 'vmferry workload --incoming --name ...'"
            )));
        }
        let place = identity.place(name, true)?;
        let layout = place.description.layout.clone();
        let ram = Arc::new(GuestRam::map(layout, vec![place.file], Access::ReadWrite)?);
        let devices = device_stream::facts(&identity);
        Ok(Self { control, identity, description: place.description, devices, ram })
    }
}

impl TargetGuest for ProcessTarget {
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
        let workload = &self.description.name;
        let open = |device: &DeviceFacts| -> Result<Box<dyn Write + Send>, GuestError> {
            Ok(Box::new(FakeDeviceSink::open(workload, &device.name)?))
        };
        self.devices.iter().map(open).collect()
    }

    fn prepare(&mut self) -> Result<(), GuestError> {
        Ok(self.ram.discard_all()?)
    }

    fn load_state(&mut self, from: &mut dyn Read, _age: Duration) -> Result<ByteLen, GuestError> {
        let max = state_bytes_max(self.identity.pages);
        let mut bytes = Vec::new();
        from.take(max + 1).read_to_end(&mut bytes).map_err(GuestError::Relay)?;
        if bytes.len() as u64 > max {
            return Err(GuestError::mistake(format!(
                "the workload's state is longer than {max} bytes: start the target with the source's --ram"
            )));
        }
        self.control.load(&bytes)?;
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
