//! A virtual CPU: it stands still as a [`Vcpu`], or runs in a thread that gives the [`Vcpu`] back.
//!
//! ```text
//!   Vcpu ──start──► RunningVcpu (a thread in KVM_RUN) ──stop──► Vcpu
//! ```
//!
//! So the state of a CPU that runs cannot be read: nobody has the value. A stop is a flag and a signal; the signal may
//! fall between the flag's check and KVM_RUN, so it is sent again until the thread has left. What must never happen: a
//! stop in the middle of an instruction. An access to a device is completed only by the next KVM_RUN, so the last one is
//! made with `immediate_exit`: it completes the access and enters the guest no more.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmferry_datapath::EXIT_DIRTY_RING_FULL;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::KvmError;
use crate::bus::Space;
use crate::machine::Board;

/// How long a stop waits for the thread before it sends the signal again.
const KICK_EVERY: Duration = Duration::from_millis(1);

/// Why a CPU left the guest for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEnd {
    /// It pulled the reset line, or shut down by a triple fault.
    Reset,
    /// It did what KVM cannot go on from.
    Crashed(String),
}

/// A CPU that stands still.
pub(crate) struct Vcpu {
    pub(crate) fd: VcpuFd,
    pub(crate) number: u8,
}

/// A CPU that runs.
pub(crate) struct RunningVcpu {
    thread: JoinHandle<Vcpu>,
    stop: Arc<AtomicBool>,
    left: Receiver<()>,
    task: Arc<AtomicI32>,
}

/// Told when a CPU left the guest for good.
pub(crate) type EndSink = Sender<GuestEnd>;

fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Once for the process. The handler does nothing: the signal is to end KVM_RUN, not the process.
fn handle_kicks() -> Result<(), KvmError> {
    static HANDLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let handled =
        HANDLED.get_or_init(|| register_signal_handler(kick_signal(), ignore).map_err(|error| error.errno()));
    handled.map_err(|errno| {
        KvmError::refused("handle the signal that stops virtual CPUs")(std::io::Error::from_raw_os_error(
            errno,
        ))
    })
}

extern "C" fn ignore(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

impl Vcpu {
    /// Starts to run; `ends` hears when the guest ends.
    pub(crate) fn start(self, board: Arc<Board>, ends: EndSink) -> Result<RunningVcpu, (Vcpu, KvmError)> {
        if let Err(error) = handle_kicks() {
            return Err((self, error));
        }
        let (stop, task) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI32::new(0)));
        let (leaving, left) = channel();
        let (stopping, here) = (Arc::clone(&stop), Arc::clone(&task));
        // The CPU travels to its thread through a channel: when no thread can be made it is still ours.
        let (hand_over, handed) = channel::<Vcpu>();
        let spawned = std::thread::Builder::new().name(format!("vcpu{}", self.number)).spawn(move || {
            here.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
            let mut vcpu = handed.recv().expect("the CPU is handed over at once");
            if let Some(end) = vcpu.run(&board, &stopping) {
                let _ = ends.send(end);
            }
            let _ = leaving.send(());
            vcpu
        });
        match spawned {
            Ok(thread) => {
                let _ = hand_over.send(self);
                Ok(RunningVcpu { thread, stop, left, task })
            }
            Err(error) => Err((self, KvmError::refused("start a thread for a virtual CPU")(error))),
        }
    }

    /// Runs until it is stopped, or until the guest ends.
    fn run(&mut self, board: &Board, stop: &AtomicBool) -> Option<GuestEnd> {
        loop {
            if stop.load(Ordering::Acquire) {
                return self.complete(board);
            }
            match self.enter(board) {
                Ok(_) => {}
                Err(end) => return Some(end),
            }
        }
    }

    /// Completes what the last exit began, without entering the guest.
    fn complete(&mut self, board: &Board) -> Option<GuestEnd> {
        self.fd.set_kvm_immediate_exit(1);
        let end = loop {
            match self.enter(board) {
                Ok(Entered::Interrupted) => break None,
                Ok(Entered::Exited) => {}
                Err(end) => break Some(end),
            }
        };
        self.fd.set_kvm_immediate_exit(0);
        end
    }

    /// One KVM_RUN and what it asks for.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "every exit that is not served here ends the guest, new ones too"
    )]
    fn enter(&mut self, board: &Board) -> Result<Entered, GuestEnd> {
        let number = self.number;
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if error.errno() == libc::EINTR => return Ok(Entered::Interrupted),
            Err(error) if error.errno() == libc::EAGAIN => return Ok(Entered::Exited),
            Err(error) => return Err(GuestEnd::Crashed(format!("virtual CPU {number} cannot run: {error}"))),
        };
        match exit {
            VcpuExit::IoIn(port, data) => board.bus.read(Space::Ports, u64::from(port), data),
            VcpuExit::IoOut(port, data) => board.bus.write(Space::Ports, u64::from(port), data),
            VcpuExit::MmioRead(at, data) => board.bus.read(Space::Memory, at, data),
            VcpuExit::MmioWrite(at, data) => board.bus.write(Space::Memory, at, data),
            VcpuExit::Unsupported(EXIT_DIRTY_RING_FULL) => {
                // The log keeps the failure too: from then on every page is dirty.
                board.relieve_rings().map_err(|error| GuestEnd::Crashed(error.to_string()))?;
            }
            VcpuExit::Intr => return Ok(Entered::Interrupted),
            VcpuExit::Shutdown => return Err(GuestEnd::Reset),
            other => return Err(GuestEnd::Crashed(format!("virtual CPU {number} cannot go on: {other:?}"))),
        }
        if board.reset.0.load(Ordering::Acquire) { Err(GuestEnd::Reset) } else { Ok(Entered::Exited) }
    }
}

enum Entered {
    Exited,
    Interrupted,
}

impl RunningVcpu {
    /// Its thread, for whoever throttles it; 0 while it starts.
    pub(crate) fn task(&self) -> i32 {
        self.task.load(Ordering::Acquire)
    }

    /// Asks it to leave the guest: all CPUs are asked before any is waited for.
    pub(crate) fn ask_to_stop(&self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.thread.kill(kick_signal());
    }

    /// Waits until it has left.
    pub(crate) fn stopped(self) -> Result<Vcpu, KvmError> {
        while let Err(RecvTimeoutError::Timeout) = self.left.recv_timeout(KICK_EVERY) {
            let _ = self.thread.kill(kick_signal());
        }
        self.thread.join().map_err(|_| KvmError::GuestCrashed("a virtual CPU's thread panicked".to_owned()))
    }
}
