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
use super::seccomp::{INSTRUCTIONS_MAX, Instruction, Verdict, call_words, judge};
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
/// `PTRACE_SECCOMP_GET_FILTER` of <linux/ptrace.h>.
const GET_FILTER: libc::c_uint = 0x420c;
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
    filters: Vec<Vec<Instruction>>,
    undelivered: Option<Signal>,
}

impl Tracee {
    /// Stops `thread` of `process` and makes it ready for calls.
    pub(crate) fn seize(process: i32, thread: i32) -> Result<Tracee, TraceFault> {
        let memory = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{process}/mem"))
            .map_err(TraceFault::Memory)?;
        let thread = Pid::from_raw(thread);
        stop(thread)?;
        // From here on every path out detaches.
        let prepared = prepare(process, thread, &memory);
        match prepared {
            Ok(prepared) => Ok(Tracee {
                thread,
                memory,
                registers: prepared.registers,
                mask: prepared.mask,
                gate: prepared.gate,
                scratch: prepared.scratch,
                scratch_before: prepared.scratch_before,
                filters: prepared.filters,
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

    /// Asks the thread's own filters, before the call is made.
    pub(crate) fn must_permit(&self, number: i64, arguments: [u64; 3]) -> Result<(), TraceFault> {
        let call = call_words(number, self.gate + SYSCALL.len() as u64, arguments);
        match judge(&self.filters, &call) {
            Verdict::Harmless => Ok(()),
            Verdict::Harmful => Err(TraceFault::Unfit(
                "its seccomp filter would kill it for the calls that tracking needs; start the VMM without the filter \
                 (QEMU: -sandbox off, libvirt: seccomp_sandbox = 0 in qemu.conf)",
            )),
        }
    }

    /// Runs one system call in the thread. The outer error is ptrace's, the inner one the call's.
    pub(crate) fn call(
        &mut self,
        number: i64,
        arguments: [u64; 3],
    ) -> Result<Result<u64, Errno>, TraceFault> {
        self.must_permit(number, arguments)?;
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

    fn step(&mut self) -> Result<(), TraceFault> {
        while !self.took_step()? {}
        Ok(())
    }

    /// One instruction, or what came instead. A signal that cannot be blocked is kept for the detach.
    fn took_step(&mut self) -> Result<bool, TraceFault> {
        ptrace::step(self.thread, None)?;
        // No deadline: the thread runs with our registers and must come back to us.
        let status = waitpid(self.thread, Some(WaitPidFlag::__WALL))?;
        if let WaitStatus::Stopped(_, signal) = status {
            if signal == Signal::SIGTRAP {
                return Ok(true);
            }
            if signal == Signal::SIGSYS {
                return Err(TraceFault::Unfit("its seccomp filter trapped a call"));
            }
            self.undelivered = Some(signal);
        } else if !matches!(status, WaitStatus::PtraceEvent(..)) {
            return Err(TraceFault::Refused(Errno::ESRCH));
        }
        Ok(false)
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
            WaitStatus::Exited(..)
            | WaitStatus::Signaled(..)
            | WaitStatus::PtraceSyscall(_)
            | WaitStatus::Continued(_) => return Err(TraceFault::Refused(Errno::ESRCH)),
        }
    }
}

struct Prepared {
    gate: u64,
    registers: libc::user_regs_struct,
    mask: u64,
    scratch: u64,
    scratch_before: [u8; SCRATCH_BYTES],
    filters: Vec<Vec<Instruction>>,
}

fn prepare(process: i32, thread: Pid, memory: &File) -> Result<Prepared, TraceFault> {
    // Only now: a process that was just starting another program has its mappings again.
    let gate = syscall_instruction(process, memory)?;
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
    let filters = filters(thread)?;
    let mask = signal_mask(thread)?;
    set_signal_mask(thread, u64::MAX)?;
    Ok(Prepared { gate, registers, mask, scratch, scratch_before: before, filters })
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
fn syscall_instruction(process: i32, memory: &File) -> Result<u64, TraceFault> {
    let mappings = maps::of_process(process).map_err(TraceFault::Memory)?;
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

/// The thread's system call filters.
fn filters(thread: Pid) -> Result<Vec<Vec<Instruction>>, TraceFault> {
    let mut filters = Vec::new();
    loop {
        let mut program = vec![[0_u8; 8]; INSTRUCTIONS_MAX];
        // SAFETY: the kernel writes at most INSTRUCTIONS_MAX instructions of eight bytes, which `program` has.
        let outcome = unsafe {
            libc::ptrace(GET_FILTER, thread.as_raw(), filters.len(), program.as_mut_ptr().cast::<c_void>())
        };
        match Errno::result(outcome) {
            Ok(count) => {
                program.truncate(usize::try_from(count).unwrap_or(0));
                filters.push(program.into_iter().map(instruction).collect());
            }
            // No filter, or no further one.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(filters),
            Err(_) if !is_filtered(thread) => return Ok(filters),
            Err(_) => {
                return Err(TraceFault::Unfit(
                    "it has a seccomp filter that only root may read, and a call against the filter could kill it; \
                     run vmferry as root",
                ));
            }
        }
    }
}

fn instruction(bytes: [u8; 8]) -> Instruction {
    let [a, b, if_true, if_false, c, d, e, f] = bytes;
    Instruction {
        code: u16::from_le_bytes([a, b]),
        if_true,
        if_false,
        value: u32::from_le_bytes([c, d, e, f]),
    }
}

fn is_filtered(thread: Pid) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
    status.lines().find_map(|line| line.strip_prefix("Seccomp:")).is_none_or(|mode| mode.trim() != "0")
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

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};

    use super::super::seccomp::tests::denying;
    use super::*;

    /// A process that sleeps under a filter which answers `action` to userfaultfd.
    fn filtered(action: u32) -> Child {
        let program = denying(libc::SYS_userfaultfd, action);
        let filters: Vec<libc::sock_filter> = program
            .iter()
            .map(|line| libc::sock_filter {
                code: line.code,
                jt: line.if_true,
                jf: line.if_false,
                k: line.value,
            })
            .collect();
        let mut command = Command::new("sleep");
        command.arg("60").stdout(Stdio::null());
        // SAFETY: between fork and exec only two prctl calls are made, on memory that was there before.
        unsafe { command.pre_exec(move || install(&filters)) };
        command.spawn().unwrap()
    }

    fn install(filters: &[libc::sock_filter]) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: u16::try_from(filters.len()).unwrap(),
            filter: filters.as_ptr().cast_mut(),
        };
        // SAFETY: plain numbers.
        let allowed = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        Errno::result(allowed)?;
        // SAFETY: `program` names a live list of instructions.
        let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
        Errno::result(set)?;
        Ok(())
    }

    fn userfaultfd_in(child: &Child) -> Result<Result<u64, Errno>, TraceFault> {
        let pid = i32::try_from(child.id()).unwrap();
        // The thread may still be on its way into sleep.
        thread::sleep(Duration::from_millis(50));
        let mut tracee = Tracee::seize(pid, pid)?;
        tracee.call(libc::SYS_userfaultfd, [0, 0, 0])
    }

    #[test]
    fn a_filter_that_kills_is_asked_first_and_the_process_lives() {
        for action in [0x8000_0000, 0, 0x0003_0000] {
            let mut child = filtered(action);
            let outcome = userfaultfd_in(&child);
            assert!(matches!(outcome, Err(TraceFault::Unfit(why)) if why.contains("seccomp")), "{outcome:?}");
            assert!(child.try_wait().unwrap().is_none(), "the process died");
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn a_filter_that_answers_an_error_is_only_an_error() {
        let mut child = filtered(0x0005_0000 | 1);
        assert_eq!(userfaultfd_in(&child).unwrap(), Err(Errno::EPERM));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn an_injected_call_answers_and_the_interrupted_one_goes_on() {
        let mut child = Command::new("sleep").arg("0.6").spawn().unwrap();
        thread::sleep(Duration::from_millis(50));
        let pid = i32::try_from(child.id()).unwrap();
        for _ in 0..20 {
            let mut tracee = Tracee::seize(pid, pid).unwrap();
            assert_eq!(tracee.call(libc::SYS_getpid, [0; 3]).unwrap(), Ok(u64::from(child.id())));
            assert_eq!(tracee.call(libc::SYS_close, [9999, 0, 0]).unwrap(), Err(Errno::EBADF));
        }
        assert!(child.wait().unwrap().success(), "the sleep was broken off");
    }
}
