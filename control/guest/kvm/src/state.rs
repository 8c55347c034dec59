//! A machine's state as it travels: saved types, apart from the machine, with a fixed form in bytes.
//!
//! ```text
//!   magic · version │ cpus │ tsc kHz │ clock │ cpuid entries │ PIC 0 · PIC 1 · IOAPIC │ PIT │ serial │ cpu 0 │ cpu 1 …
//! ```
//!
//! The records inside are structures of KVM's own interface, which the kernel keeps as they are; their sizes are pinned by
//! assertions. The bytes come from another host: every count has a limit, a state that is short, long or of another machine
//! is refused, and what is inside of a record is KVM's to judge. What must never happen: a machine that runs with a part
//! of a state.

mod board;
mod vcpu;
mod wire;
mod xsave;

use std::time::Duration;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use vm_superio::SerialState;

use crate::KvmError;
use crate::cpuid::{self, FeatureSet};
use crate::machine::{Blank, CPUS_MAX, Machine};
use wire::{Reader, Writer};

const MAGIC: u64 = u64::from_le_bytes(*b"vmferkvm");
/// The form of the bytes; a newer one has a higher number.
const VERSION: u32 = 1;
/// XSAVE areas are 2.7 KiB with AVX-512 and 11 KiB with AMX.
const XSAVE_BYTES_MAX: usize = 64 << 10;
/// KVM names about 120 today.
const MSRS_MAX: usize = 512;
/// vm-superio's input buffer.
const SERIAL_INPUT_MAX: usize = 64;
/// The most bytes of a state: the sum of the limits above.
pub const STATE_BYTES_MAX: usize = 4096
    + KVM_MAX_CPUID_ENTRIES * size_of::<kvm_cpuid_entry2>()
    + CPUS_MAX as usize * (8192 + XSAVE_BYTES_MAX + MSRS_MAX * size_of::<kvm_msr_entry>());

const _: () =
    assert!(size_of::<kvm_regs>() == 144 && size_of::<kvm_sregs>() == 312 && size_of::<kvm_xcrs>() == 392);
const _: () = assert!(size_of::<kvm_debugregs>() == 128 && size_of::<kvm_vcpu_events>() == 64);
const _: () = assert!(size_of::<kvm_lapic_state>() == 1024 && size_of::<kvm_irqchip>() == 520);
const _: () = assert!(size_of::<kvm_pit_state2>() == 112 && size_of::<kvm_msr_entry>() == 16);

/// Everything of a machine but its memory.
#[derive(Clone)]
pub struct State {
    /// The guest's clock in nanoseconds, read when everything else had been.
    clock_ns: u64,
    /// The rate of its time stamp counters.
    tsc_khz: u32,
    /// What its CPUs say of themselves.
    cpuid: Vec<kvm_cpuid_entry2>,
    irqchips: [kvm_irqchip; 3],
    pit: kvm_pit_state2,
    serial: SerialState,
    vcpus: Vec<VcpuState>,
}

/// One CPU.
#[derive(Clone)]
struct VcpuState {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    lapic: kvm_lapic_state,
    /// Read last of all, with the clock.
    tsc: u64,
    xsave: Vec<u8>,
    msrs: Vec<kvm_msr_entry>,
}

impl State {
    /// How many CPUs it has.
    #[must_use]
    pub fn cpus(&self) -> usize {
        self.vcpus.len()
    }

    /// The features that its guest was given.
    #[must_use]
    pub fn features(&self) -> FeatureSet {
        FeatureSet::of(&self.cpuid)
    }

    /// The guest's clock in nanoseconds.
    #[must_use]
    pub fn clock_ns(&self) -> u64 {
        self.clock_ns
    }

    /// The time stamp counter of a CPU; 0 of one that is not there.
    #[must_use]
    pub fn tsc(&self, cpu: usize) -> u64 {
        self.vcpus.get(cpu).map_or(0, |vcpu| vcpu.tsc)
    }

    /// The rate of the time stamp counters.
    #[must_use]
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Its bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut to = Writer::default();
        to.word64(MAGIC);
        to.word(VERSION);
        to.count(self.vcpus.len());
        to.word(self.tsc_khz);
        to.word64(self.clock_ns);
        to.count(self.cpuid.len());
        self.cpuid.iter().for_each(|entry| to.record(entry));
        self.irqchips.iter().for_each(|chip| to.record(chip));
        to.record(&self.pit);
        put_serial(&mut to, &self.serial);
        self.vcpus.iter().for_each(|vcpu| vcpu.put(&mut to));
        to.into_bytes()
    }

    /// Reads what [`State::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> Result<State, KvmError> {
        let mut from = Reader::new(bytes);
        if from.word64()? != MAGIC {
            return Err(KvmError::state(
                "these bytes are no micro-VM's state: both sides must be of the kind kvm:NAME",
            ));
        }
        let version = from.word()?;
        if version != VERSION {
            return Err(KvmError::state(format!(
                "the micro-VM's state has version {version} and this vmferry reads {VERSION}: install the same vmferry on both hosts"
            )));
        }
        let cpus = from.count(1, usize::from(CPUS_MAX), "CPUs")?;
        let (tsc_khz, clock_ns) = (from.word()?, from.word64()?);
        let entries = from.count(1, KVM_MAX_CPUID_ENTRIES, "CPUID entries")?;
        let cpuid = (0..entries).map(|_| from.record()).collect::<Result<_, _>>()?;
        let irqchips = [from.record()?, from.record()?, from.record()?];
        let pit = from.record()?;
        let serial = take_serial(&mut from)?;
        let vcpus = (0..cpus).map(|_| VcpuState::take(&mut from)).collect::<Result<_, _>>()?;
        from.end()?;
        Ok(State { clock_ns, tsc_khz, cpuid, irqchips, pit, serial, vcpus })
    }
}

impl VcpuState {
    fn put(&self, to: &mut Writer) {
        to.record(&self.regs);
        to.record(&self.sregs);
        to.record(&self.xcrs);
        to.record(&self.debugregs);
        to.record(&self.events);
        to.record(&self.mp_state);
        to.record(&self.lapic);
        to.word64(self.tsc);
        to.bytes(&self.xsave);
        to.count(self.msrs.len());
        self.msrs.iter().for_each(|msr| to.record(msr));
    }

    fn take(from: &mut Reader<'_>) -> Result<VcpuState, KvmError> {
        Ok(VcpuState {
            regs: from.record()?,
            sregs: from.record()?,
            xcrs: from.record()?,
            debugregs: from.record()?,
            events: from.record()?,
            mp_state: from.record()?,
            lapic: from.record()?,
            tsc: from.word64()?,
            xsave: from.bytes(XSAVE_BYTES_MAX, "bytes of XSAVE")?.to_vec(),
            msrs: {
                let count = from.count(0, MSRS_MAX, "MSRs")?;
                (0..count).map(|_| from.record()).collect::<Result<_, _>>()?
            },
        })
    }
}

fn put_serial(to: &mut Writer, serial: &SerialState) {
    let SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        ref in_buffer,
    } = *serial;
    to.record(&[
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
    ]);
    to.bytes(in_buffer);
}

fn take_serial(from: &mut Reader<'_>) -> Result<SerialState, KvmError> {
    let registers: [u8; 9] = from.record()?;
    let [
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
    ] = registers;
    Ok(SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer: from.bytes(SERIAL_INPUT_MAX, "bytes of serial input")?.to_vec(),
    })
}

impl Machine {
    /// Reads the state of a machine that stands still. The guest's clocks tick on meanwhile, so they are read last.
    pub fn save(&self) -> Result<State, KvmError> {
        let vcpus =
            self.vcpus.iter().map(|vcpu| vcpu::save(&self.board.kvm, vcpu)).collect::<Result<Vec<_>, _>>()?;
        let cpuid = self.board.features.mask(&cpuid::supported(&self.board.kvm)?);
        let mut state = State {
            clock_ns: 0,
            tsc_khz: 0,
            cpuid,
            irqchips: board::save_irqchips(&self.board.vm)?,
            pit: board::save_pit(&self.board.vm)?,
            serial: self.board.console.state(),
            vcpus,
        };
        let clocks = crate::clock::Clocks::read(&self.board.vm, &self.vcpus)?;
        (state.clock_ns, state.tsc_khz) = (clocks.clock_ns, clocks.tsc_khz);
        state.vcpus.iter_mut().zip(clocks.tscs).for_each(|(vcpu, tsc)| vcpu.tsc = tsc);
        Ok(state)
    }

    /// Makes a machine of a blank one and a state; its memory must hold the guest's already. Refused, by name, when
    /// this host's CPU lacks what the guest was given. The state was saved `age` ago: its clocks go on from there.
    pub fn restore(blank: Blank, state: &State, age: Duration) -> Result<Machine, KvmError> {
        if state.cpus() != blank.vcpus.len() {
            return Err(KvmError::state(format!(
                "the guest has {} CPUs and this machine {}: start the target with --cpus {0}",
                state.cpus(),
                blank.vcpus.len()
            )));
        }
        // Whatever the rest takes, the clocks go on from the moment at which they were read.
        let read_at = crate::clock::now().saturating_sub(age);
        let host = FeatureSet::of(cpuid::supported(&blank.board.kvm)?.as_slice());
        if let Some(name) = state.features().missing_in(&host).first() {
            return Err(KvmError::state(format!(
                "the guest was given `{name}`, which this host's CPU does not have: start it on the source with --cpu-features host,-{name}, or choose another target"
            )));
        }
        cpuid::give(&blank.vcpus, &state.cpuid)?;
        board::load_irqchips(&blank.board.vm, &state.irqchips)?;
        board::load_pit(&blank.board.vm, &state.pit)?;
        blank.board.console.load(std::sync::Arc::clone(&blank.board.vm), &state.serial)?;
        let clocks = crate::clock::Clocks {
            clock_ns: state.clock_ns,
            tsc_khz: state.tsc_khz,
            tscs: state.vcpus.iter().map(|vcpu| vcpu.tsc).collect(),
        };
        clocks.set_rate(&blank.vcpus)?;
        for (vcpu, saved) in blank.vcpus.iter().zip(&state.vcpus) {
            vcpu::load(&blank.board.kvm, vcpu, saved)?;
        }
        clocks.write(&blank.board.vm, &blank.vcpus, read_at)?;
        for (vcpu, saved) in blank.vcpus.iter().zip(&state.vcpus) {
            vcpu::load_after_clock(vcpu, saved)?;
        }
        Ok(blank.into_machine())
    }
}

#[cfg(test)]
mod tests;
