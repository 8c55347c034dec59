//! The machine's small devices: the serial console, the beat port and the reset line.
//!
//! The console is vm-superio's UART. Its interrupt is raised by an ioctl and not by an irqfd, because the latter may
//! still be on its way when the interrupt controllers are saved. What must never happen: input that reaches the UART of a
//! paused guest, after its state was saved.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;
use vm_superio::serial::NoEvents;
use vm_superio::{I8042Device, Serial, SerialState, Trigger};

use crate::KvmError;
use crate::bus::Device;

/// Where a PC has its first serial port.
pub(crate) const SERIAL_PORT: u64 = 0x3f8;
pub(crate) const SERIAL_PORTS: u64 = 8;
const SERIAL_IRQ: u32 = 4;
/// Where the guest beats, as with QEMU's debug console.
pub(crate) const BEAT_PORT: u64 = 0xe9;
/// The keyboard controller, of which only the reset line is there.
pub(crate) const KEYBOARD_PORT: u64 = 0x60;
pub(crate) const KEYBOARD_PORTS: u64 = 5;
const COMMAND_OFFSET: u64 = 4;

/// Where a device's bytes go.
pub type Sink = Box<dyn Write + Send>;

pub(crate) struct SerialInterrupt(Arc<VmFd>);

impl Trigger for SerialInterrupt {
    type E = io::Error;

    /// The UART's interrupt is an edge.
    fn trigger(&self) -> io::Result<()> {
        self.0.set_irq_line(SERIAL_IRQ, true)?;
        Ok(self.0.set_irq_line(SERIAL_IRQ, false)?)
    }
}

type Uart = Serial<SerialInterrupt, NoEvents, Sink>;

/// The serial console.
#[derive(Clone)]
pub struct Console(Arc<Mutex<Held>>);

struct Held {
    uart: Uart,
    open: bool,
}

impl Console {
    pub(crate) fn new(vm: Arc<VmFd>, out: Sink) -> Console {
        Console(Arc::new(Mutex::new(Held { uart: Serial::new(SerialInterrupt(vm), out), open: false })))
    }

    /// Takes over the UART of another host; its output goes on here.
    pub(crate) fn load(&self, vm: Arc<VmFd>, state: &SerialState) -> Result<(), KvmError> {
        let mut held = self.lock();
        let out: Sink = std::mem::replace(held.uart.writer_mut(), Box::new(io::sink()));
        held.uart = Serial::from_state(state, SerialInterrupt(vm), NoEvents, out)
            .map_err(|error| KvmError::state(format!("the serial port's state is not one: {error}")))?;
        Ok(())
    }

    pub(crate) fn state(&self) -> SerialState {
        self.lock().uart.state()
    }

    /// Whether input may reach the guest: only while it runs.
    pub(crate) fn set_open(&self, open: bool) {
        self.lock().open = open;
    }

    /// Types as much of `bytes` as there is room for and the guest runs, and says how much.
    pub fn offer(&self, bytes: &[u8]) -> usize {
        let mut held = self.lock();
        let room = held.uart.fifo_capacity().min(bytes.len());
        if !held.open || room == 0 {
            return 0;
        }
        held.uart.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for Console {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.lock().uart.read(offset);
        }
    }

    /// A console that nobody reads any more loses what is written to it, and the guest runs on.
    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let _ = self.lock().uart.write(offset, *byte);
        }
    }
}

/// The port that the guest beats on: every byte goes to a sink.
pub(crate) struct Beat(pub(crate) Sink);

impl Device for Beat {
    /// What QEMU's debug console answers: a guest asks whether it is there.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0xe9);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let _ = self.0.write_all(data);
    }
}

/// Set when the guest pulled the reset line.
#[derive(Clone, Default)]
pub(crate) struct ResetLine(pub(crate) Arc<AtomicBool>);

impl Trigger for ResetLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.store(true, Ordering::Release);
        Ok(())
    }
}

/// The keyboard controller.
pub(crate) struct Keyboard(pub(crate) I8042Device<ResetLine>);

impl Device for Keyboard {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let status = if offset == COMMAND_OFFSET { self.0.read(4) } else { 0 };
        data.fill(status);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], COMMAND_OFFSET) = (data, offset) {
            let _ = self.0.write(4, *byte);
        }
    }
}
