//! The hands that a plan needs: devices, vCPUs, and what happens to memory in between.

use crate::VfioError;
use crate::device::{DataFile, MigratableDevice, Migration};
use crate::error::Left;
use crate::quiesce::{Ability, Hands, Plan, Step};
use crate::state::{Features, MigState};
use crate::stream::{Remaining, StateStream, StopMark};

/// What pauses the vCPUs and lets them run.
pub trait Vcpus {
    /// They stand still when this returns. After a failure they may run, stand still, or both.
    fn pause(&mut self) -> Result<(), VfioError>;
    /// They run again, also those that never stood still.
    fn resume(&mut self) -> Result<(), VfioError>;
}

/// What happens to memory and device states once nobody writes.
pub trait LastMile {
    /// The logs are read for the last time, and what is pinned is added. Undone by giving the bits back.
    fn collect_dma(&mut self) -> Result<(), VfioError>;
    /// What was collected is dirty again: it did not leave.
    fn give_back_dma(&mut self) -> Result<(), VfioError>;
    /// The last pages leave.
    fn last_memory(&mut self) -> Result<(), VfioError>;
    /// A device's state leaves: read to its end.
    fn save(&mut self, stream: StateStream) -> Result<(), VfioError>;
}

/// A device that works, or is on its way to rest.
pub struct Held {
    device: Box<dyn MigratableDevice>,
    features: Features,
    /// A device that pre-copies has a stream that someone reads; this tells it of the stop.
    pre_copying: Option<StopMark>,
}

impl Held {
    /// Takes a device that works; refuses one that cannot be moved.
    pub fn new(device: Box<dyn MigratableDevice>) -> Result<Held, VfioError> {
        match device.migration() {
            Migration::V2(features) => {
                let features = *features;
                Ok(Held { device, features, pre_copying: None })
            }
            Migration::NotMigratable(why) => {
                Err(VfioError::NotMigratable { device: device.name().to_owned(), why: why.clone() })
            }
        }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> &dyn MigratableDevice {
        self.device.as_ref()
    }

    /// What it can do.
    #[must_use]
    pub fn features(&self) -> Features {
        self.features
    }

    /// For the plan.
    #[must_use]
    pub fn ability(&self) -> Ability {
        Ability { name: self.device.name().to_owned(), features: self.features }
    }

    /// Its state starts to leave while it works; `None` when it cannot, and leaves after the stop.
    pub fn pre_copy(&mut self) -> Result<Option<StateStream>, VfioError> {
        if !self.features.pre_copy {
            return Ok(None);
        }
        let file = self.device.set_state(MigState::PreCopy)?;
        let (stream, mark) = StateStream::pre_copying(self.device.name(), expect_file(file)?);
        self.pre_copying = Some(mark);
        Ok(Some(stream))
    }

    /// What a stop right now would still move; pre-copy's part is known to the stream.
    pub fn remaining(&self, stream: Option<&mut StateStream>) -> Result<Remaining, VfioError> {
        let precopy_bytes = stream.map_or(Ok(0), StateStream::precopy_bytes)?;
        Ok(Remaining { stop_copy_bytes: self.device.stop_copy_bytes()?, precopy_bytes })
    }

    /// It starts no DMA to its peers any more.
    pub fn to_p2p(&mut self) -> Result<(), VfioError> {
        let to = if self.pre_copying.is_some() { MigState::PreCopyP2p } else { MigState::RunningP2p };
        self.device.set_state(to).map(drop)
    }

    /// It stands still. One that pre-copies goes on to be read through the same stream, which hears of it.
    pub fn stop(&mut self) -> Result<(), VfioError> {
        match &self.pre_copying {
            Some(mark) => {
                self.device.set_state(MigState::StopCopy)?;
                mark.set();
            }
            None => drop(self.device.set_state(MigState::Stop)?),
        }
        Ok(())
    }

    /// Its state, now that it stands still; `None` when the stream of its pre-copy has it.
    pub fn save(&mut self) -> Result<Option<StateStream>, VfioError> {
        if self.pre_copying.is_some() {
            return Ok(None);
        }
        let file = self.device.set_state(MigState::StopCopy)?;
        Ok(Some(StateStream::stopped(self.device.name(), expect_file(file)?)))
    }

    /// It works again, wherever it was left; streams of it end with an error. A device that is in ERROR, or does not
    /// go back, is reset: then it works, but lost what it held, and that is the error.
    pub fn let_run(&mut self) -> Result<(), VfioError> {
        self.go_back(MigState::Running)
    }

    /// It works again, but starts no DMA to its peers: the vCPUs still stand.
    fn let_run_without_p2p(&mut self) -> Result<(), VfioError> {
        self.go_back(if self.features.p2p { MigState::RunningP2p } else { MigState::Running })
    }

    fn go_back(&mut self, to: MigState) -> Result<(), VfioError> {
        self.pre_copying = None;
        let from = self.device.state()?;
        let refused = match from {
            MigState::Error => None,
            MigState::Stop
            | MigState::Running
            | MigState::StopCopy
            | MigState::Resuming
            | MigState::RunningP2p
            | MigState::PreCopy
            | MigState::PreCopyP2p => match self.device.set_state(to) {
                Ok(_) => return Ok(()),
                Err(error) => Some(error),
            },
        };
        self.device.reset()?;
        Err(refused.unwrap_or_else(|| VfioError::StateRefused {
            device: self.device.name().to_owned(),
            from,
            to,
            left: Left::In(MigState::Running),
            source: std::io::Error::other("it was in ERROR and had to be reset: it lost what it held"),
        }))
    }
}

fn expect_file(file: Option<Box<dyn DataFile>>) -> Result<Box<dyn DataFile>, VfioError> {
    file.ok_or_else(|| VfioError::Bug("a device went to a state with data and gave no file".into()))
}

/// Devices, vCPUs and memory, as hands for a plan.
pub struct Crew<'a> {
    /// The devices, in the plan's order.
    pub devices: &'a mut [Held],
    /// The vCPUs.
    pub vcpus: &'a mut dyn Vcpus,
    /// Memory and states.
    pub last_mile: &'a mut dyn LastMile,
}

impl Crew<'_> {
    /// The plan for these devices.
    #[must_use]
    pub fn plan(&self) -> Plan {
        Plan::of(self.devices.iter().map(Held::ability).collect())
    }

    fn device(&mut self, at: usize) -> Result<&mut Held, VfioError> {
        self.devices.get_mut(at).ok_or_else(|| VfioError::Bug(format!("the plan names a device {at}")))
    }
}

impl Hands for Crew<'_> {
    fn take(&mut self, step: Step) -> Result<(), VfioError> {
        match step {
            Step::ToP2p(at) => self.device(at)?.to_p2p(),
            Step::PauseVcpus => self.vcpus.pause(),
            Step::Stop(at) => self.device(at)?.stop(),
            Step::CollectDma => self.last_mile.collect_dma(),
            Step::LastMemory => self.last_mile.last_memory(),
            Step::SaveState(at) => match self.device(at)?.save()? {
                Some(stream) => self.last_mile.save(stream),
                None => Ok(()),
            },
        }
    }

    fn undo(&mut self, step: Step) -> Result<(), VfioError> {
        match step {
            Step::ToP2p(at) => self.device(at)?.let_run(),
            Step::PauseVcpus => self.vcpus.resume(),
            Step::Stop(at) => self.device(at)?.let_run_without_p2p(),
            Step::CollectDma => self.last_mile.give_back_dma(),
            // What left is gone, and harms nobody; a device whose state was read is let run by the undoing of its stop.
            Step::LastMemory | Step::SaveState(_) => Ok(()),
        }
    }
}
