//! The writers: threads that each own a share of the memory.
//!
//! A writer holds its bench's lock while it writes, and looks at the word to go on under that lock. So whoever has
//! taken back the word and then held every lock once knows that nobody writes any more.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use vmferry_workload::{MappedPages, Pace, Plan, Registers, Report, Verifier, Writer};

/// Pages written under one lock: what a pause may have to wait for.
const WRITE_AT_ONCE: u64 = 64;
/// Pages verified in one turn.
const VERIFY_AT_ONCE: u64 = 2;
/// How long a writer sleeps when nothing is due.
const IDLE: Duration = Duration::from_millis(1);

struct Bench {
    memory: MappedPages,
    writer: Writer,
    verifier: Verifier,
    pace: Pace,
}

struct Station {
    bench: Mutex<Bench>,
    changed: Condvar,
    go: AtomicBool,
    over: AtomicBool,
    throttle_percent: AtomicU8,
}

/// All writers of a workload.
pub(crate) struct Crew {
    stations: Vec<Arc<Station>>,
    threads: Vec<JoinHandle<()>>,
}

/// What a crew has done.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) plans: Vec<String>,
    pub(crate) writes: u64,
    pub(crate) verified: u64,
    pub(crate) wrong: u64,
}

impl Crew {
    /// Gives every page its first version; the writers wait for `go`.
    pub(crate) fn fresh(memory: &File, plans: Vec<Plan>) -> std::io::Result<Self> {
        let crew = Self::resume(memory, plans.into_iter().map(Registers::new).collect())?;
        for station in &crew.stations {
            let mut bench = station.lock();
            let Bench { memory, writer, .. } = &mut *bench;
            writer.fill(memory);
        }
        Ok(crew)
    }

    /// Takes over where other writers stopped; they wait for `go`.
    pub(crate) fn resume(memory: &File, registers: Vec<Registers>) -> std::io::Result<Self> {
        let (mut stations, mut first) = (Vec::new(), 0);
        for registers in registers {
            let pages = registers.plan.pages;
            let share = MappedPages::shared(memory, first, usize::try_from(pages).unwrap_or(usize::MAX))?;
            let pace = Pace::new(registers.plan.rate, now());
            let bench =
                Bench { memory: share, writer: Writer::resume(registers), verifier: Verifier::new(), pace };
            stations.push(Arc::new(Station::new(bench)));
            first += pages;
        }
        let threads =
            stations.iter().map(Arc::clone).map(|station| std::thread::spawn(move || station.work()));
        Ok(Self { threads: threads.collect(), stations })
    }

    /// Lets the writers write.
    pub(crate) fn go(&self) {
        for station in &self.stations {
            let mut bench = station.lock();
            bench.pace = Pace::new(bench.writer.registers().plan.rate, now());
            station.go.store(true, Ordering::Release);
            station.changed.notify_all();
        }
    }

    /// Returns when every writer stands between two pages and will not write again before `go`.
    pub(crate) fn halt(&self) {
        self.stations.iter().for_each(|station| station.go.store(false, Ordering::Release));
        self.stations.iter().for_each(|station| drop(station.lock()));
    }

    /// The registers; only those of a halted crew stay true.
    pub(crate) fn registers(&self) -> Vec<Registers> {
        self.stations.iter().map(|station| station.lock().writer.registers().clone()).collect()
    }

    pub(crate) fn throttle(&self, percent: u8) {
        self.stations.iter().for_each(|station| station.throttle_percent.store(percent, Ordering::Relaxed));
    }

    /// Verifies every page; each writer waits while its share is looked at.
    pub(crate) fn verify(&self) -> Report {
        let mut sum = Report::default();
        for station in &self.stations {
            let bench = station.lock();
            let found = bench.verifier.all(&bench.memory, bench.writer.registers());
            sum.pages += found.pages;
            sum.wrong += found.wrong;
            sum.faults.extend(found.faults);
        }
        sum
    }

    /// Changes every writer's plan; `rate` is each writer's own.
    pub(crate) fn set(&self, key: &str, value: &str) -> Result<(), String> {
        for station in &self.stations {
            let mut bench = station.lock();
            bench.writer.set(key, value).map_err(|error| error.to_string())?;
            bench.pace = Pace::new(bench.writer.registers().plan.rate, now());
        }
        Ok(())
    }

    pub(crate) fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        for station in &self.stations {
            let bench = station.lock();
            let (registers, found) = (bench.writer.registers(), bench.verifier.found());
            tally.plans.push(registers.plan.to_string());
            tally.writes += registers.writes();
            tally.verified += found.pages;
            tally.wrong += found.wrong;
        }
        tally
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for station in &self.stations {
            let bench = station.lock();
            station.over.store(true, Ordering::Release);
            drop(bench);
            station.changed.notify_all();
        }
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

impl Station {
    fn new(bench: Bench) -> Self {
        let (go, over, throttle_percent) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU8::new(0));
        Self { bench: Mutex::new(bench), changed: Condvar::new(), go, over, throttle_percent }
    }

    fn lock(&self) -> MutexGuard<'_, Bench> {
        self.bench.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while !self.over.load(Ordering::Acquire) {
            let began = now();
            let wrote = self.turn();
            std::thread::sleep(self.rest_after(wrote, now().saturating_sub(began)));
        }
    }

    /// One turn under the lock; gives how many pages were written.
    fn turn(&self) -> u64 {
        let mut bench = self.lock();
        while !self.go.load(Ordering::Acquire) {
            if self.over.load(Ordering::Acquire) {
                return 0;
            }
            bench = self.changed.wait(bench).unwrap_or_else(PoisonError::into_inner);
        }
        let Bench { memory, writer, verifier, pace } = &mut *bench;
        let due = pace.due(now()).min(WRITE_AT_ONCE);
        writer.write(memory, due);
        pace.wrote(due);
        verifier.some(memory, writer.registers(), VERIFY_AT_ONCE);
        due
    }

    /// A throttled writer rests `percent` of its time, an idle one a moment.
    fn rest_after(&self, wrote: u64, worked: Duration) -> Duration {
        let percent = u32::from(self.throttle_percent.load(Ordering::Relaxed).min(99));
        if wrote == 0 {
            return IDLE;
        }
        worked * percent / (100 - percent)
    }
}

/// This host's monotonic clock, the same in every process.
pub(crate) fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
