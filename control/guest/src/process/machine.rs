//! What the workload process may do next: each state owns the writers it has, and no command works in a state that
//! it is not meant for.

use std::fs::File;

use rustix::fs::{MemfdFlags, memfd_create};
use vmferry_workload::{DevicePlan, PAGE_BYTES, Plan};

use super::crew::{Crew, Tally, now};
use super::devices::Devices;
use super::state;
use super::wire::{Phase, Reply, WorkloadStatus};
use crate::GuestError;

enum State {
    Waiting,
    Running(Crew),
    Paused(Crew),
    Stopped(Crew),
    Loaded { crew: Crew, stopped: bool },
}

/// The workload of this process and the memory that it lives in.
pub(crate) struct Machine {
    memory: File,
    pages: u64,
    state: State,
    devices: Devices,
    running_since_ns: u64,
    stopped_at_ns: u64,
}

impl Machine {
    /// A machine with `pages` pages of zero memory that waits for a workload, its devices standing still.
    pub(crate) fn waiting(pages: u64, devices: &[DevicePlan]) -> Result<Self, GuestError> {
        let what = "the kernel gives no memory file for the workload";
        let memory =
            memfd_create("vmferry-workload", MemfdFlags::CLOEXEC).map_err(GuestError::refused(what))?;
        let memory = File::from(memory);
        memory.set_len(pages.saturating_mul(PAGE_BYTES as u64)).map_err(GuestError::refused(what))?;
        let devices = Devices::new(&memory, pages, devices)?;
        Ok(Self { memory, pages, state: State::Waiting, devices, running_since_ns: 0, stopped_at_ns: 0 })
    }

    /// A machine whose workload and devices run.
    pub(crate) fn running(pages: u64, plans: Vec<Plan>, devices: &[DevicePlan]) -> Result<Self, GuestError> {
        let mut machine = Self::waiting(pages, devices)?;
        let crew = Crew::fresh(&machine.memory, plans)
            .map_err(GuestError::refused("the workload cannot map its memory: give it a smaller --ram"))?;
        machine.run(crew);
        Ok(machine)
    }

    pub(crate) fn memory(&self) -> &File {
        &self.memory
    }

    pub(crate) fn devices(&mut self) -> &mut Devices {
        &mut self.devices
    }

    pub(crate) fn device_plans(&self) -> Vec<DevicePlan> {
        self.devices.plans()
    }

    pub(crate) fn pages(&self) -> u64 {
        self.pages
    }

    pub(crate) fn phase(&self) -> Phase {
        match self.state {
            State::Waiting => Phase::Waiting,
            State::Running(_) => Phase::Running,
            State::Paused(_) => Phase::Paused,
            State::Stopped(_) => Phase::Stopped,
            State::Loaded { .. } => Phase::Loaded,
        }
    }

    /// A move pauses; what the owner stopped stays as it is.
    pub(crate) fn pause(&mut self) -> Reply {
        let state = self.take();
        if let State::Running(crew) = state {
            let halted = self.halt(&crew);
            self.state = State::Paused(crew);
            return halted;
        }
        self.keep(state, &[Phase::Paused, Phase::Stopped], "pause")
    }

    pub(crate) fn resume(&mut self) -> Reply {
        let state = self.take();
        if let State::Paused(crew) = state {
            return self.run(crew);
        }
        self.keep(state, &[Phase::Running, Phase::Stopped], "resume")
    }

    pub(crate) fn stop(&mut self) -> Reply {
        let state = self.take();
        if let State::Running(crew) = state {
            let halted = self.halt(&crew);
            self.state = State::Stopped(crew);
            return halted;
        }
        self.keep(state, &[Phase::Stopped], "stop")
    }

    pub(crate) fn start(&mut self) -> Reply {
        let state = self.take();
        if let State::Stopped(crew) = state {
            return self.run(crew);
        }
        self.keep(state, &[Phase::Running], "start")
    }

    /// The registers of a workload that stands still.
    pub(crate) fn save(&self) -> Result<Vec<u8>, Reply> {
        match &self.state {
            State::Paused(crew) => Ok(state::join(&crew.registers(), false)),
            State::Stopped(crew) => Ok(state::join(&crew.registers(), true)),
            State::Waiting | State::Running(_) | State::Loaded { .. } => Err(self.refuse("save")),
        }
    }

    pub(crate) fn load(&mut self, bytes: &[u8]) -> Reply {
        if self.phase() != Phase::Waiting {
            return self.refuse("load");
        }
        let (registers, stopped) = match state::split(bytes, self.pages) {
            Ok(split) => split,
            Err(why) => return Reply::Refused(why),
        };
        match Crew::resume(&self.memory, registers) {
            Ok(crew) => {
                self.state = State::Loaded { crew, stopped };
                Reply::Done
            }
            Err(error) => Reply::Refused(format!("the workload cannot map its memory: {error}")),
        }
    }

    pub(crate) fn run_loaded(&mut self) -> Reply {
        let state = self.take();
        if let State::Loaded { crew, stopped } = state {
            if stopped {
                self.state = State::Stopped(crew);
                return Reply::Done;
            }
            return self.run(crew);
        }
        self.keep(state, &[Phase::Running, Phase::Stopped], "run")
    }

    pub(crate) fn discard(&mut self) -> Reply {
        self.devices.forget();
        let state = self.take();
        if matches!(state, State::Loaded { .. }) {
            return Reply::Done;
        }
        self.keep(state, &[Phase::Waiting], "discard")
    }

    pub(crate) fn throttle(&self, percent: u8) -> Reply {
        if let Some(crew) = self.crew() {
            crew.throttle(percent);
        }
        Reply::Done
    }

    pub(crate) fn set(&self, key: &str, value: &str) -> Reply {
        let Some(crew) = self.crew() else { return self.refuse("set") };
        crew.set(key, value).map_or_else(Reply::Refused, |()| Reply::Done)
    }

    pub(crate) fn verify(&self) -> Reply {
        self.crew().map_or_else(|| self.refuse("verify"), |crew| Reply::Verified(crew.verify()))
    }

    pub(crate) fn status(&self) -> WorkloadStatus {
        let Tally { plans, writes, verified, wrong } = self.crew().map(Crew::tally).unwrap_or_default();
        let (running_since_ns, stopped_at_ns) = (self.running_since_ns, self.stopped_at_ns);
        WorkloadStatus {
            phase: self.phase(),
            plans,
            writes,
            verified,
            wrong,
            running_since_ns,
            stopped_at_ns,
            devices: self.devices.status(),
        }
    }

    fn crew(&self) -> Option<&Crew> {
        match &self.state {
            State::Running(crew)
            | State::Paused(crew)
            | State::Stopped(crew)
            | State::Loaded { crew, .. } => Some(crew),
            State::Waiting => None,
        }
    }

    fn take(&mut self) -> State {
        std::mem::replace(&mut self.state, State::Waiting)
    }

    fn run(&mut self, crew: Crew) -> Reply {
        crew.go();
        self.devices.run();
        self.running_since_ns = now_ns();
        self.state = State::Running(crew);
        Reply::Done
    }

    fn halt(&mut self, crew: &Crew) -> Reply {
        crew.halt();
        let halted = self.devices.halt();
        self.stopped_at_ns = now_ns();
        let refused = |error| Reply::Refused(format!("a device cannot write its memory: {error}"));
        halted.map_or_else(refused, |()| Reply::Done)
    }

    /// Nothing to do in the phases `done`, a refusal in all others.
    fn keep(&mut self, state: State, done: &[Phase], command: &str) -> Reply {
        self.state = state;
        if done.contains(&self.phase()) { Reply::Done } else { self.refuse(command) }
    }

    fn refuse(&self, command: &str) -> Reply {
        Reply::Refused(format!("a workload that is {:?} cannot {command}", self.phase()).to_lowercase())
    }
}

fn now_ns() -> u64 {
    u64::try_from(now().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn running() -> Machine {
        let plan: Plan = "pages=256,set=64,rate=max".parse().unwrap();
        Machine::running(256, plan.shared_among(2).unwrap(), &[]).unwrap()
    }

    #[test]
    fn nothing_is_written_after_a_pause() {
        let mut machine = running();
        while machine.status().writes < 1000 {}
        assert_eq!(machine.pause(), Reply::Done);
        let saved = machine.save().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(machine.save().unwrap(), saved);
        assert!(
            matches!(machine.verify(), Reply::Verified(report) if report.is_clean() && report.pages == 256)
        );
        assert_eq!(machine.resume(), Reply::Done);
        let writes = machine.status().writes;
        while machine.status().writes == writes {}
    }

    #[test]
    fn a_loaded_workload_goes_on_only_when_told_and_proves_its_memory() {
        let mut source = running();
        while source.status().writes < 1000 {}
        source.pause();
        let mut target = Machine::waiting(256, &[]).unwrap();
        let (mut from, mut to) = (source.memory.try_clone().unwrap(), target.memory.try_clone().unwrap());
        std::io::copy(&mut from, &mut to).unwrap();
        assert_eq!(target.load(&source.save().unwrap()), Reply::Done);
        let writes = target.status().writes;
        assert_eq!(writes, source.status().writes);
        assert!(matches!(target.verify(), Reply::Verified(report) if report.is_clean()));
        assert!(matches!(target.resume(), Reply::Refused(_)), "only run may start what was loaded");
        assert_eq!(target.run_loaded(), Reply::Done);
        while target.status().writes == writes {}
        assert!(matches!(target.load(&[]), Reply::Refused(_)));
    }

    #[test]
    fn a_page_that_was_not_carried_is_found() {
        let mut source = running();
        source.pause();
        let mut target = Machine::waiting(256, &[]).unwrap();
        target.load(&source.save().unwrap());
        let Reply::Verified(report) = target.verify() else { panic!("no report") };
        assert!(report.wrong > 200, "{report}");
    }

    #[test]
    fn a_move_does_not_wake_what_its_owner_stopped() {
        let mut machine = running();
        assert_eq!(machine.stop(), Reply::Done);
        assert_eq!(machine.pause(), Reply::Done);
        assert_eq!(machine.resume(), Reply::Done);
        assert_eq!(machine.phase(), Phase::Stopped);
        let mut target = Machine::waiting(256, &[]).unwrap();
        assert_eq!(target.load(&machine.save().unwrap()), Reply::Done);
        assert_eq!(target.run_loaded(), Reply::Done);
        assert_eq!(target.phase(), Phase::Stopped);
        assert_eq!(machine.start(), Reply::Done);
        assert_eq!(machine.phase(), Phase::Running);
    }

    #[test]
    fn a_throttled_writer_writes_less() {
        let machine = running();
        let count = |machine: &Machine| {
            let before = machine.status().writes;
            std::thread::sleep(std::time::Duration::from_millis(200));
            machine.status().writes - before
        };
        let free = count(&machine);
        machine.throttle(90);
        let throttled = count(&machine);
        assert!(throttled * 2 < free, "{throttled} of {free}");
    }
}
