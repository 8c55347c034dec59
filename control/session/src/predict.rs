//! How long the blackout would be: an interval, term by term, learned while the guest runs.
//!
//! ```text
//!   blackout = stop + ( last scan + last pages, save ) + devices + close + load + handover + run
//!                       ▲           ▲                    ▲                 ▲
//!                       rounds      residue / rate       state / rate      history of moves, else priors
//! ```
//!
//! Every term is a distribution, not a number: a posterior in logarithmic space that starts from a prior interval and
//! narrows with each observation. They are added by sampling with fixed numbers, so that the same reports give the
//! same forecast. Finished moves then correct the sum: its middle by the median error, its width so that nine of
//! ten of the last moves would have been inside. What must never happen: an interval that is narrow because nothing
//! was measured.

mod calibrate;
mod devices;
mod estimate;
mod predictor;
mod residue;
mod sample;

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

pub use devices::{DeviceForecast, DeviceRecord};
pub use predictor::Predictor;

/// p05, p50 and p95, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// One in twenty is shorter.
    pub p05_ms: f64,
    /// Half are shorter.
    pub p50_ms: f64,
    /// One in twenty is longer.
    pub p95_ms: f64,
}

impl Interval {
    /// Whether a value is inside.
    pub fn contains(&self, ms: f64) -> bool {
        (self.p05_ms..=self.p95_ms).contains(&ms)
    }
}

/// A part of the blackout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Term {
    /// The VMM stops the guest.
    Stop,
    /// The last scan.
    Scan,
    /// The last pages: dirty, held and pinned.
    Pages,
    /// Saving the device state.
    Save,
    /// The scan after it, and the end of the lanes.
    Close,
    /// Loading the device state.
    Load,
    /// The guardian, and the round trips of the handover.
    Handover,
    /// The target's VMM lets the guest run.
    Run,
    /// What passed-through devices add: the rest of their states, and their loads where those end last.
    Devices,
    /// With `--verify`: the digest of all memory, on the source and then on the target.
    Verify,
}

/// A predicted blackout.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// All of it, corrected by what earlier moves taught.
    pub total: Interval,
    /// All of it, before that correction; the correction itself is learned from this one.
    pub raw: Interval,
    /// What it would be if not one page and no device's state were left to send.
    pub floor: Interval,
    /// What it would be if rounds had left nothing that they can send: pinned pages and what devices send after their
    /// stop remain. Its width is the rate's, which rounds narrow.
    #[serde(default)]
    pub least: Interval,
    /// Its parts.
    pub terms: BTreeMap<Term, Interval>,
    /// Pages that it expects to send: p50.
    pub pages: u64,
    /// What each passed-through device adds.
    #[serde(default)]
    pub devices: Vec<DeviceForecast>,
}

/// One finished move: what was predicted, and what came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveRecord {
    /// As predicted when the switchover was decided.
    pub forecast: Forecast,
    /// As measured, milliseconds.
    pub measured_ms: BTreeMap<Term, f64>,
    /// What each passed-through device took.
    #[serde(default)]
    pub devices: Vec<DeviceRecord>,
    /// The whole blackout, as measured, milliseconds.
    pub blackout_ms: f64,
}

/// Moves of guests of one kind between two hosts, oldest first, bounded. A driver that keeps it in a file gives
/// every move the experience of those before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    records: VecDeque<MoveRecord>,
}

impl History {
    /// Records kept at most.
    pub const RECORDS_MAX: usize = 128;

    /// Adds the newest, drops the oldest.
    pub fn push(&mut self, record: MoveRecord) {
        self.records.push_back(record);
        while self.records.len() > Self::RECORDS_MAX {
            self.records.pop_front();
        }
    }

    /// Oldest first.
    pub fn records(&self) -> impl Iterator<Item = &MoveRecord> {
        self.records.iter()
    }
}

/// Whether the driver saves the device state beside the last pages or after them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveOrder {
    /// At the same time: the longer one counts.
    BesidePages,
    /// One after the other: the sum counts.
    AfterPages,
}

/// What is assumed before anything was measured: p05 and p95 of each term, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Priors {
    /// How saving and the last pages are ordered.
    pub save_order: SaveOrder,
    /// [`Term::Stop`]
    pub stop_ms: (f64, f64),
    /// [`Term::Scan`]
    pub scan_ms: (f64, f64),
    /// [`Term::Save`]
    pub save_ms: (f64, f64),
    /// [`Term::Close`]
    pub close_ms: (f64, f64),
    /// [`Term::Load`]
    pub load_ms: (f64, f64),
    /// [`Term::Handover`]
    pub handover_ms: (f64, f64),
    /// [`Term::Run`]
    pub run_ms: (f64, f64),
}

impl Priors {
    /// A QEMU guest, under TCG or KVM: its device state goes through QMP and a migration stream.
    pub const QEMU: Self = Self {
        save_order: SaveOrder::AfterPages,
        stop_ms: (2.0, 15.0),
        scan_ms: (0.1, 5.0),
        save_ms: (5.0, 35.0),
        close_ms: (0.3, 6.0),
        load_ms: (5.0, 35.0),
        handover_ms: (0.3, 5.0),
        run_ms: (1.0, 5.0),
    };
    /// A workload process: a message on a socket each.
    pub const PROCESS: Self = Self {
        save_order: SaveOrder::AfterPages,
        stop_ms: (0.05, 3.0),
        scan_ms: (0.05, 3.0),
        save_ms: (0.05, 3.0),
        close_ms: (0.2, 4.0),
        load_ms: (0.05, 3.0),
        handover_ms: (0.3, 4.0),
        run_ms: (0.05, 2.0),
    };

    fn of(&self, term: Term) -> Option<(f64, f64)> {
        match term {
            Term::Stop => Some(self.stop_ms),
            Term::Scan => Some(self.scan_ms),
            Term::Save => Some(self.save_ms),
            Term::Close => Some(self.close_ms),
            Term::Load => Some(self.load_ms),
            Term::Handover => Some(self.handover_ms),
            Term::Run => Some(self.run_ms),
            Term::Pages | Term::Devices | Term::Verify => None,
        }
    }
}
