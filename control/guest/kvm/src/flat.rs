//! A machine with the flat payload in it, whose writes its owner commands: the smallest guest that can be moved.

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::payload::{Commander, FLAT_PORTS, FLAT_PORTS_LEN, Writes};
use crate::{Blank, Config, KvmError, Machine, Place, RunningMachine, State};

/// The payload writes some hundred pages a second on the slowest machine that it was tried on.
const TIMEOUT: Duration = Duration::from_secs(20);
const PAGE: u32 = 4096;

/// A machine, running or not, and the way to command its guest.
pub struct Flat<M> {
    /// The machine.
    pub machine: M,
    /// Tells its guest what to write.
    pub commander: Commander,
}

fn command(blank: &Blank) -> Result<Commander, KvmError> {
    let commander = Commander::default();
    blank.attach(Place::ports(FLAT_PORTS, FLAT_PORTS_LEN), Arc::new(Mutex::new(commander.clone())))?;
    Ok(commander)
}

impl Flat<Machine> {
    /// Puts the payload into a machine.
    pub fn boot(config: Config) -> Result<Flat<Machine>, KvmError> {
        let blank = Blank::new(config)?;
        let commander = command(&blank)?;
        Ok(Flat { machine: blank.boot_flat()?, commander })
    }

    /// Goes on with a payload that ran elsewhere, and was saved `age` ago.
    pub fn restore(config: Config, state: &State, age: Duration) -> Result<Flat<Machine>, KvmError> {
        let blank = Blank::new(config)?;
        let commander = command(&blank)?;
        Ok(Flat { machine: Machine::restore(blank, state, age)?, commander })
    }

    /// Lets it run.
    pub fn run(self) -> Result<Flat<RunningMachine>, KvmError> {
        Ok(Flat { machine: self.machine.run()?, commander: self.commander })
    }

    /// How often the guest wrote a page, by the page itself.
    pub fn count(&self, page: u32) -> Result<u32, KvmError> {
        let mut word = [0; 4];
        let at = u64::from(page) * u64::from(PAGE);
        self.machine
            .memory()
            .file()
            .read_exact_at(&mut word, at)
            .map_err(KvmError::refused("read the guest's memory"))?;
        Ok(u32::from_le_bytes(word))
    }
}

impl Flat<RunningMachine> {
    /// Lets the guest write these pages, one order each, and waits until it did.
    pub fn write(&self, pages: &[u32]) -> Result<(), KvmError> {
        for page in pages {
            self.commander.order(Writes { address: page * PAGE, count: 1, stride: PAGE });
        }
        self.wait()
    }

    /// Lets it write `count` pages from `first` on, in one order.
    pub fn write_run(&self, first: u32, count: u32) -> Result<(), KvmError> {
        self.commander.order(Writes { address: first * PAGE, count, stride: PAGE });
        self.wait()
    }

    fn wait(&self) -> Result<(), KvmError> {
        if self.commander.wait_done(TIMEOUT) {
            return Ok(());
        }
        Err(KvmError::GuestCrashed(format!(
            "the flat guest does not do what it is told: {:?}",
            self.machine.ended()
        )))
    }

    /// Stops it.
    pub fn pause(self) -> Result<Flat<Machine>, KvmError> {
        Ok(Flat { machine: self.machine.pause()?, commander: self.commander })
    }
}
