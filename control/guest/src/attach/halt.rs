//! Holds all threads of a process still, for the fallback to soft-dirty bits.
//!
//! It changes no register, so a tracer that dies lets the process run on by itself.

use nix::sys::ptrace;
use nix::unistd::Pid;
use vmferry_datapath::dirty::soft_dirty::Halt;

use super::inject::threads;
use super::tracee::{TraceFault, stop};

/// A process that can be held still.
#[derive(Debug)]
pub(crate) struct ThreadHalt {
    process: i32,
    held: Vec<Pid>,
}

impl ThreadHalt {
    /// Of this process.
    pub(crate) fn of(process: i32) -> ThreadHalt {
        ThreadHalt { process, held: Vec::new() }
    }

    /// Stops the threads that are not held yet; how many there were.
    fn stop_more(&mut self) -> Result<usize, String> {
        let mut stopped = 0;
        for thread in threads(self.process).into_iter().map(Pid::from_raw) {
            if self.held.contains(&thread) {
                continue;
            }
            match stop(thread) {
                Ok(()) => {
                    self.held.push(thread);
                    stopped += 1;
                }
                Err(TraceFault::Refused(nix::errno::Errno::ESRCH)) => {}
                Err(fault) => return Err(format!("thread {thread} of process {}: {fault:?}", self.process)),
            }
        }
        Ok(stopped)
    }
}

impl Halt for ThreadHalt {
    fn halt(&mut self) -> Result<(), String> {
        // A thread that was not stopped yet can start another one: until a look finds nothing new.
        loop {
            match self.stop_more() {
                Ok(0) if self.held.is_empty() => return Err(format!("process {} has ended", self.process)),
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(why) => {
                    self.release();
                    return Err(why);
                }
            }
        }
    }

    fn release(&mut self) {
        for thread in self.held.drain(..) {
            let _ = ptrace::detach(thread, None);
        }
    }
}

impl Drop for ThreadHalt {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    fn state(pid: u32) -> String {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find_map(|line| line.strip_prefix("State:")).unwrap().trim().to_owned()
    }

    #[test]
    fn a_halted_process_stands_and_then_runs_on() {
        let mut child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let mut halt = ThreadHalt::of(i32::try_from(child.id()).unwrap());
        for _ in 0..20 {
            halt.halt().unwrap();
            assert!(state(child.id()).starts_with('t'), "{}", state(child.id()));
            halt.release();
            let runs = (0..1000).any(|_| {
                std::thread::sleep(Duration::from_millis(1));
                !state(child.id()).starts_with('t')
            });
            assert!(runs, "{}", state(child.id()));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(halt.halt().is_err());
    }
}
