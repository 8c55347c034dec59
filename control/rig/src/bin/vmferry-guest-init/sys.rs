//! The system calls and the port that an init needs and safe crates do not offer.
#![expect(unsafe_code, reason = "port I/O and real-time scheduling have no safe wrapper")]

use std::ffi::CStr;
use std::path::Path;
use std::time::Duration;

use rustix::mount::MountFlags;
use rustix::time::{ClockId, clock_gettime};

/// QEMU's debug console.
const BEAT_PORT: u16 = 0xe9;

/// Mounts a kernel file system; a failure shows later, when its files are missing.
pub(crate) fn mount(kind: &str, target: &CStr) {
    let folder = target.to_string_lossy().into_owned();
    let _ = rustix::mount::mount(kind, &*folder, kind, MountFlags::empty(), None::<&CStr>);
}

/// Lets this thread run before all ordinary ones.
pub(crate) fn become_real_time(priority: i32) {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: the structure is complete and outlives the call; a refusal only makes the beat less even.
    let _ = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) };
}

/// Allows this thread to use the beat port.
pub(crate) fn open_beat_port() -> bool {
    // SAFETY: changes only which ports this thread may use.
    let refused = unsafe { libc::ioperm(u64::from(BEAT_PORT), 1, 1) };
    refused == 0
}

/// Sends one beat; the port must have been opened by this thread.
pub(crate) fn beat(count: u8) {
    // SAFETY: writing this port only hands a byte to QEMU's debug console.
    unsafe { std::arch::asm!("out dx, al", in("dx") BEAT_PORT, in("al") count, options(nomem, nostack)) };
}

/// Loads a kernel module; a kernel that has it built in refuses, which is fine.
pub(crate) fn load_module(path: &Path) {
    if let Ok(file) = std::fs::File::open(path) {
        let _ = rustix::system::finit_module(&file, c"", 0);
    }
}

/// The guest's monotonic clock.
pub(crate) fn uptime() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
