//! Adding distributions by sampling, with the same numbers every time.

use super::Interval;

/// Samples per forecast: enough that p05 and p95 stand on 25 each, few enough for a tenth of a millisecond.
pub(super) const SAMPLES: usize = 512;

/// A stream of normal deviates from a fixed seed: forecasts differ because reports differ, never by luck.
pub(super) struct Deviates {
    state: u64,
    spare: Option<f64>,
}

impl Deviates {
    pub(super) const fn new() -> Self {
        Self { state: 0x5EED_0F0A_F00D, spare: None }
    }

    /// splitmix64, to a number strictly between 0 and 1.
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let bits = u32::try_from((z ^ (z >> 31)) >> 32).unwrap_or(u32::MAX);
        (f64::from(bits) + 0.5) / 4_294_967_296.0
    }

    /// The next one (Box and Muller).
    pub(super) fn normal(&mut self) -> f64 {
        if let Some(spare) = self.spare.take() {
            return spare;
        }
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.uniform()).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }
}

/// p05, p50 and p95 of samples.
pub(super) fn interval(mut samples: Vec<f64>) -> Interval {
    samples.sort_by(f64::total_cmp);
    let at =
        |per_cent: usize| samples.get((samples.len() * per_cent / 100).min(samples.len().saturating_sub(1)));
    let at = |per_cent| at(per_cent).copied().unwrap_or(0.0);
    Interval { p05_ms: at(5), p50_ms: at(50), p95_ms: at(95) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deviates_are_normal_enough() {
        let mut deviates = Deviates::new();
        let seen = interval((0..20_000).map(|_| deviates.normal()).collect());
        assert!((seen.p05_ms + 1.645).abs() < 0.05 && seen.p50_ms.abs() < 0.05, "{seen:?}");
        assert!((seen.p95_ms - 1.645).abs() < 0.05, "{seen:?}");
    }
}
