//! What the micro-VM process may do next: each state owns the machine in exactly the form that it has there.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use vmferry_datapath::{DirtyLog, PageSet, TrackError};
use vmferry_kvm::{
    Blank, Config, FeatureSet, GuestEnd, GuestMemory, KvmError, Machine, MachineLog, RunningMachine,
    State as Saved,
};

use super::args::{MicroVmArgs, TrackingWord};
use super::cpus::Cpus;
use super::devices::{Devices, Watches};
use super::lines::{Current, Wire};
use super::wire::{Identity, MicroVmPhase, MicroVmStatus, Reply};
use crate::GuestError;

/// What comes before a machine's state: whether its owner had stopped it.
const HEADER_BYTES: usize = 1;
/// The most bytes of what travels.
pub(super) const SAVED_BYTES_MAX: u64 = (HEADER_BYTES + vmferry_kvm::STATE_BYTES_MAX) as u64;

enum State {
    Waiting(Box<Blank>),
    Running(RunningMachine),
    Paused(Machine),
    Stopped(Machine),
    Loaded { machine: Machine, stopped: bool },
    Ended(String),
}

/// How a machine is made, any number of times.
struct Recipe {
    memory: Arc<GuestMemory>,
    cpus: u8,
    tracking: TrackingWord,
    features: FeatureSet,
    console: Wire,
    beat: Wire,
    current: Current,
    devices: Arc<Devices>,
}

impl Recipe {
    fn blank(&self) -> Result<Blank, KvmError> {
        let blank = Blank::new(Config {
            memory: Arc::clone(&self.memory),
            cpus: self.cpus,
            tracking: self.tracking.into(),
            features: self.features.clone(),
            console: self.console.sink(),
            beat: self.beat.sink(),
        })?;
        self.devices.attach(&blank)?;
        self.current.set(blank.console());
        Ok(blank)
    }
}

/// The machine of this process.
pub(super) struct MicroVm {
    recipe: Recipe,
    state: State,
    /// Alive while a log is: two would take each other's pages away.
    tracked: Weak<()>,
    running_since_ns: u64,
    stopped_at_ns: u64,
}

/// A log, and the sign that there is one.
pub(super) struct HeldLog {
    log: MachineLog,
    devices: Watches,
    _sign: Arc<()>,
}

impl HeldLog {
    /// What CPUs, VMM and devices wrote since the last time.
    pub(super) fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        self.devices.collect(into);
        self.log.collect(into)
    }

    /// What devices may write and nobody can tell.
    pub(super) fn pin(&self, into: &mut PageSet) {
        self.devices.pin(into);
    }
}

impl MicroVm {
    pub(super) fn start(args: &MicroVmArgs) -> Result<MicroVm, GuestError> {
        let host = FeatureSet::of_host()?;
        let memory = Arc::new(GuestMemory::new(args.ram())?);
        let recipe = Recipe {
            devices: Arc::new(Devices::open(&args.vfio, &memory)?),
            memory,
            cpus: args.cpus,
            tracking: args.dirty,
            features: FeatureSet::parse(&args.cpu_features, &host)?,
            console: Wire::open(&args.console, "console")?,
            beat: Wire::open(&args.beat, "beat")?,
            current: Current::default(),
        };
        let blank = recipe.blank()?;
        recipe.console.feed(recipe.current.clone());
        let state = match args.boot_files()? {
            None => State::Waiting(Box::new(blank)),
            Some(files) => State::Paused(files.boot(blank)?),
        };
        let mut vm = MicroVm { recipe, state, tracked: Weak::new(), running_since_ns: 0, stopped_at_ns: 0 };
        if vm.phase() == MicroVmPhase::Paused {
            vm.recipe.devices.take_up()?;
            if vm.resume() != Reply::Done {
                return Err(GuestError::misbehaved("the guest that was booted does not run"));
            }
        }
        Ok(vm)
    }

    fn phase(&self) -> MicroVmPhase {
        match self.state {
            State::Waiting(_) => MicroVmPhase::Waiting,
            State::Running(_) => MicroVmPhase::Running,
            State::Paused(_) => MicroVmPhase::Paused,
            State::Stopped(_) => MicroVmPhase::Stopped,
            State::Loaded { .. } => MicroVmPhase::Loaded,
            State::Ended(_) => MicroVmPhase::Ended,
        }
    }

    pub(super) fn identity(&self) -> Identity {
        let tasks = if let State::Running(machine) = &self.state { machine.tasks() } else { Vec::new() };
        Identity {
            pid: i32::try_from(std::process::id()).unwrap_or(0),
            memory_fd: self.recipe.memory.file().as_raw_fd(),
            ram_bytes: self.recipe.memory.layout().total_bytes().0,
            cpus: self.recipe.cpus,
            features: self.recipe.features.names(),
            tracking: self.recipe.tracking,
            tasks,
            phase: self.phase(),
            devices: self.recipe.devices.facts(),
        }
    }

    /// What is passed through: for whoever moves states while the machine does something else.
    pub(super) fn devices(&self) -> &Arc<Devices> {
        &self.recipe.devices
    }

    pub(super) fn status(&self) -> MicroVmStatus {
        let ring_full_exits =
            if let State::Running(machine) = &self.state { machine.ring_full_exits() } else { 0 };
        let (running_since_ns, stopped_at_ns) = (self.running_since_ns, self.stopped_at_ns);
        MicroVmStatus { phase: self.phase(), ring_full_exits, running_since_ns, stopped_at_ns }
    }

    /// How many chunks a harvest has.
    pub(super) fn memory(&self) -> &Arc<GuestMemory> {
        &self.recipe.memory
    }

    /// Whether the guest is no more: then why, once.
    pub(super) fn end(&mut self) -> Option<GuestEnd> {
        let State::Running(machine) = &self.state else { return None };
        let end = machine.ended()?;
        if let State::Running(machine) = self.take() {
            // The other CPUs stop too; what the pause says does not matter any more.
            let _ = machine.pause();
        }
        Some(end)
    }

    pub(super) fn track(&mut self) -> Result<HeldLog, Reply> {
        if self.tracked.strong_count() > 0 {
            return Err(Reply::Refused("its pages are tracked for another move already".to_owned()));
        }
        let log = match &self.state {
            State::Running(machine) => machine.track(),
            State::Paused(machine) | State::Stopped(machine) => machine.track(),
            State::Waiting(_) | State::Loaded { .. } | State::Ended(_) => {
                return Err(self.refuse("be tracked"));
            }
        };
        let sign = Arc::new(());
        self.tracked = Arc::downgrade(&sign);
        let log = log.map_err(|error| Reply::Refused(error.to_string()))?;
        Ok(HeldLog { log, devices: self.recipe.devices.watch(&self.recipe.memory), _sign: sign })
    }

    /// A move brings CPUs and devices to rest; a guest that its owner stopped has only devices that are not. After a
    /// refusal everything is as before.
    pub(super) fn pause(&mut self) -> Reply {
        let mut cpus = match self.take() {
            State::Running(machine) => Cpus::Running(machine),
            State::Stopped(machine) => Cpus::Stopped(machine),
            state @ (State::Waiting(_) | State::Paused(_) | State::Loaded { .. } | State::Ended(_)) => {
                return self.keep(state, &[MicroVmPhase::Paused], "pause");
            }
        };
        let rested = self.recipe.devices.rest(&mut cpus);
        self.put(cpus);
        if self.phase() == MicroVmPhase::Paused {
            self.stopped_at_ns = now_ns();
        }
        rested.map_or_else(|error| Reply::Refused(error.to_string()), |()| Reply::Done)
    }

    fn put(&mut self, cpus: Cpus) {
        self.state = match cpus {
            Cpus::Running(machine) => State::Running(machine),
            Cpus::Paused(machine) => State::Paused(machine),
            Cpus::Stopped(machine) => State::Stopped(machine),
            Cpus::Lost(why) => State::Ended(why),
        };
    }

    /// The owner stops.
    pub(super) fn stop(&mut self) -> Reply {
        self.halt(State::Stopped, &[MicroVmPhase::Stopped], "stop")
    }

    /// Undoes `pause`. A device that had to be reset on the way is told, and keeps nobody from running.
    pub(super) fn resume(&mut self) -> Reply {
        let mut cpus = match self.take() {
            State::Paused(machine) => Cpus::Paused(machine),
            State::Stopped(machine) => Cpus::Stopped(machine),
            state @ (State::Waiting(_) | State::Running(_) | State::Loaded { .. } | State::Ended(_)) => {
                return self.keep(state, &[MicroVmPhase::Running], "resume");
            }
        };
        let scars = self.recipe.devices.let_run(&mut cpus).err().unwrap_or_default();
        scars.iter().for_each(|scar| tracing::warn!("the guest runs on, but {scar}"));
        self.put(cpus);
        if self.phase() == MicroVmPhase::Running {
            self.running_since_ns = now_ns();
        }
        if let State::Ended(why) = &self.state { Reply::Refused(why.clone()) } else { Reply::Done }
    }

    pub(super) fn start_again(&mut self) -> Reply {
        let state = self.take();
        if let State::Stopped(machine) = state {
            return self.run(machine);
        }
        self.keep(state, &[MicroVmPhase::Running], "start")
    }

    /// The state of a guest that stands still.
    pub(super) fn save(&self) -> Result<Vec<u8>, Reply> {
        let (machine, stopped) = match &self.state {
            State::Paused(machine) => (machine, false),
            State::Stopped(machine) => (machine, true),
            State::Waiting(_) | State::Running(_) | State::Loaded { .. } | State::Ended(_) => {
                return Err(self.refuse("save"));
            }
        };
        let saved = machine.save().map_err(|error| Reply::Refused(error.to_string()))?;
        let mut bytes = vec![u8::from(stopped)];
        bytes.extend_from_slice(&saved.to_bytes());
        Ok(bytes)
    }

    /// Takes in a guest whose state was saved when this host's clock showed `saved_at`. A blank machine that refused a state
    /// is gone; the next one is made before the answer.
    pub(super) fn load(&mut self, bytes: &[u8], saved_at: Duration) -> Reply {
        let state = self.take();
        let State::Waiting(blank) = state else { return self.keep(state, &[], "load") };
        match restored(*blank, bytes, saved_at) {
            Ok((machine, stopped)) => {
                self.state = State::Loaded { machine, stopped };
                Reply::Done
            }
            Err(error) => {
                self.wait_again();
                Reply::Refused(error.to_string())
            }
        }
    }

    pub(super) fn run_loaded(&mut self) -> Reply {
        let state = self.take();
        if let State::Loaded { machine, stopped } = state {
            // Devices work before the CPUs do. After Commit nothing goes back: one that does not start is an error.
            if let Err(error) = self.recipe.devices.take_up() {
                self.state = State::Loaded { machine, stopped };
                return Reply::Refused(error.to_string());
            }
            if stopped {
                self.state = State::Stopped(machine);
                return Reply::Done;
            }
            return self.run(machine);
        }
        self.keep(state, &[MicroVmPhase::Running, MicroVmPhase::Stopped], "run")
    }

    pub(super) fn discard(&mut self) -> Reply {
        self.recipe.devices.discard();
        let state = self.take();
        if let State::Loaded { machine, .. } = state {
            drop(machine);
            self.wait_again();
            return Reply::Done;
        }
        self.keep(state, &[MicroVmPhase::Waiting], "discard")
    }

    /// The same, when what was loaded still waits for the word to run.
    pub(super) fn discard_loaded(&mut self) {
        if self.phase() == MicroVmPhase::Loaded {
            let _ = self.discard();
        }
    }

    fn wait_again(&mut self) {
        self.state = match self.recipe.blank() {
            Ok(blank) => State::Waiting(Box::new(blank)),
            Err(error) => State::Ended(error.to_string()),
        };
    }

    /// The state is taken for the time of a step; one that does not end leaves an ended guest, not a made-up one.
    fn take(&mut self) -> State {
        std::mem::replace(&mut self.state, State::Ended("a step was not finished".to_owned()))
    }

    fn halt(&mut self, into: fn(Machine) -> State, done: &[MicroVmPhase], command: &str) -> Reply {
        let state = self.take();
        let State::Running(machine) = state else { return self.keep(state, done, command) };
        let halted = machine.pause();
        self.stopped_at_ns = now_ns();
        self.take_machine(halted, into)
    }

    fn run(&mut self, machine: Machine) -> Reply {
        let running = machine.run();
        self.running_since_ns = now_ns();
        self.take_machine(running, State::Running)
    }

    fn take_machine<M>(&mut self, machine: Result<M, KvmError>, into: fn(M) -> State) -> Reply {
        match machine {
            Ok(machine) => {
                self.state = into(machine);
                Reply::Done
            }
            Err(error) => {
                self.state = State::Ended(error.to_string());
                Reply::Refused(error.to_string())
            }
        }
    }

    /// Nothing to do in the phases `done`, a refusal in all others.
    fn keep(&mut self, state: State, done: &[MicroVmPhase], command: &str) -> Reply {
        self.state = state;
        if done.contains(&self.phase()) { Reply::Done } else { self.refuse(command) }
    }

    fn refuse(&self, command: &str) -> Reply {
        if let State::Ended(why) = &self.state {
            return Reply::Refused(format!("its guest is no more: {why}"));
        }
        Reply::Refused(format!("a micro-VM that is {:?} cannot {command}", self.phase()).to_lowercase())
    }
}

fn restored(blank: Blank, bytes: &[u8], saved_at: Duration) -> Result<(Machine, bool), KvmError> {
    let damaged =
        || KvmError::StateRefused("the micro-VM's state begins with neither 0 nor 1: it is damaged".into());
    let (stopped, bytes) = bytes.split_first().ok_or_else(damaged)?;
    let stopped = match stopped {
        0 => false,
        1 => true,
        _ => return Err(damaged()),
    };
    let saved = Saved::from_bytes(bytes)?;
    Ok((Machine::restore(blank, &saved, now().saturating_sub(saved_at))?, stopped))
}

/// This host's monotonic clock.
pub(super) fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

fn now_ns() -> u64 {
    u64::try_from(now().as_nanos()).unwrap_or(u64::MAX)
}
