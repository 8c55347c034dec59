//! What a move reports at its end: one JSON object, or a short table for a person.

use serde::Serialize;

use crate::failure::Failure;

/// p05, p50 and p95 of the predicted blackout.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct PredictedMs {
    /// One in twenty moves is shorter.
    pub p05: f64,
    /// Half of the moves are shorter.
    pub p50: f64,
    /// One in twenty moves is longer.
    pub p95: f64,
}

/// Guest memory on the wire.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct RamReport {
    /// Guest memory.
    pub total_bytes: u64,
    /// On the wire, headers and tags included.
    pub wire_bytes: u64,
    /// Of pages, before compression.
    pub page_bytes: u64,
    /// Pages that cost a bit.
    pub zero_pages: u64,
    /// Rounds of pre-copy, the last one in the blackout included.
    pub rounds: u32,
}

/// How long one phase took.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PhaseReport {
    /// The phase's name, as in the state diagram.
    pub name: String,
    /// Milliseconds.
    pub ms: f64,
}

/// What one lane did.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct LaneReport {
    /// The CPU that its thread was pinned to.
    pub cpu: Option<usize>,
    /// On the wire.
    pub bytes: u64,
    /// Share of the time that the lane worked rather than waited.
    pub busy_ratio: f64,
}

/// What one passed-through device took. Fields that only one side knows are null on the other.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DeviceLine {
    /// The operator's name for it.
    pub name: String,
    /// Driver, model and address, for people.
    pub what: String,
    /// State that left while the guest ran (source).
    pub pre_copied_bytes: Option<u64>,
    /// State that left in the blackout (source).
    pub blackout_bytes: Option<u64>,
    /// State that arrived (target).
    pub received_bytes: Option<u64>,
    /// From the last byte of its state until it had loaded it, by the target's clock.
    pub load_ms: Option<f64>,
    /// Memory that it has mapped for DMA and nobody can tell.
    pub pinned_bytes: u64,
    /// What moving and loading its state was predicted to add (source).
    pub predicted_state_ms: Option<PredictedMs>,
    /// What its pinned pages were predicted to add (source).
    pub predicted_pinned_ms: Option<PredictedMs>,
}

/// One term of the blackout: as predicted when the switchover was decided, and as it came.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TermLine {
    /// As in the README's formula.
    pub name: String,
    /// As predicted.
    pub predicted_ms: PredictedMs,
    /// As measured; null for a move that did not come so far.
    pub measured_ms: Option<f64>,
}

/// The last line of `--json`. Fields that only one side knows are null on the other.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct MoveReport {
    /// `completed`, or how it failed: `cancelled`, `failed`, `refused`, `in-doubt`.
    pub status: String,
    /// One sentence, when it did not complete.
    #[serde(rename = "error-desc", skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// First connection to last word.
    pub total_ms: f64,
    /// Source stopped to target running, by the source's clock.
    pub blackout_ms: Option<f64>,
    /// As predicted when the switchover was decided.
    pub predicted_blackout_ms: Option<PredictedMs>,
    /// Guest memory.
    pub ram: RamReport,
    /// Page bytes moved in a second of copying.
    pub throughput_bytes_per_s: f64,
    /// CPU time of this process, user and system.
    pub cpu_seconds: f64,
    /// In order.
    pub phases: Vec<PhaseReport>,
    /// In order of lane number.
    pub lanes: Vec<LaneReport>,
    /// The VMM's own state.
    pub device_state_bytes: u64,
    /// Passed-through devices.
    pub devices: Vec<DeviceLine>,
    /// The blackout, term by term (source).
    pub terms: Vec<TermLine>,
    /// `aes-256-gcm (PROVIDER)` or `none`.
    pub cipher: String,
    /// What tracked the guest's writes.
    pub tracker: Option<String>,
    /// Time per dirty scan, worst.
    pub scan_ms_max: Option<f64>,
    /// Peak resident memory of this process, guest memory that it maps left out.
    pub own_memory_peak_bytes: u64,
    /// Whether both digests of all memory were equal; null without `--verify`.
    pub verified: Option<bool>,
    /// Connections that were turned away (target).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turned_away: Option<u64>,
    /// What an operator should know, such as a fallback that was taken.
    pub notes: Vec<String>,
}

impl MoveReport {
    /// Records how the move ended.
    pub fn conclude(&mut self, result: &Result<(), Failure>) {
        match result {
            Ok(()) => self.status = "completed".into(),
            Err(failure) => {
                self.status = failure.status().into();
                self.error = Some(failure.to_string());
            }
        }
    }

    /// A few lines for a person.
    #[must_use]
    pub fn to_table(&self) -> String {
        let mut lines = vec![format!("status      {}", self.status)];
        lines.push(format!("total       {:.0} ms, {} rounds", self.total_ms, self.ram.rounds));
        if let Some(blackout) = self.blackout_ms {
            let predicted = self
                .predicted_blackout_ms
                .map(|p| format!(" (predicted {:.1} to {:.1} ms, median {:.1})", p.p05, p.p95, p.p50))
                .unwrap_or_default();
            lines.push(format!("blackout    {blackout:.1} ms{predicted}"));
        }
        lines.push(format!(
            "memory      {} of guest RAM: {} of pages sent, {} on the wire, {} zero pages",
            human(self.ram.total_bytes),
            human(self.ram.page_bytes),
            human(self.ram.wire_bytes),
            self.ram.zero_pages
        ));
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rate for a person, never negative"
        )]
        let rate = self.throughput_bytes_per_s as u64;
        lines.push(format!(
            "rate        {}/s over {} lanes, {:.2} CPU seconds",
            human(rate),
            self.lanes.len(),
            self.cpu_seconds
        ));
        lines.push(format!(
            "state       {} of device state, cipher {}",
            human(self.device_state_bytes),
            self.cipher
        ));
        lines.extend(self.devices.iter().map(DeviceLine::to_line));
        lines.extend(self.terms.iter().map(TermLine::to_line));
        if let Some(verified) = self.verified {
            lines.push(format!(
                "verified    {}",
                if verified { "every page equal on both sides" } else { "PAGES DIFFER" }
            ));
        }
        let phases: Vec<String> = self.phases.iter().map(|p| format!("{} {:.1}", p.name, p.ms)).collect();
        lines.push(format!("phases      {} (ms)", phases.join(", ")));
        lines.extend(self.notes.iter().map(|note| format!("note        {note}")));
        lines.join("\n")
    }
}

impl DeviceLine {
    fn to_line(&self) -> String {
        let bytes = |what: &str, bytes: Option<u64>| bytes.map(|bytes| format!("{} {what}", human(bytes)));
        let mut said: Vec<String> = [
            bytes("pre-copied", self.pre_copied_bytes),
            bytes("in the blackout", self.blackout_bytes),
            bytes("received", self.received_bytes),
            self.load_ms.map(|ms| format!("loaded in {ms:.1} ms")),
        ]
        .into_iter()
        .flatten()
        .collect();
        if self.pinned_bytes > 0 {
            said.push(format!("{} pinned", human(self.pinned_bytes)));
        }
        format!("device      {} ({}): {}", self.name, self.what, said.join(", "))
    }
}

impl TermLine {
    fn to_line(&self) -> String {
        let PredictedMs { p05, p95, .. } = self.predicted_ms;
        let measured = self.measured_ms.map_or_else(String::new, |ms| format!(", was {ms:.1}"));
        format!("term        {}: predicted {p05:.1} to {p95:.1} ms{measured}", self.name)
    }
}

impl From<vmferry_session::Interval> for PredictedMs {
    fn from(interval: vmferry_session::Interval) -> Self {
        Self { p05: interval.p05_ms, p50: interval.p50_ms, p95: interval.p95_ms }
    }
}

/// Bytes for a person.
#[must_use]
pub fn human(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

/// CPU seconds of this process so far.
#[must_use]
pub fn cpu_seconds() -> f64 {
    use nix::sys::resource::{UsageWho, getrusage};
    let Ok(usage) = getrusage(UsageWho::RUSAGE_SELF) else { return 0.0 };
    let seconds = |t: nix::sys::time::TimeVal| {
        use nix::sys::time::TimeValLike;
        #[expect(clippy::cast_precision_loss, reason = "microseconds of one process fit in 52 bits")]
        let us = t.num_microseconds() as f64;
        us / 1e6
    };
    seconds(usage.user_time()) + seconds(usage.system_time())
}

/// Memory that is this process's own: anonymous pages now. Guest memory is file-backed and counted elsewhere.
#[must_use]
pub fn own_memory_bytes() -> u64 {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return 0 };
    status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .and_then(|rest| rest.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}
