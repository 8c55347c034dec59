//! CPU time by /proc: what a move costs, without what the guest costs.
//!
//! A VMM's total less its processor threads, for QEMU emulates the guest in them. What write protection costs the
//! guest itself stays in those threads and is not counted, on either side of a comparison.

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use procfs::process::Process;

/// How QEMU calls the threads that run guest processors, with `-name debug-threads=on`.
const VCPU_THREAD: &str = "CPU ";

/// CPU seconds that a VMM has used outside its guest's processors so far; 0 once it has ended.
pub(crate) fn vmm_seconds(pid: u32) -> f64 {
    let Ok(process) = i32::try_from(pid).map_err(drop).and_then(|pid| Process::new(pid).map_err(drop)) else {
        return 0.0;
    };
    let total = process.stat().map_or(0, |stat| stat.utime + stat.stime);
    let tasks = process.tasks().into_iter().flatten().flatten().filter_map(|task| task.stat().ok());
    let guest: u64 =
        tasks.filter(|stat| stat.comm.starts_with(VCPU_THREAD)).map(|stat| stat.utime + stat.stime).sum();
    ticks_to_seconds(total.saturating_sub(guest))
}

/// CPU seconds of all children that have ended and were waited for.
pub(crate) fn children_seconds() -> f64 {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_CHILDREN) else { return 0.0 };
    let microseconds = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    u32::try_from(microseconds / 1000).map_or(0.0, |milliseconds| f64::from(milliseconds) / 1000.0)
}

fn ticks_to_seconds(ticks: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a tick count is far below 2^52")]
    let seconds = ticks as f64 / procfs::ticks_per_second() as f64;
    seconds
}
