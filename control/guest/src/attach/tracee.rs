//! One thread of another process, held by ptrace, in which system calls can be run.
//!
//! ```text
//!   SEIZE, INTERRUPT ─► stopped ─► all signals blocked ─► rip at a `syscall` instruction of the vdso, one step
//!                          └──────── dropped: stack bytes, mask and registers as before, DETACH
//! ```
//!
//! The registers include `orig_rax` and the interrupted call's result, so the kernel restarts that call as if
//! nothing had been. What must never happen: a step from inside a restartable sequence (`rseq`), which the kernel
//! would then no longer abort; such a moment is let pass.
#![expect(
    unsafe_code,
    reason = "nix has no wrapper for the signal mask and the rseq configuration of a tracee"
)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::maps;
use crate::clock::Deadline;

/// A thread stops within this time, unless it sits in an uninterruptible wait (a dead NFS server).
const STOP_TIMEOUT: Duration = Duration::from_secs(2);
/// How often the stop is looked for.
const STOP_POLL: Duration = Duration::from_micros(20);
/// The code of a stop by INTERRUPT (`PTRACE_EVENT_STOP` of <linux/ptrace.h>).
const EVENT_STOP: i32 = 128;
/// `PTRACE_GETSIGMASK` of <linux/ptrace.h>.
const GET_SIGNAL_MASK: libc::c_uint = 0x420a;
/// `PTRACE_GET_RSEQ_CONFIGURATION` of <linux/ptrace.h>.
const GET_RSEQ: libc::c_uint = 0x420f;
/// The ABI keeps this much below the stack pointer for the function that runs.
const RED_ZONE_BYTES: u64 = 128;
/// What a call may put on the stack.
pub(crate) const SCRATCH_BYTES: usize = 64;
/// Selector of 64-bit user code.
const LONG_MODE: u64 = 0x33;
/// Machine code of `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// The kernel's signal set.
const MASK_BYTES: usize = 8;

/// Why a thread could not be used.
#[derive(Debug)]
pub(crate) enum TraceFault {
    /// ptrace was refused, or the thread is gone.
    Refused(Errno),
    /// It did not stop in time.
    Stuck,
    /// It stopped inside of a restartable sequence: let it go and try again.
    BadMoment,
    /// It cannot be worked with at all.
    Unfit(&'static str),
    /// Its memory could not be reached.
    Memory(io::Error),
}

impl From<Errno> for TraceFault {
    fn from(errno: Errno) -> TraceFault {
        TraceFault::Refused(errno)
    }
}

/// A stopped thread; dropping it puts everything back and lets it run.
#[derive(Debug)]
pub(crate) struct Tracee {
    thread: Pid,
    memory: File,
    registers: libc::user_regs_struct,
    mask: u64,
    gate: u64,
    scratch: u64,
    scratch_before: [u8; SCRATCH_BYTES],
    undelivered: Option<Signal>,
}

impl Tracee {
    /// Stops `thread` of `process` and makes it ready for calls.
    pub(crate) fn seize(process: i32, thread: i32) -> Result<Tracee, TraceFault> {
        let gate = syscall_instruction(process)?;
        let memory = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{process}/mem"))
            .map_err(TraceFault::Memory)?;
        let thread = Pid::from_raw(thread);
        stop(thread)?;
        // From here on every path out detaches.
        let prepared = prepare(thread, &memory);
        match prepared {
            Ok((registers, mask, scratch, scratch_before)) => Ok(Tracee {
                thread,
                memory,
                registers,
                mask,
                gate,
                scratch,
                scratch_before,
                undelivered: None,
            }),
            Err(fault) => {
                let _ = ptrace::detach(thread, None);
                Err(fault)
            }
        }
    }

    /// Where a call's argument may lie in the thread's memory: [`SCRATCH_BYTES`] bytes.
    pub(crate) fn scratch(&self) -> u64 {
        self.scratch
    }

    /// Writes the scratch area.
    pub(crate) fn put(&self, bytes: &[u8]) -> Result<(), TraceFault> {
        debug_assert!(bytes.len() <= SCRATCH_BYTES, "scratch is {SCRATCH_BYTES} bytes");
        self.memory.write_all_at(bytes, self.scratch).map_err(TraceFault::Memory)
    }

    /// Runs one system call in the thread. The outer error is ptrace's, the inner one the call's.
    pub(crate) fn call(
        &mut self,
        number: i64,
        arguments: [u64; 3],
    ) -> Result<Result<u64, Errno>, TraceFault> {
        let mut registers = self.registers;
        registers.rip = self.gate;
        registers.rax = number.cast_unsigned();
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx] = arguments;
        ptrace::setregs(self.thread, registers)?;
        self.step()?;
        let result = ptrace::getregs(self.thread)?.rax.cast_signed();
        Ok(match result {
            -4095..0 => Err(Errno::from_raw(i32::try_from(-result).unwrap_or(0))),
            _ => Ok(result.cast_unsigned()),
        })
    }

    /// One instruction. A signal that cannot be blocked is kept for the detach.
    fn step(&mut self) -> Result<(), TraceFault> {
        loop {
            ptrace::step(self.thread, None)?;
            // No deadline: the thread runs with our registers and must come back to us.
            match waitpid(self.thread, Some(WaitPidFlag::__WALL))? {
                WaitStatus::Stopped(_, Signal::SIGTRAP) => return Ok(()),
                WaitStatus::Stopped(_, Signal::SIGSYS) => {
                    return Err(TraceFault::Unfit(
                        "its seccomp filter forbids the calls that tracking needs",
                    ));
                }
                WaitStatus::Stopped(_, signal) => self.undelivered = Some(signal),
                WaitStatus::PtraceEvent(..) => {}
                _ => return Err(TraceFault::Refused(Errno::ESRCH)),
            }
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        // Every step is tried whatever became of the one before; a thread that is gone needs none of them.
        let _ = self.memory.write_all_at(&self.scratch_before, self.scratch);
        let _ = set_signal_mask(self.thread, self.mask);
        let _ = ptrace::setregs(self.thread, self.registers);
        let _ = ptrace::detach(self.thread, self.undelivered);
    }
}

/// Seizes a thread and waits until it has stopped.
pub(crate) fn stop(thread: Pid) -> Result<(), TraceFault> {
    ptrace::seize(thread, ptrace::Options::empty())?;
    let stopped = ptrace::interrupt(thread).map_err(TraceFault::from).and_then(|()| wait_stop(thread));
    if stopped.is_err() {
        // Only a stopped thread can be let go; of a stuck one the kernel lets go when this process ends.
        let _ = ptrace::detach(thread, None);
    }
    stopped
}

fn wait_stop(thread: Pid) -> Result<(), TraceFault> {
    let deadline = Deadline::after(STOP_TIMEOUT);
    loop {
        match waitpid(thread, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG))? {
            WaitStatus::PtraceEvent(_, _, EVENT_STOP) => return Ok(()),
            // A signal on its way to the thread: deliver it, our stop comes next.
            WaitStatus::Stopped(_, signal) => ptrace::cont(thread, signal)?,
            WaitStatus::PtraceEvent(..) => ptrace::cont(thread, None)?,
            WaitStatus::StillAlive if deadline.left().is_none() => return Err(TraceFault::Stuck),
            WaitStatus::StillAlive => thread::sleep(STOP_POLL),
            _ => return Err(TraceFault::Refused(Errno::ESRCH)),
        }
    }
}

type Prepared = (libc::user_regs_struct, u64, u64, [u8; SCRATCH_BYTES]);

fn prepare(thread: Pid, memory: &File) -> Result<Prepared, TraceFault> {
    let registers = ptrace::getregs(thread)?;
    if registers.cs != LONG_MODE {
        return Err(TraceFault::Unfit("it does not run 64-bit code"));
    }
    if in_restartable_sequence(thread, memory, registers.rip) {
        return Err(TraceFault::BadMoment);
    }
    let scratch = (registers.rsp - RED_ZONE_BYTES - SCRATCH_BYTES as u64) & !15;
    let mut before = [0; SCRATCH_BYTES];
    memory.read_exact_at(&mut before, scratch).map_err(TraceFault::Memory)?;
    let mask = signal_mask(thread)?;
    set_signal_mask(thread, u64::MAX)?;
    Ok((registers, mask, scratch, before))
}

/// The thread registered a restartable sequence and stands inside of it (`struct rseq_cs` of <linux/rseq.h>).
fn in_restartable_sequence(thread: Pid, memory: &File, instruction: u64) -> bool {
    let word = |at: u64| {
        let mut bytes = [0; 8];
        memory.read_exact_at(&mut bytes, at).ok().map(|()| u64::from_le_bytes(bytes))
    };
    let Some(area) = rseq_area(thread).filter(|area| *area != 0) else { return false };
    let Some(sequence) = word(area + 8).filter(|sequence| *sequence != 0) else { return false };
    match (word(sequence + 8), word(sequence + 16)) {
        (Some(start), Some(len)) => (start..start.saturating_add(len)).contains(&instruction),
        _ => true,
    }
}

/// The address of a `syscall` instruction in the process.
fn syscall_instruction(process: i32) -> Result<u64, TraceFault> {
    let mappings = maps::of_process(process).map_err(TraceFault::Memory)?;
    let memory = File::open(format!("/proc/{process}/mem")).map_err(TraceFault::Memory)?;
    let vdso = mappings
        .iter()
        .find(|mapping| mapping.path == "[vdso]")
        .ok_or(TraceFault::Unfit("it has no vdso"))?;
    let mut code = vec![0; usize::try_from(vdso.end - vdso.start).unwrap_or(0)];
    memory.read_exact_at(&mut code, vdso.start).map_err(TraceFault::Memory)?;
    let at =
        code.windows(2).position(|pair| pair == SYSCALL).ok_or(TraceFault::Unfit("its vdso has no gate"))?;
    Ok(vdso.start + at as u64)
}

fn rseq_area(thread: Pid) -> Option<u64> {
    // struct ptrace_rseq_configuration: pointer, size, signature, flags, padding.
    let mut answer = [0_u64; 3];
    // SAFETY: the kernel writes at most the given number of bytes to `answer`, which is ours.
    let got = unsafe {
        libc::ptrace(GET_RSEQ, thread.as_raw(), size_of_val(&answer), (&raw mut answer).cast::<c_void>())
    };
    (got > 0).then_some(answer[0])
}

fn signal_mask(thread: Pid) -> Result<u64, TraceFault> {
    let mut mask = 0_u64;
    // SAFETY: the kernel writes exactly MASK_BYTES bytes to `mask`.
    let outcome = unsafe {
        libc::ptrace(GET_SIGNAL_MASK, thread.as_raw(), MASK_BYTES, (&raw mut mask).cast::<c_void>())
    };
    Errno::result(outcome)?;
    Ok(mask)
}

fn set_signal_mask(thread: Pid, mask: u64) -> Result<(), TraceFault> {
    // SAFETY: the kernel reads exactly MASK_BYTES bytes from `mask`.
    let outcome = unsafe {
        libc::ptrace(libc::PTRACE_SETSIGMASK, thread.as_raw(), MASK_BYTES, (&raw const mask).cast::<c_void>())
    };
    Errno::result(outcome)?;
    Ok(())
}
