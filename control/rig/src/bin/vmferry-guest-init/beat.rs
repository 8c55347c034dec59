//! The heart beat: one byte each millisecond (or what `vmferry.beat_ms=` says), and the longest gap by the guest's own clock.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::thread::clock_nanosleep_absolute;
use rustix::time::{ClockId, Timespec};

use crate::sys;

/// Unless the command line says otherwise.
pub(crate) const BEAT_MS: u64 = 1;

/// What the beat has seen.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    beats: AtomicU64,
    longest_gap_ns: AtomicU64,
}

impl Counters {
    pub(crate) fn beats(&self) -> u64 {
        self.beats.load(Ordering::Relaxed)
    }

    /// The longest gap since the last call.
    pub(crate) fn take_gap_us(&self) -> u64 {
        self.longest_gap_ns.swap(0, Ordering::Relaxed) / 1000
    }
}

/// Beats for ever, `every_ms` apart. A beat that comes late is not made up for: the next one follows one interval later.
/// Without a port it only counts, and nobody outside hears it.
pub(crate) fn run(counters: &Counters, every_ms: u64, with_port: bool) {
    let every = every_ms * 1_000_000;
    if with_port && !sys::open_beat_port() {
        return;
    }
    let mut last = now_ns();
    let mut due = last + every;
    let mut count = 0_u8;
    loop {
        sleep_until(due);
        if with_port {
            sys::beat(count);
        }
        step(counters, &mut last, &mut due, every);
        count = count.wrapping_add(1);
    }
}

fn step(counters: &Counters, last: &mut u64, due: &mut u64, every: u64) {
    let now = now_ns();
    counters.beats.fetch_add(1, Ordering::Relaxed);
    counters.longest_gap_ns.fetch_max(now - *last, Ordering::Relaxed);
    *last = now;
    *due = (*due + every).max(now);
}

fn now_ns() -> u64 {
    u64::try_from(sys::uptime().as_nanos()).unwrap_or(u64::MAX)
}

fn sleep_until(due_ns: u64) {
    let seconds = i64::try_from(due_ns / 1_000_000_000).unwrap_or(i64::MAX);
    let rest = i64::try_from(due_ns % 1_000_000_000).unwrap_or(0);
    let _ = clock_nanosleep_absolute(ClockId::Monotonic, &Timespec { tv_sec: seconds, tv_nsec: rest });
}
