//! What is believed about one positive quantity: a posterior in logarithmic space.
//!
//! Normal with unknown mean and variance (conjugate: normal-inverse-gamma); what is predicted for the next value is
//! a Student t, whose tails stay heavy until enough was seen. Older observations fade, because hosts change.

/// Weight of the prior's mean, in observations …
const PRIOR_MEAN_WEIGHT: f64 = 0.7;
/// … and where one measurement tells more than any guess.
const GUESS_MEAN_WEIGHT: f64 = 0.1;
/// Degrees of freedom of the prior's variance, and the 95th percentile of a Student t with as many.
const PRIOR_FREEDOM: f64 = 4.0;
const PRIOR_T95: f64 = 2.132;
/// The 95th percentile of a normal deviate.
pub(super) const Z95: f64 = 1.645;
/// An observation further off counts as this far off (Huber's bound), in scales of what was predicted.
const OUTLIER_SCALES: f64 = 3.0;
/// However narrow the belief, an observation off by this factor counts in full: a host that changed is learned soon.
const OUTLIER_FACTOR_MIN: f64 = 3.0;
/// No quantity here is shorter than a nanosecond or longer than a day, in milliseconds.
const VALUE_RANGE: (f64, f64) = (1e-6, 8.64e7);

/// The posterior of the logarithm of a quantity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Estimate {
    mean: f64,
    mean_weight: f64,
    freedom: f64,
    squares: f64,
    /// What an older observation is worth when a new one comes, 0 to 1.
    memory: f64,
    /// What the prior's mean is worth.
    mean_weight_min: f64,
}

impl Estimate {
    /// Believes p05 and p95; `memory` is what an observation is worth after the next one, 1 to keep all.
    pub(super) fn from_interval(interval: (f64, f64), memory: f64) -> Self {
        Self::prior(interval, memory, PRIOR_MEAN_WEIGHT)
    }

    /// The same for what differs between hosts by factors of a thousand: the first measurement takes its place.
    pub(super) fn from_guess(interval: (f64, f64), memory: f64) -> Self {
        Self::prior(interval, memory, GUESS_MEAN_WEIGHT)
    }

    fn prior((p05, p95): (f64, f64), memory: f64, mean_weight: f64) -> Self {
        let (low, high) = (ln(p05), ln(p95));
        let scale = (high - low).abs() / (2.0 * PRIOR_T95);
        // scale² = squares / freedom · (mean_weight + 1) / mean_weight, solved for squares
        let squares = scale * scale * PRIOR_FREEDOM * mean_weight / (mean_weight + 1.0);
        Self {
            mean: low.midpoint(high),
            mean_weight,
            freedom: PRIOR_FREEDOM,
            squares,
            memory,
            mean_weight_min: mean_weight,
        }
    }

    /// One more was measured, in this move.
    pub(super) fn observe(&mut self, value: f64) {
        self.learn(value, f64::INFINITY);
    }

    /// One more was measured, in a move before this one. One hiccup of a host (a value a hundred times too long, once)
    /// must not spoil the next hundred forecasts; a host that really became slower moves the mean in a few moves.
    pub(super) fn recall(&mut self, value: f64) {
        self.learn(value, (OUTLIER_SCALES * self.scale()).max(OUTLIER_FACTOR_MIN.ln()));
    }

    fn learn(&mut self, value: f64, bound: f64) {
        if !value.is_finite() || value <= 0.0 {
            return;
        }
        self.fade();
        let error = (ln(value) - self.mean).clamp(-bound, bound);
        let weight = self.mean_weight + 1.0;
        self.squares += error * error * self.mean_weight / weight;
        self.mean += error / weight;
        self.mean_weight = weight;
        self.freedom += 1.0;
    }

    /// Older observations lose weight, down to that of the prior; the variance they showed is kept.
    fn fade(&mut self) {
        let variance = self.squares / self.freedom;
        self.mean_weight = (self.mean_weight * self.memory).max(self.mean_weight_min);
        self.freedom = (self.freedom * self.memory).max(PRIOR_FREEDOM);
        self.squares = variance * self.freedom;
    }

    /// One standard deviation of the next value, logarithmic.
    fn scale(&self) -> f64 {
        (self.squares / self.freedom * (self.mean_weight + 1.0) / self.mean_weight).sqrt()
    }

    /// The middle.
    pub(super) fn median(&self) -> f64 {
        self.mean.exp()
    }

    /// The next value at the normal deviate `z`: 0 is the median, 1.645 the p95 of what is predicted.
    pub(super) fn at(&self, z: f64) -> f64 {
        let value = (self.mean + self.scale() * student(z, self.freedom)).exp();
        value.clamp(VALUE_RANGE.0, VALUE_RANGE.1)
    }
}

fn ln(value: f64) -> f64 {
    value.clamp(VALUE_RANGE.0, VALUE_RANGE.1).ln()
}

/// The deviate of a Student t at the same probability as the normal deviate `z` (Cornish and Fisher's expansion;
/// the bounds keep its far tail, where it is wrong, out of reach).
fn student(z: f64, freedom: f64) -> f64 {
    let z = z.clamp(-3.0, 3.0);
    let (z3, z5) = (z.powi(3), z.powi(5));
    z + (z3 + z) / (4.0 * freedom) + (5.0 * z5 + 16.0 * z3 + 3.0 * z) / (96.0 * freedom * freedom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prior_gives_back_its_interval() {
        let estimate = Estimate::from_interval((2.0, 15.0), 1.0);
        assert!((estimate.at(-Z95) - 2.0).abs() < 0.1, "{}", estimate.at(-Z95));
        assert!((estimate.at(Z95) - 15.0).abs() < 0.6, "{}", estimate.at(Z95));
        assert!((estimate.median() - 30.0_f64.sqrt()).abs() < 1e-9);
    }

    #[test]
    fn observations_move_and_narrow_it() {
        let mut estimate = Estimate::from_interval((2.0, 15.0), 1.0);
        for value in [30.0, 31.0, 29.0, 30.5, 29.5].repeat(10) {
            estimate.observe(value);
        }
        assert!((estimate.median() - 30.0).abs() < 1.5, "{}", estimate.median());
        assert!(estimate.at(Z95) / estimate.at(-Z95) < 2.5, "narrower than the prior's factor of 7.5");
    }

    #[test]
    fn one_hiccup_hardly_counts_and_a_slower_host_is_learned() {
        let mut estimate = Estimate::from_interval((2.0, 15.0), 0.97);
        (0..20).for_each(|_| estimate.recall(5.0));
        let before = estimate.at(Z95);
        estimate.recall(5_000.0);
        assert!(estimate.at(Z95) < 3.0 * before, "{} after {before}", estimate.at(Z95));
        (0..12).for_each(|_| estimate.recall(50.0));
        assert!(estimate.at(Z95) > 50.0, "{}", estimate.at(Z95));
    }

    #[test]
    fn nonsense_is_no_observation() {
        let mut estimate = Estimate::from_interval((1.0, 2.0), 1.0);
        let before = estimate;
        for value in [f64::NAN, f64::INFINITY, 0.0, -1.0] {
            estimate.observe(value);
        }
        assert_eq!(estimate, before);
    }
}
