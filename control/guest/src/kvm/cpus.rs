//! The micro-VM's virtual CPUs as a quiesce sees them: the machine, in whatever form it is right now.

use std::io;

use vmferry_kvm::{KvmError, Machine, RunningMachine};
use vmferry_vfio::{Vcpus, VfioError};

/// A machine on its way to rest, or back.
pub(super) enum Cpus {
    /// Its guest runs.
    Running(RunningMachine),
    /// A move paused it.
    Paused(Machine),
    /// Its owner stopped it: a move neither pauses it nor lets it run.
    Stopped(Machine),
    /// It did not survive a step.
    Lost(String),
}

impl Cpus {
    fn take(&mut self) -> Cpus {
        std::mem::replace(self, Cpus::Lost("a step was not finished".to_owned()))
    }

    fn keep(&mut self, step: Result<Cpus, KvmError>) -> Result<(), VfioError> {
        match step {
            Ok(cpus) => {
                *self = cpus;
                Ok(())
            }
            Err(error) => {
                *self = Cpus::Lost(error.to_string());
                Err(VfioError::Caller(Box::new(error)))
            }
        }
    }
}

impl Vcpus for Cpus {
    fn pause(&mut self) -> Result<(), VfioError> {
        let step = match self.take() {
            Cpus::Running(machine) => machine.pause().map(Cpus::Paused),
            still @ (Cpus::Paused(_) | Cpus::Stopped(_)) => Ok(still),
            Cpus::Lost(why) => return self.gone(why),
        };
        self.keep(step)
    }

    fn resume(&mut self) -> Result<(), VfioError> {
        let step = match self.take() {
            Cpus::Paused(machine) => machine.run().map(Cpus::Running),
            right @ (Cpus::Running(_) | Cpus::Stopped(_)) => Ok(right),
            Cpus::Lost(why) => return self.gone(why),
        };
        self.keep(step)
    }
}

impl Cpus {
    fn gone(&mut self, why: String) -> Result<(), VfioError> {
        let error = io::Error::other(format!("the guest is no more: {why}"));
        *self = Cpus::Lost(why);
        Err(VfioError::Caller(Box::new(error)))
    }
}
