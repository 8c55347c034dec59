//! A workload that is to run elsewhere.

use std::io::Write;
use std::sync::Arc;

use vmferry_datapath::{Access, ByteLen, DirtyLog, GuestRam, PageSet};

use super::client::WorkloadControl;
use super::device_stream::{self, FakeDeviceStream};
use super::wire::{Identity, Phase};
use crate::attach::{self, BlockPlace, Watch};
use crate::{Description, DeviceFacts, DeviceStream, GuestError, SourceGuest};

pub(crate) struct ProcessSource {
    control: WorkloadControl,
    identity: Identity,
    description: Description,
    devices: Vec<DeviceFacts>,
    block: BlockPlace,
    ram: Arc<GuestRam>,
    watch: Option<Watch>,
}

impl ProcessSource {
    pub(crate) fn open(name: &str) -> Result<Self, GuestError> {
        let mut control = WorkloadControl::connect(name)?;
        let identity = control.identity()?;
        match identity.phase {
            Phase::Running | Phase::Stopped => {}
            Phase::Waiting | Phase::Loaded => {
                return Err(GuestError::mistake(format!(
                    "workload '{name}' waits for a workload to come in: use it with 'vmferry receive'"
                )));
            }
            Phase::Paused => {
                return Err(GuestError::mistake(format!(
                    "workload '{name}' is being moved already, or its sender died: wait for it to run again"
                )));
            }
        }
        let place = identity.place(name, false)?;
        let layout = place.description.layout.clone();
        let ram = Arc::new(GuestRam::map(layout, vec![place.file], Access::ReadOnly)?);
        let devices = device_stream::facts(&identity);
        let (description, block) = (place.description, place.block);
        Ok(Self { control, identity, description, devices, block, ram, watch: None })
    }
}

impl SourceGuest for ProcessSource {
    fn description(&self) -> &Description {
        &self.description
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    fn devices(&self) -> &[DeviceFacts] {
        &self.devices
    }

    fn device_streams(&mut self) -> Result<Vec<Box<dyn DeviceStream>>, GuestError> {
        let workload = &self.description.name;
        let open = |device: &DeviceFacts| -> Result<Box<dyn DeviceStream>, GuestError> {
            Ok(Box::new(FakeDeviceStream::open(workload, &device.name)?))
        };
        self.devices.iter().map(open).collect()
    }

    fn attach(&mut self) -> Result<Box<dyn DirtyLog>, GuestError> {
        let tracked = attach::track(self.identity.pid, &self.description.layout, &[self.block])?;
        self.description.notes.extend(tracked.watch.notes().iter().cloned());
        self.watch = Some(tracked.watch);
        Ok(tracked.log)
    }

    fn pinned(&self) -> PageSet {
        let mut pinned = self
            .watch
            .as_ref()
            .map_or_else(|| PageSet::new(&self.description.layout), |watch| watch.pinned().clone());
        device_stream::add_pinned(&self.identity, &mut pinned);
        pinned
    }

    fn direct_io_nodes(&self) -> &[String] {
        &[]
    }

    fn new_writers(&mut self) -> Result<Vec<String>, GuestError> {
        self.watch.as_mut().map_or_else(|| Ok(Vec::new()), Watch::new_writers)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.control.pause()
    }

    fn save_state(&mut self, into: &mut dyn Write) -> Result<ByteLen, GuestError> {
        let bytes = self.control.save(self.identity.pages)?;
        into.write_all(&bytes).map_err(GuestError::Relay)?;
        Ok(ByteLen(bytes.len() as u64))
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.control.resume()
    }

    fn set_throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.control.throttle(percent)
    }

    fn detach(&mut self) {
        self.watch = None;
        // A workload that has ended needs no throttle lifted.
        let _ = self.control.throttle(0);
    }

    fn retire(&mut self) -> Result<(), GuestError> {
        self.control.quit()
    }
}
