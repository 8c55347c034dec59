//! The flat payload as tests command it.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmferry_datapath::ByteLen;
use vmferry_kvm::payload::{Commander, FLAT_PORTS, FLAT_PORTS_LEN, Writes};
use vmferry_kvm::{Blank, Config, FeatureSet, GuestMemory, Machine, Place, RunningMachine, Tracking};

pub(crate) const FLAT_RAM: ByteLen = ByteLen(16 << 20);
const TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) fn config(tracking: Tracking, memory: Arc<GuestMemory>) -> Config {
    let features = FeatureSet::of_host().expect("the lab has a KVM");
    Config { memory, cpus: 1, tracking, features, console: Box::new(io::sink()), beat: Box::new(io::sink()) }
}

/// Puts a commander on the bus.
pub(crate) fn command(blank: &Blank) -> Commander {
    let commander = Commander::default();
    let device = Arc::new(Mutex::new(commander.clone()));
    blank.attach(Place::ports(FLAT_PORTS, FLAT_PORTS_LEN), device).expect("the ports are free");
    commander
}

/// Writes into a guest that stands still.
pub(crate) fn poke(machine: &Machine, at: u64, bytes: &[u8]) {
    machine.memory().file().write_all_at(bytes, at).expect("the place is in the memory");
}

/// A machine with the payload in it.
pub(crate) struct Flat<M> {
    pub(crate) machine: M,
    pub(crate) commander: Commander,
}

pub(crate) struct FlatGuest;

impl FlatGuest {
    pub(crate) fn boot(tracking: Tracking) -> Flat<Machine> {
        let memory = Arc::new(GuestMemory::new(FLAT_RAM).expect("memory for a guest"));
        let blank = Blank::new(config(tracking, memory)).expect("the lab's KVM makes VMs");
        let commander = command(&blank);
        Flat { machine: blank.boot_flat().expect("the payload fits"), commander }
    }
}

impl Flat<Machine> {
    pub(crate) fn run(self) -> Flat<RunningMachine> {
        Flat { machine: self.machine.run().expect("the machine runs"), commander: self.commander }
    }

    /// How often a page was written, by the page itself.
    pub(crate) fn count(&self, page: u32) -> u32 {
        let mut word = [0; 4];
        self.machine
            .memory()
            .file()
            .read_exact_at(&mut word, u64::from(page) * 4096)
            .expect("the page is there");
        u32::from_le_bytes(word)
    }
}

impl Flat<RunningMachine> {
    /// Lets the guest write these pages and waits until it did.
    pub(crate) fn write(self, pages: &[u32]) -> Self {
        for page in pages {
            self.commander.order(Writes { address: page * 4096, count: 1, stride: 4096 });
        }
        self.wait()
    }

    /// Lets it write `count` pages one after the other.
    pub(crate) fn write_run(self, first: u32, count: u32) -> Self {
        self.commander.order(Writes { address: first * 4096, count, stride: 4096 });
        self.wait()
    }

    fn wait(self) -> Self {
        let done = self.commander.wait_done(TIMEOUT);
        assert!(done, "the guest did not do what it was told: {:?}", self.machine.ended());
        self
    }

    pub(crate) fn pause(self) -> Flat<Machine> {
        Flat { machine: self.machine.pause().expect("the machine stops"), commander: self.commander }
    }
}

#[expect(clippy::disallowed_methods, reason = "a test measures a real machine")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

pub(crate) fn until<T>(timeout: Duration, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let began = now();
    loop {
        let found = attempt();
        if found.is_some() || began.elapsed() > timeout {
            return found;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
