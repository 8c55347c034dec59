//! The micro-VM: made blank, then booted or restored, then run and paused by turns.
//!
//! ```text
//!   Blank ──boot_flat / boot_linux──► Machine ──run──► RunningMachine
//!     └─────restore(blank, state)───►    │ ◄──pause────────┘
//!                                        └─save──► State
//! ```
//!
//! Each state is a type that has exactly what may be done in it, and every step takes the value and gives the next one: a
//! machine that runs cannot be saved, and a state that was refused leaves no half-restored machine. What must never
//! happen: memory that goes before its VM; the board holds both, in that order.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

use kvm_ioctls::{Kvm, VmFd};
use vm_superio::I8042Device;
use vmferry_datapath::{ByteLen, DirtyLog, KvmLog, KvmRings, PageSet, RingRequest, TrackError};

use crate::KvmError;
use crate::bus::{Bus, Place, SharedDevice};
use crate::cpuid::{self, FeatureSet};
use crate::memory::GuestMemory;
use crate::serial::{
    BEAT_PORT, Beat, Console, KEYBOARD_PORT, KEYBOARD_PORTS, Keyboard, ResetLine, SERIAL_PORT, SERIAL_PORTS,
    Sink,
};
use crate::vcpu::{GuestEnd, RunningVcpu, Vcpu};

/// The most CPUs of a micro-VM.
pub const CPUS_MAX: u8 = 32;
/// Where KVM keeps three pages of its own on Intel: in the gap, below the BIOS.
const TSS_ADDR: usize = 0xfffb_d000;
/// Entries of a vCPU's ring: 64 KiB, and never full for long.
const RING_BYTES: ByteLen = ByteLen(64 << 10);

/// How dirty pages are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tracking {
    /// KVM's bitmap: costs by the size of the guest.
    #[default]
    Bitmap,
    /// KVM's rings of 64 KiB a CPU: cost by the pages written.
    Ring,
    /// Rings of another size.
    RingOf(ByteLen),
}

/// What a machine is made of.
pub struct Config {
    /// Its memory: filled before a restore.
    pub memory: Arc<GuestMemory>,
    /// Its CPUs, 1 to [`CPUS_MAX`].
    pub cpus: u8,
    /// How its dirty pages are found.
    pub tracking: Tracking,
    /// What its CPUs may do.
    pub features: FeatureSet,
    /// Where the serial console's output goes.
    pub console: Sink,
    /// Where the bytes written to port 0xe9 go.
    pub beat: Sink,
}

/// What all CPUs of a machine share.
pub(crate) struct Board {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) bus: Bus,
    pub(crate) console: Console,
    pub(crate) reset: ResetLine,
    pub(crate) kvm: Kvm,
    pub(crate) features: FeatureSet,
    rings: Option<Arc<KvmRings>>,
    /// Last, so that it goes last.
    pub(crate) memory: Arc<GuestMemory>,
}

impl Board {
    pub(crate) fn relieve_rings(&self) -> Result<(), TrackError> {
        self.rings.as_ref().map_or(Ok(()), |rings| rings.relieve())
    }
}

/// A machine without a guest: memory, interrupt controllers and CPUs are there, and nothing is in them.
pub struct Blank {
    pub(crate) board: Arc<Board>,
    pub(crate) vcpus: Vec<Vcpu>,
}

impl Blank {
    /// Makes the VM, its board and its CPUs.
    pub fn new(config: Config) -> Result<Blank, KvmError> {
        let Config { memory, cpus, tracking, features, console, beat } = config;
        if !(1..=CPUS_MAX).contains(&cpus) {
            return Err(KvmError::mistake(format!(
                "a micro-VM has 1 to {CPUS_MAX} CPUs, not {cpus}: change --cpus"
            )));
        }
        let kvm = Kvm::new().map_err(KvmError::refused("open /dev/kvm"))?;
        let vm = Arc::new(kvm.create_vm().map_err(KvmError::refused("make a VM"))?);
        vm.set_tss_address(TSS_ADDR).map_err(KvmError::refused("place KVM's own pages"))?;
        vm.create_irq_chip().map_err(KvmError::refused("make the interrupt controllers"))?;
        let pit =
            kvm_bindings::kvm_pit_config { flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(KvmError::refused("make the timer"))?;
        memory.register(&vm)?;
        // Rings come with their vCPUs, so they are asked for first.
        let request = match tracking {
            Tracking::Bitmap => None,
            Tracking::Ring => Some(RingRequest::enable(&*vm, RING_BYTES)?),
            Tracking::RingOf(bytes) => Some(RingRequest::enable(&*vm, bytes)?),
        };
        let vcpus = (0..cpus).map(|number| make_vcpu(&vm, number)).collect::<Result<Vec<_>, _>>()?;
        let fds: Vec<_> = vcpus.iter().map(|vcpu| &vcpu.fd).collect();
        let rings = request.map(|request| request.map(&*vm, &fds, memory.slots())).transpose()?;
        let (bus, console, reset) =
            (Bus::default(), Console::new(Arc::clone(&vm), console), ResetLine::default());
        let keyboard = Keyboard(I8042Device::new(reset.clone()));
        attach(&bus, Place::ports(SERIAL_PORT, SERIAL_PORTS), console.clone())?;
        attach(&bus, Place::ports(BEAT_PORT, 1), Beat(beat))?;
        attach(&bus, Place::ports(KEYBOARD_PORT, KEYBOARD_PORTS), keyboard)?;
        let board = Arc::new(Board { vm, bus, console, reset, kvm, features, rings, memory });
        Ok(Blank { board, vcpus })
    }

    /// Puts a device on the machine's bus, before the guest runs.
    pub fn attach(&self, place: Place, device: SharedDevice) -> Result<(), KvmError> {
        self.board.bus.attach(place, device)
    }

    /// The VM, for what a passthrough device needs of it: irqfds, routes, KVM's VFIO device.
    #[must_use]
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.board.vm
    }

    /// The memory, for DMA maps.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.board.memory
    }

    /// The serial console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.board.console
    }

    /// Gives every CPU what it may say of itself.
    pub(crate) fn identify(&self) -> Result<(), KvmError> {
        let supported = cpuid::supported(&self.board.kvm)?;
        let granted = self.board.features.mask(&supported);
        cpuid::give(&self.vcpus, &granted)
    }

    pub(crate) fn into_machine(self) -> Machine {
        Machine { board: self.board, vcpus: self.vcpus }
    }
}

fn make_vcpu(vm: &VmFd, number: u8) -> Result<Vcpu, KvmError> {
    let fd =
        vm.create_vcpu(u64::from(number)).map_err(KvmError::refused(format!("make virtual CPU {number}")))?;
    Ok(Vcpu { fd, number })
}

fn attach(bus: &Bus, place: Place, device: impl crate::bus::Device + 'static) -> Result<(), KvmError> {
    bus.attach(place, Arc::new(std::sync::Mutex::new(device)))
}

/// A machine whose guest stands still.
pub struct Machine {
    pub(crate) board: Arc<Board>,
    pub(crate) vcpus: Vec<Vcpu>,
}

/// A machine whose guest runs.
pub struct RunningMachine {
    board: Arc<Board>,
    vcpus: Vec<RunningVcpu>,
    ends: Receiver<GuestEnd>,
}

impl Machine {
    /// Lets the guest run.
    pub fn run(self) -> Result<RunningMachine, KvmError> {
        let Machine { board, vcpus } = self;
        board.console.set_open(true);
        let (sink, ends): (Sender<GuestEnd>, _) = channel();
        let mut running = RunningMachine { board, vcpus: Vec::with_capacity(vcpus.len()), ends };
        for vcpu in vcpus {
            match vcpu.start(Arc::clone(&running.board), sink.clone()) {
                Ok(vcpu) => running.vcpus.push(vcpu),
                Err((_, error)) => {
                    // A guest of which some CPUs ran cannot be given back: it is ended.
                    let _ = running.pause();
                    return Err(error);
                }
            }
        }
        Ok(running)
    }

    /// Starts to track what the guest, and the VMM for it, writes.
    pub fn track(&self) -> Result<MachineLog, KvmError> {
        MachineLog::start(&self.board)
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.board.memory
    }

    /// The serial console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.board.console
    }
}

impl RunningMachine {
    /// Stops every CPU between two instructions; after this nobody writes the guest's memory.
    pub fn pause(self) -> Result<Machine, KvmError> {
        let RunningMachine { board, vcpus, ends: _ } = self;
        board.console.set_open(false);
        vcpus.iter().for_each(RunningVcpu::ask_to_stop);
        // Every thread is waited for, also after one failed.
        let vcpus: Vec<_> = vcpus.into_iter().map(RunningVcpu::stopped).collect();
        Ok(Machine { board, vcpus: vcpus.into_iter().collect::<Result<_, _>>()? })
    }

    /// Why the guest ended, once it has; the other CPUs may run on.
    #[must_use]
    pub fn ended(&self) -> Option<GuestEnd> {
        self.ends.try_recv().ok()
    }

    /// Starts to track what the guest, and the VMM for it, writes.
    pub fn track(&self) -> Result<MachineLog, KvmError> {
        MachineLog::start(&self.board)
    }

    /// How often a full dirty ring stopped a CPU.
    #[must_use]
    pub fn ring_full_exits(&self) -> u64 {
        self.board.rings.as_ref().map_or(0, |rings| rings.full_exits())
    }

    /// The CPUs' threads, for a throttle.
    #[must_use]
    pub fn tasks(&self) -> Vec<i32> {
        self.vcpus.iter().map(RunningVcpu::task).filter(|task| *task != 0).collect()
    }

    /// The memory.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.board.memory
    }

    /// The serial console.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.board.console
    }
}

/// KVM's log and the VMM's own writes, as one log. Works while the machine runs and while it stands still.
pub struct MachineLog {
    log: Box<dyn DirtyLog>,
    /// Behind the log, which sets its slots again when it goes.
    board: Arc<Board>,
}

impl MachineLog {
    fn start(board: &Arc<Board>) -> Result<MachineLog, KvmError> {
        let log: Box<dyn DirtyLog> = match &board.rings {
            Some(rings) => Box::new(rings.start()?),
            None => Box::new(KvmLog::start(&*board.vm, board.memory.slots())?),
        };
        Ok(MachineLog { log, board: Arc::clone(board) })
    }
}

impl DirtyLog for MachineLog {
    fn collect(&mut self, into: &mut PageSet) -> Result<(), TrackError> {
        self.board.memory.take_written(into);
        self.log.collect(into)
    }

    fn name(&self) -> &'static str {
        self.log.name()
    }
}
