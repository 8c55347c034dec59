//! What the lanes did: counted by each lane alone, read by anyone.
//!
//! A gauge has one writer, so counting is a load and a store, never a locked instruction.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::page::PAGE_BYTES;

/// What one lane did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LaneMeter {
    /// The CPU it is pinned to.
    pub cpu: Option<usize>,
    /// Bytes of the pages it told about, zero pages included.
    pub bytes: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Records.
    pub records: u64,
    /// Time not spent waiting for work or for the link.
    pub busy_ns: u64,
    /// Time since the lane began.
    pub elapsed_ns: u64,
}

/// What a sender or receiver did so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meter {
    /// Lane by lane.
    pub lanes: Vec<LaneMeter>,
    /// Bytes of all pages told about, zero pages included.
    pub page_bytes: u64,
    /// Pages told to be zero.
    pub zero_pages: u64,
    /// Pages whose bytes travelled.
    pub data_pages: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
    /// Bytes of device state.
    pub state_bytes: u64,
}

/// A number with one writer.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, more: u64) {
        self.0.store(self.get().wrapping_add(more), Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a lane writes and a meter reads.
#[derive(Debug, Default)]
pub(crate) struct LaneGauge {
    pub(crate) cpu: Option<usize>,
    pub(crate) records: Count,
    pub(crate) wire_bytes: Count,
    pub(crate) data_pages: Count,
    pub(crate) zero_pages: Count,
    pub(crate) state_bytes: Count,
    waited_ns: Count,
    started: OnceLock<Instant>,
    ended_ns: OnceLock<u64>,
}

impl LaneGauge {
    pub(crate) fn new(cpu: Option<usize>) -> LaneGauge {
        LaneGauge { cpu, ..LaneGauge::default() }
    }

    /// Time since the lane began. The clock starts with the first call.
    pub(crate) fn now(&self) -> Duration {
        #[expect(clippy::disallowed_methods, reason = "a lane drives a link, and so reads the clock")]
        let now = Instant::now();
        now.saturating_duration_since(*self.started.get_or_init(|| now))
    }

    /// Runs something that only waits, and books its time as such.
    pub(crate) fn waiting<T>(&self, wait: impl FnOnce() -> T) -> T {
        let before = self.now();
        let outcome = wait();
        self.waited_ns.add(nanos(self.now().saturating_sub(before)));
        outcome
    }

    /// The lane's thread ends.
    pub(crate) fn end(&self) {
        let _ = self.ended_ns.set(nanos(self.now()));
    }

    fn read(&self) -> LaneMeter {
        let elapsed_ns = self.ended_ns.get().copied().unwrap_or_else(|| nanos(self.now()));
        LaneMeter {
            cpu: self.cpu,
            bytes: (self.data_pages.get() + self.zero_pages.get()) * PAGE_BYTES as u64,
            wire_bytes: self.wire_bytes.get(),
            records: self.records.get(),
            busy_ns: elapsed_ns.saturating_sub(self.waited_ns.get()),
            elapsed_ns,
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Reads the meters of a sender or receiver that is busy.
#[derive(Clone, Debug)]
pub struct MeterReader(Vec<Arc<LaneGauge>>);

impl MeterReader {
    pub(crate) fn new(gauges: Vec<Arc<LaneGauge>>) -> MeterReader {
        MeterReader(gauges)
    }

    /// What was done so far.
    pub fn read(&self) -> Meter {
        Meter::read(&self.0)
    }
}

impl Meter {
    pub(crate) fn read(gauges: &[Arc<LaneGauge>]) -> Meter {
        let lanes: Vec<LaneMeter> = gauges.iter().map(|gauge| gauge.read()).collect();
        let sum = |of: fn(&LaneGauge) -> &Count| gauges.iter().map(|gauge| of(gauge).get()).sum::<u64>();
        let (zero_pages, data_pages) = (sum(|g| &g.zero_pages), sum(|g| &g.data_pages));
        Meter {
            page_bytes: (zero_pages + data_pages) * PAGE_BYTES as u64,
            zero_pages,
            data_pages,
            wire_bytes: sum(|g| &g.wire_bytes),
            state_bytes: sum(|g| &g.state_bytes),
            lanes,
        }
    }
}
