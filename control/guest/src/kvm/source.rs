//! A micro-VM whose guest is to run elsewhere.

use std::io::Write;
use std::sync::Arc;

use vmferry_datapath::{Access, ByteLen, DirtyLog, GuestRam, PageSet};

use super::client::MicroVmControl;
use super::log::MicroVmLog;
use super::states;
use super::wire::{Identity, MicroVmPhase};
use crate::attach::{self, BlockPlace, Watch};
use crate::throttle::Throttle;
use crate::{Description, DeviceFacts, DeviceStream, GuestError, SourceGuest};

pub(super) struct KvmSource {
    name: String,
    control: MicroVmControl,
    identity: Identity,
    description: Description,
    block: BlockPlace,
    ram: Arc<GuestRam>,
    watch: Option<Watch>,
    pinned_by_devices: PageSet,
    throttle: Throttle,
}

impl KvmSource {
    pub(super) fn open(name: &str) -> Result<Self, GuestError> {
        let mut control = MicroVmControl::connect(name)?;
        let identity = control.identity()?;
        match identity.phase {
            MicroVmPhase::Running | MicroVmPhase::Stopped => {}
            MicroVmPhase::Waiting | MicroVmPhase::Loaded => {
                return Err(GuestError::mistake(format!(
                    "micro-VM '{name}' waits for a guest to come in: use it with 'vmferry receive'"
                )));
            }
            MicroVmPhase::Paused => {
                return Err(GuestError::mistake(format!(
                    "micro-VM '{name}' is being moved already, or its sender died: wait for it to run again"
                )));
            }
            MicroVmPhase::Ended => {
                return Err(GuestError::mistake(format!(
                    "micro-VM '{name}' has no guest any more: start another"
                )));
            }
        }
        let place = identity.place(name, false)?;
        let layout = place.description.layout.clone();
        let ram = Arc::new(GuestRam::map(layout, vec![place.file], Access::ReadOnly)?);
        let throttle = Throttle::of(identity.pid, identity.tasks.clone());
        let (description, block) = (place.description, place.block);
        let pinned_by_devices = PageSet::new(&description.layout);
        let (name, watch) = (name.to_owned(), None);
        Ok(Self { name, control, identity, description, block, ram, watch, pinned_by_devices, throttle })
    }
}

impl SourceGuest for KvmSource {
    fn description(&self) -> &Description {
        &self.description
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    fn devices(&self) -> &[DeviceFacts] {
        &self.identity.devices
    }

    fn device_streams(&mut self) -> Result<Vec<Box<dyn DeviceStream>>, GuestError> {
        self.control.pre_copy()?;
        states::leaving(&self.name, &self.identity.devices)
    }

    /// The micro-VM tracks itself; any other process that maps its memory is tracked from outside.
    fn attach(&mut self) -> Result<Box<dyn DirtyLog>, GuestError> {
        let layout = &self.description.layout;
        let mut own = Box::new(MicroVmLog::start(&self.name, layout, self.identity.tracking)?);
        self.pinned_by_devices = own.pinned()?;
        // Who tells what a device writes may have changed since this guest was looked at.
        self.identity.devices = self.control.identity()?.devices;
        let tracked = attach::track_beside(self.identity.pid, layout, &[self.block], own)?;
        self.description.notes.extend(tracked.watch.notes().iter().cloned());
        self.watch = Some(tracked.watch);
        Ok(tracked.log)
    }

    fn pinned(&self) -> PageSet {
        let mut pinned = self.pinned_by_devices.clone();
        self.watch.iter().for_each(|watch| pinned.union_with(watch.pinned()));
        pinned
    }

    fn direct_io_nodes(&self) -> &[String] {
        &[]
    }

    fn new_writers(&mut self) -> Result<Vec<String>, GuestError> {
        self.watch.as_mut().map_or_else(|| Ok(Vec::new()), Watch::new_writers)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        self.control.pause()?;
        if let Some(watch) = &mut self.watch {
            watch.look_ahead();
        }
        Ok(())
    }

    fn save_state(&mut self, into: &mut dyn Write) -> Result<ByteLen, GuestError> {
        let bytes = self.control.save()?;
        into.write_all(&bytes).map_err(GuestError::Relay)?;
        Ok(ByteLen(bytes.len() as u64))
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.control.resume()
    }

    fn set_throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.throttle.set(percent)
    }

    fn detach(&mut self) {
        self.watch = None;
        // A micro-VM that has ended has no device that pre-copies.
        let _ = self.control.end_pre_copy();
        // A micro-VM that has ended needs no throttle lifted.
        let _ = self.throttle.set(0);
    }

    fn retire(&mut self) -> Result<(), GuestError> {
        self.control.quit()
    }
}
