//! CPU time by /proc: what a move costs, without what the guest costs.
//!
//! A VMM's total less its processor threads, for QEMU emulates the guest in them. What write protection costs the
//! guest itself stays in those threads and is not counted, on either side of a comparison.
//!
//! A VMM that has ended must not be read: its threads are gone from /proc, but their time is still in its total, so
//! the guest's whole life would be booked on the move. Hence a watch that reads while the VMM lives.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use procfs::process::Process;

/// How QEMU calls the threads that run guest processors, with `-name debug-threads=on`.
const VCPU_THREAD: &str = "CPU ";
const WATCH_PAUSE: Duration = Duration::from_millis(20);

/// Watches VMMs during a move.
pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    thread: JoinHandle<f64>,
}

impl Watch {
    /// Begins to count.
    pub(crate) fn begin(pids: [u32; 2]) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let before = pids.map(|pid| vmm_seconds(pid).unwrap_or(0.0));
            let mut last = before;
            while !told.load(Ordering::Acquire) {
                std::thread::sleep(WATCH_PAUSE);
                pids.iter().zip(&mut last).for_each(|(pid, last)| *last = vmm_seconds(*pid).unwrap_or(*last));
            }
            last.iter().zip(before).map(|(last, before)| (last - before).max(0.0)).sum()
        });
        Self { over, thread }
    }

    /// CPU seconds of both VMMs since, outside their guests' processors.
    pub(crate) fn end(self) -> f64 {
        self.over.store(true, Ordering::Release);
        self.thread.join().unwrap_or(0.0)
    }
}

/// CPU seconds that a VMM has used outside its guest's processors so far; `None` once it has ended.
fn vmm_seconds(pid: u32) -> Option<f64> {
    let process = Process::new(i32::try_from(pid).ok()?).ok()?;
    let tasks: Vec<_> = process.tasks().ok()?.flatten().filter_map(|task| task.stat().ok()).collect();
    let guest: Vec<_> = tasks.iter().filter(|stat| stat.comm.starts_with(VCPU_THREAD)).collect();
    let total = process.stat().ok()?;
    if guest.is_empty() {
        return None;
    }
    let guest: u64 = guest.iter().map(|stat| stat.utime + stat.stime).sum();
    Some(ticks_to_seconds((total.utime + total.stime).saturating_sub(guest)))
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
