//! The bench's clock, and what is told about a row of measurements.

use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

/// The host's monotonic clock.
#[expect(clippy::disallowed_methods, reason = "a bench reads the clock, and reads it here")]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Minimum, median and maximum of a row.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) min: f64,
    pub(crate) median: f64,
    pub(crate) max: f64,
    pub(crate) count: usize,
}

impl Spread {
    /// The spread of `values`; `None` when there are none.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().filter(|value| value.is_finite()).collect();
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let upper = values[values.len() / 2];
        let median =
            if values.len() % 2 == 1 { upper } else { f64::midpoint(values[values.len() / 2 - 1], upper) };
        Some(Self { min, median, max, count: values.len() })
    }

    /// The spread of pairwise ratios, which a machine that is busy now and then disturbs less than a ratio of medians.
    pub(crate) fn of_ratios(over: &[f64], under: &[f64]) -> Option<Self> {
        Self::of(over.iter().zip(under).map(|(over, under)| over / under))
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = if self.median.abs() >= 100.0 {
            0
        } else if self.median.abs() >= 10.0 {
            1
        } else {
            2
        };
        write!(f, "{:.digits$} / {:.digits$} / {:.digits$}", self.min, self.median, self.max)
    }
}

/// A spread as a table cell.
pub(crate) fn cell(spread: Option<Spread>) -> String {
    spread.map_or_else(|| "-".to_owned(), |spread| spread.to_string())
}

/// Milliseconds with fractions.
pub(crate) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_row_lies_between() {
        let spread = Spread::of([4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!((spread.min, spread.median, spread.max), (1.0, 2.5, 4.0));
        assert_eq!(Spread::of([f64::NAN]), None);
        assert_eq!(Spread::of_ratios(&[2.0, 9.0], &[1.0, 3.0]).unwrap().median, 2.5);
    }
}
