//! What finished moves say about the forecasts: is their middle off, and are they as wide as they claim?
//!
//! Split-conformal in spirit: the last moves' errors, measured in half-widths of the forecast of their time, give
//! the factor by which the next interval is widened or narrowed, so that nine of ten would have been inside.

use super::{Interval, MoveRecord};

/// Moves that are looked back upon.
const WINDOW: usize = 60;
/// Moves after which the past weighs as much as the assumption that nothing is wrong.
const PATIENCE: f64 = 3.0;
const COVERAGE: f64 = 0.90;
/// No correction of the middle is larger than this factor, either way.
const FACTOR_MAX: f64 = 5.0;
/// No interval is widened or narrowed further than this, as an exponent: squared already, a factor of 3 is one of 9.
const WIDTH_MAX: f64 = 2.0;

/// A correction of raw forecasts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Calibration {
    /// Factor on the middle, logarithmic.
    shift: f64,
    /// Factor on the half-widths, in logarithmic space.
    width: f64,
}

impl Calibration {
    pub(super) fn learn<'a>(records: impl DoubleEndedIterator<Item = &'a MoveRecord>) -> Self {
        let last: Vec<_> = records.rev().take(WINDOW).filter(|record| usable(record)).collect();
        let trust = trust(last.len());
        let mut errors: Vec<f64> =
            last.iter().map(|record| (record.blackout_ms / record.forecast.raw.p50_ms).ln()).collect();
        errors.sort_by(f64::total_cmp);
        let shift = trust * quantile(&errors, 0.5);
        let mut scaled: Vec<f64> = last.iter().map(|record| half_widths(record, shift)).collect();
        scaled.sort_by(f64::total_cmp);
        let width = quantile(&scaled, COVERAGE);
        let width = if scaled.is_empty() { 0.0 } else { trust * width.max(1.0 / FACTOR_MAX).ln() };
        let bound = FACTOR_MAX.ln();
        Self { shift: shift.clamp(-bound, bound), width: width.exp().clamp(1.0 / FACTOR_MAX, WIDTH_MAX) }
    }

    pub(super) fn apply(&self, raw: Interval) -> Interval {
        let middle = raw.p50_ms * self.shift.exp();
        let stretch = |edge: f64| {
            if raw.p50_ms > 0.0 && edge > 0.0 { middle * (edge / raw.p50_ms).powf(self.width) } else { edge }
        };
        Interval { p05_ms: stretch(raw.p05_ms), p50_ms: middle, p95_ms: stretch(raw.p95_ms) }
    }
}

fn usable(record: &MoveRecord) -> bool {
    let raw = record.forecast.raw;
    let ordered = 0.0 < raw.p05_ms && raw.p05_ms < raw.p50_ms && raw.p50_ms < raw.p95_ms;
    ordered && raw.p95_ms.is_finite() && record.blackout_ms.is_finite() && record.blackout_ms > 0.0
}

/// How far off a move was: 1 is on the edge of its interval.
fn half_widths(record: &MoveRecord, shift: f64) -> f64 {
    let raw = record.forecast.raw;
    let error = (record.blackout_ms / raw.p50_ms).ln() - shift;
    let edge = if error >= 0.0 { raw.p95_ms } else { raw.p05_ms };
    error.abs() / (edge / raw.p50_ms).ln().abs().max(1e-3)
}

fn trust(moves: usize) -> f64 {
    count(moves) / (count(moves) + PATIENCE)
}

fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = (share.clamp(0.0, 1.0) * count(sorted.len())).ceil();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 0 and the length")]
    let at = (at as usize).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(0.0)
}

#[expect(clippy::cast_precision_loss, reason = "a few dozen")]
fn count(moves: usize) -> f64 {
    moves as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::predict::Forecast;

    fn record(blackout_ms: f64) -> MoveRecord {
        let raw = Interval { p05_ms: 50.0, p50_ms: 100.0, p95_ms: 200.0 };
        let forecast = Forecast { total: raw, raw, ..Forecast::default() };
        MoveRecord {
            forecast,
            measured_ms: std::collections::BTreeMap::new(),
            devices: Vec::new(),
            blackout_ms,
        }
    }

    #[test]
    fn without_moves_nothing_is_corrected() {
        let raw = record(1.0).forecast.raw;
        assert_eq!(Calibration::learn([].iter()).apply(raw), raw);
    }

    #[test]
    fn a_bias_is_taken_out_and_a_wide_interval_narrowed() {
        let records: Vec<_> = (0..60).map(|i| record(195.0 + f64::from(i % 10))).collect();
        let corrected = Calibration::learn(records.iter()).apply(record(1.0).forecast.raw);
        assert!((180.0..210.0).contains(&corrected.p50_ms), "{corrected:?}");
        assert!(corrected.p95_ms < 320.0 && corrected.contains(200.0), "{corrected:?}");
    }

    #[test]
    fn too_narrow_an_interval_is_widened() {
        let records: Vec<_> = (0..60).map(|i| record(20.0 * 25.0_f64.powf(f64::from(i) / 59.0))).collect();
        let corrected = Calibration::learn(records.iter()).apply(record(1.0).forecast.raw);
        assert!(corrected.p95_ms > 350.0 && corrected.p05_ms < 30.0, "{corrected:?}");
    }
}
