//! Tells the operator what the move does, and keeps what the report needs of it.

use std::time::Duration;

use vmferry_datapath::{Meter, MeterReader};
use vmferry_session::{Progress as SessionProgress, SourceAction, SourceSession};

use crate::progress::{Glance, Progress};
use crate::report::{LaneReport, MoveReport, PhaseReport, PredictedMs, cpu_seconds, own_memory_bytes};

/// Between two looks at the clock and the meters while pages flow.
const GLANCE_EVERY: Duration = Duration::from_millis(100);

/// Speaks for the source.
pub(super) struct Narrator {
    progress: Progress,
    meters: Option<MeterReader>,
    ram_bytes: u64,
    glanced: Duration,
    wire_bytes: u64,
    memory_peak: u64,
}

impl Narrator {
    pub(super) fn new(ram_bytes: u64) -> Self {
        Self {
            progress: Progress::new(),
            meters: None,
            ram_bytes,
            glanced: Duration::ZERO,
            wire_bytes: 0,
            memory_peak: own_memory_bytes(),
        }
    }

    /// Reads the lanes' meters from now on.
    pub(super) fn watch(&mut self, meters: MeterReader) {
        self.meters = Some(meters);
    }

    /// While pages flow; cheap when called often. Gives what it read, every so often.
    pub(super) fn glance(&mut self, now: Duration, round: u32, session: &SourceSession) -> Option<Meter> {
        if now < self.glanced + GLANCE_EVERY {
            return None;
        }
        let meter = self.meters.as_ref()?.read();
        let since = (now - self.glanced).as_secs_f64();
        self.memory_peak = self.memory_peak.max(own_memory_bytes());
        let mut glance = glance(&session.progress());
        let moved = meter.page_bytes.saturating_sub(glance.sent_bytes);
        glance.rate_bytes_per_s = rate(meter.wire_bytes.saturating_sub(self.wire_bytes), since);
        glance.remaining_bytes =
            if round <= 1 { self.ram_bytes } else { glance.remaining_bytes }.saturating_sub(moved);
        (glance.round, glance.sent_bytes) = (round, meter.page_bytes);
        (self.glanced, self.wire_bytes) = (now, meter.wire_bytes);
        self.progress.glance(now, &glance);
        Some(meter)
    }

    /// After a round.
    pub(super) fn round(&mut self, now: Duration, session: &SessionProgress) {
        self.memory_peak = self.memory_peak.max(own_memory_bytes());
        self.progress.glance(now, &glance(session));
    }

    /// Before an action. Silent in the blackout, where a slow terminal would be downtime.
    pub(super) fn action(&self, now: Duration, action: &SourceAction) {
        if let SourceAction::OpenLanes(agreement) = action {
            self.progress
                .step(now, &format!("the target agreed: {} lanes, {:?}", agreement.lanes, agreement.cipher));
        }
        if let SourceAction::SetThrottle { percent: percent @ 1.. } = action {
            self.progress.step(now, &format!("the guest is slowed down by {percent} %"));
        }
        if let SourceAction::ReconnectAndAsk { attempt: 1 } = action {
            self.progress
                .step(now, "the link was lost after Commit: asking the target whether it runs the guest");
        }
    }

    pub(super) fn finish(&self) {
        self.progress.finish();
    }

    pub(super) fn fill(&self, report: &mut MoveReport, session: &SourceSession, meter: Option<Meter>) {
        let progress = session.progress();
        report.ram.rounds = progress.round + u32::from(session.blackout().is_some());
        report.predicted_blackout_ms = session.forecast().map(|f| PredictedMs {
            p05: f.total.p05_ms,
            p50: f.total.p50_ms,
            p95: f.total.p95_ms,
        });
        report.phases =
            session.phases().into_iter().map(|span| PhaseReport { name: span.name, ms: span.ms }).collect();
        report.cpu_seconds = cpu_seconds();
        report.own_memory_peak_bytes = self.memory_peak.max(own_memory_bytes());
        if let Some(meter) = meter {
            let copying: f64 = report
                .phases
                .iter()
                .filter(|p| p.name == "copy" || p.name == "last-round")
                .map(|p| p.ms)
                .sum();
            fill_lanes(report, &meter, copying);
        }
    }
}

/// What the lanes did; `copying_ms` is the time that they had.
pub(crate) fn fill_lanes(report: &mut MoveReport, meter: &Meter, copying_ms: f64) {
    report.ram.wire_bytes = meter.wire_bytes;
    report.ram.page_bytes = vmferry_datapath::PageCount(meter.data_pages).bytes().0;
    report.ram.zero_pages = meter.zero_pages;
    #[expect(clippy::cast_precision_loss, reason = "a rate for a report")]
    let bytes = report.ram.page_bytes as f64;
    report.throughput_bytes_per_s = if copying_ms > 0.0 { bytes / (copying_ms / 1e3) } else { 0.0 };
    #[expect(clippy::cast_precision_loss, reason = "a ratio for a report")]
    let busy = |busy: u64, elapsed: u64| if elapsed == 0 { 0.0 } else { busy as f64 / elapsed as f64 };
    report.lanes = meter
        .lanes
        .iter()
        .map(|lane| LaneReport {
            cpu: lane.cpu,
            bytes: lane.wire_bytes,
            busy_ratio: busy(lane.busy_ns, lane.elapsed_ns),
        })
        .collect();
}

fn rate(bytes: u64, seconds: f64) -> u64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate for a person")]
    let bytes = bytes as f64;
    whole(bytes / seconds.max(1e-6))
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "rates for a person, never negative"
)]
fn whole(rate: f64) -> u64 {
    rate.max(0.0) as u64
}

fn glance(session: &SessionProgress) -> Glance {
    Glance {
        round: session.round,
        sent_bytes: session.sent.0,
        remaining_bytes: session.remaining.0,
        rate_bytes_per_s: whole(session.rate),
        dirty_bytes_per_s: whole(session.dirty_rate),
        predicted_ms: session.forecast.as_ref().map(|f| (f.total.p05_ms, f.total.p50_ms, f.total.p95_ms)),
    }
}
