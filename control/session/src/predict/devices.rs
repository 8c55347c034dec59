//! What passed-through devices add: the rest of their states over the lanes' rate, their loads, and what they pin.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use vmferry_datapath::{ByteLen, PAGE_BYTES};

use super::estimate::{Estimate, Z95};
use super::{History, Interval};
use crate::devices::DeviceReport;

/// Milliseconds that a device takes from the last byte of its state until it has loaded it, before any was seen.
const LOAD_MS: (f64, f64) = (0.05, 30.0);
/// What a load's observation is worth after the next one.
const LOAD_MEMORY: f64 = 0.97;

/// A state that is smaller and quicker than this is not worth an operator's time.
const TOLD_BYTES: u64 = 1 << 20;
const TOLD_MS: f64 = 5.0;

/// What one device is expected to add.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceForecast {
    /// Its name.
    pub name: String,
    /// Bytes of state left for the blackout: p50.
    pub state_bytes: u64,
    /// Moving and loading them.
    pub state: Interval,
    /// Bytes that it pins.
    pub pinned_bytes: u64,
    /// Sending those in the blackout; part of the pages.
    pub pinned: Interval,
}

/// One finished move of one device.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DeviceRecord {
    /// Its name.
    pub name: String,
    /// Bytes that left before the pause.
    pub pre_copied_bytes: u64,
    /// Bytes of state in the blackout.
    pub blackout_bytes: u64,
    /// From the last byte of its state until it had loaded it.
    pub load_ms: f64,
}

/// All devices of a guest.
#[derive(Clone, Debug)]
pub(super) struct Devices {
    latest: Vec<DeviceReport>,
    loads: BTreeMap<String, Estimate>,
}

/// One sample of what a device adds, in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct DeviceDraw {
    pub(super) bytes: f64,
    pub(super) moving: f64,
    pub(super) loading: f64,
    pub(super) pinned: f64,
    /// Whether rounds can make `moving` smaller.
    pub(super) shrinks: bool,
}

impl Devices {
    pub(super) fn new(history: &History) -> Self {
        let mut loads: BTreeMap<String, Estimate> = BTreeMap::new();
        for record in history.records().flat_map(|record| &record.devices) {
            let estimate = loads.entry(record.name.clone()).or_insert_with(unknown_load);
            estimate.recall(record.load_ms);
        }
        Self { latest: Vec::new(), loads }
    }

    pub(super) fn observe(&mut self, reports: &[DeviceReport]) {
        self.latest = reports.to_vec();
    }

    pub(super) fn latest(&self) -> &[DeviceReport] {
        &self.latest
    }

    /// State that pre-copy can still make smaller.
    pub(super) fn shrinking(&self) -> ByteLen {
        ByteLen(self.latest.iter().filter(|device| device.pre_copies).map(|device| device.expected.0).sum())
    }

    /// One sample of each device, at `page_ms` a page; the deviates come from `normal`.
    pub(super) fn draw(&self, page_ms: f64, error: f64, mut normal: impl FnMut() -> f64) -> Vec<DeviceDraw> {
        let page = count(PAGE_BYTES as u64);
        // One for all: they load on the same host, and what is not known of one is not known of the others.
        let loading = normal();
        let mut draw = |device: &DeviceReport| {
            let pinned = count(device.pinned.0) / page * page_ms * error;
            if !device.has_stream {
                return DeviceDraw { pinned, ..DeviceDraw::default() };
            }
            let (expected, at_most) = (count(device.expected.0), count(device.at_most.0));
            // `at_most` is the p95.
            let spread = (at_most - expected).max(expected * 0.05) / Z95;
            let bytes = (expected + spread * normal()).max(0.0);
            let load = self.loads.get(&device.name).copied().unwrap_or_else(unknown_load);
            DeviceDraw {
                bytes,
                moving: bytes / page * page_ms,
                loading: load.at(loading),
                pinned,
                shrinks: device.pre_copies,
            }
        };
        self.latest.iter().map(&mut draw).collect()
    }
}

fn unknown_load() -> Estimate {
    Estimate::from_interval(LOAD_MS, LOAD_MEMORY)
}

impl DeviceForecast {
    /// What an operator should know of it: "eth1 pins 512 MiB: adds 140 to 155 ms".
    pub fn sentences(&self) -> Vec<String> {
        let span = |adds: Interval| match (adds.p05_ms, adds.p95_ms) {
            (low, high) if high < 10.0 => format!("adds {low:.1} to {high:.1} ms"),
            (low, high) => format!("adds {low:.0} to {high:.0} ms"),
        };
        let mut said = Vec::new();
        if self.pinned_bytes > 0 {
            said.push(format!("{} pins {}: {}", self.name, size(self.pinned_bytes), span(self.pinned)));
        }
        if self.state_bytes >= TOLD_BYTES || self.state.p50_ms >= TOLD_MS {
            let bytes = size(self.state_bytes);
            said.push(format!("{} has {bytes} of state left: {}", self.name, span(self.state)));
        }
        said
    }
}

fn size(bytes: u64) -> String {
    const KIB: u64 = 1 << 10;
    const MIB: u64 = 1 << 20;
    match bytes {
        _ if bytes >= 10 * MIB => format!("{} MiB", bytes / MIB),
        _ if bytes >= KIB => format!("{} KiB", bytes / KIB),
        _ => format!("{bytes} bytes"),
    }
}

#[expect(clippy::cast_precision_loss, reason = "byte counts of devices stay far below 2^52")]
fn count(bytes: u64) -> f64 {
    bytes as f64
}
