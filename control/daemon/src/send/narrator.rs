//! Tells the operator what the move does, and keeps what the report needs of it.

use std::time::Duration;

use vmferry_datapath::{Meter, MeterReader};
use vmferry_guest::DeviceFacts;
use vmferry_session::{
    DeviceDrain, DeviceForecast, Progress as SessionProgress, SourceAction, SourceSession, Term,
};

use crate::progress::{Glance, Progress};
use crate::report::{
    DeviceLine, LaneReport, MoveReport, PhaseReport, PredictedMs, TermLine, cpu_seconds, own_memory_bytes,
};

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
    told_devices: bool,
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
            told_devices: false,
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
        self.tell_devices(now, session);
    }

    /// What each device adds, told once: after round 1 nothing was measured yet.
    fn tell_devices(&mut self, now: Duration, session: &SessionProgress) {
        if self.told_devices || session.round < 2 {
            return;
        }
        self.told_devices = true;
        let devices = session.forecast.iter().flat_map(|forecast| &forecast.devices);
        for sentence in devices.flat_map(DeviceForecast::sentences) {
            self.progress.step(now, &sentence);
        }
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
        report.predicted_blackout_ms = session.forecast().map(|f| PredictedMs::from(f.total));
        report.terms = term_lines(session);
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

/// Every term of the blackout beside its prediction.
fn term_lines(session: &SourceSession) -> Vec<TermLine> {
    let measured = session.blackout().map(|_| session.measured_ms()).unwrap_or_default();
    let line = |(term, predicted): (&Term, &vmferry_session::Interval)| TermLine {
        name: format!("{term:?}").to_lowercase(),
        predicted_ms: (*predicted).into(),
        measured_ms: measured.get(term).copied(),
    };
    let foreseen = session.forecast().into_iter().flat_map(|forecast| &forecast.terms).map(line);
    // A term that is nothing in this move (no devices, no digest) is no line.
    foreseen.filter(|line| line.predicted_ms.p95 > 0.0).collect()
}

/// What each passed-through device took.
pub(super) fn device_lines(
    devices: &[DeviceFacts],
    session: &SourceSession,
    drains: &[DeviceDrain],
) -> Vec<DeviceLine> {
    let forecasts = session.forecast().map_or(&[][..], |forecast| &forecast.devices);
    let records = session.device_records();
    let line = |device: &DeviceFacts| {
        let forecast = forecasts.iter().find(|forecast| forecast.name == device.name);
        let drain = drains.iter().find(|drain| drain.name == device.name);
        let record = records.iter().find(|record| record.name == device.name);
        DeviceLine {
            name: device.name.clone(),
            what: device.what.clone(),
            pre_copied_bytes: drain.map(|drain| drain.pre_copied.0),
            blackout_bytes: drain.map(|drain| drain.in_blackout.0),
            received_bytes: None,
            load_ms: record.filter(|_| session.blackout().is_some()).map(|record| record.load_ms),
            pinned_bytes: device.pinned.0,
            predicted_state_ms: forecast
                .filter(|_| device.has_stream())
                .map(|forecast| forecast.state.into()),
            predicted_pinned_ms: forecast.filter(|_| device.pinned.0 > 0).map(|f| f.pinned.into()),
        }
    };
    devices.iter().map(line).collect()
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
