//! How long the blackout would be: an interval, term by term.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::converge::RoundReport;

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

/// A part of the blackout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Term {
    /// The VMM stops the guest.
    Stop,
    /// The last scan.
    Scan,
    /// The last pages.
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
}

/// A predicted blackout.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// All of it.
    pub total: Interval,
    /// Its parts.
    pub terms: BTreeMap<Term, Interval>,
}

/// One finished move: what was predicted, and what came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoveRecord {
    /// As predicted when the switchover was decided.
    pub forecast: Forecast,
    /// As measured, milliseconds.
    pub measured_ms: BTreeMap<Term, f64>,
    /// The whole blackout, as measured, milliseconds.
    pub blackout_ms: f64,
}

/// Moves of guests of one kind between two hosts, oldest first, bounded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    records: VecDeque<MoveRecord>,
}

impl History {
    /// Records kept at most.
    pub const RECORDS_MAX: usize = 256;

    /// Adds the newest, drops the oldest.
    pub fn push(&mut self, record: MoveRecord) {
        self.records.push_back(record);
        while self.records.len() > Self::RECORDS_MAX {
            self.records.pop_front();
        }
    }
}

/// What is assumed before anything was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Priors {}

impl Priors {
    /// A QEMU guest, under TCG or KVM.
    pub const QEMU: Self = Self {};
    /// A workload process.
    pub const PROCESS: Self = Self {};
}

/// Learns while a move runs and says how long its blackout would be.
#[derive(Clone, Debug)]
pub struct Predictor {}

impl Predictor {
    /// From what is assumed, and from moves before this one.
    pub fn new(_priors: Priors, _history: &History) -> Self {
        Self {}
    }

    /// A round ended.
    pub fn observe(&mut self, _report: &RoundReport) {}

    /// The blackout, if the switchover came now.
    pub fn forecast(&self) -> Forecast {
        Forecast::default()
    }
}
