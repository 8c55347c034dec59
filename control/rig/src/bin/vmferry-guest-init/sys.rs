//! The system calls and the port that an init needs and safe crates do not offer.
#![expect(unsafe_code, reason = "port I/O and real-time scheduling have no safe wrapper")]

use std::ffi::CStr;
use std::os::fd::AsRawFd;
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

/// Switches a network interface on.
pub(crate) fn set_up(interface: &str) {
    let ifru_flags = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    configure(interface, libc::SIOCSIFFLAGS, libc::__c_anonymous_ifr_ifru { ifru_flags });
}

/// Gives a network interface an address, of a /8 as that address says itself; 0.0.0.0 takes it away.
pub(crate) fn set_address(interface: &str, address: [u8; 4]) {
    let mut bytes = [0; 14];
    for (byte, of_address) in bytes[2..6].iter_mut().zip(address) {
        *byte = of_address.cast_signed();
    }
    let family = libc::sa_family_t::try_from(libc::AF_INET).unwrap_or(2);
    let ifru_addr = libc::sockaddr { sa_family: family, sa_data: bytes };
    configure(interface, libc::SIOCSIFADDR, libc::__c_anonymous_ifr_ifru { ifru_addr });
}

/// A refusal shows as a guest that nobody hears.
fn configure(interface: &str, request: libc::Ioctl, what: libc::__c_anonymous_ifr_ifru) {
    let Ok(socket) = std::net::UdpSocket::bind("0.0.0.0:0") else { return };
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (place, byte) in ifr_name.iter_mut().zip(interface.bytes().take(libc::IFNAMSIZ - 1)) {
        *place = byte.cast_signed();
    }
    let mut wish = libc::ifreq { ifr_name, ifr_ifru: what };
    // SAFETY: the structure is complete, of the request's type, and outlives the call.
    let _ = unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut wish) };
}

/// The guest's monotonic clock.
pub(crate) fn uptime() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
