//! Rows of latencies as HdrHistograms: a table row, and an interval log that histogram viewers open.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use hdrhistogram::serialization::V2DeflateSerializer;
use hdrhistogram::serialization::interval_log::{IntervalLogWriterBuilder, Tag};

/// A millisecond has a thousand microseconds, the histograms' unit.
const US_A_MS: f64 = 1000.0;
/// Moves in one interval of the log.
const INTERVAL_POINTS: usize = 10;

/// A named row of (offset, value), both in milliseconds.
#[derive(Debug, Clone)]
pub(crate) struct Series {
    name: String,
    points: Vec<(f64, f64)>,
}

impl Series {
    pub(crate) fn new(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.to_owned(), points }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The values as a histogram of microseconds.
    pub(crate) fn histogram(&self) -> Histogram<u64> {
        histogram_of(&self.points)
    }

    /// Name, count, min, p50, p90, p99, p99.9, max.
    pub(crate) fn row(&self) -> Vec<String> {
        let histogram = self.histogram();
        let told = |us: u64| format!("{:.2}", ms_of(us));
        let mut row = vec![self.name.clone(), histogram.len().to_string(), told(histogram.min())];
        row.extend([0.5, 0.9, 0.99, 0.999].map(|quantile| told(histogram.value_at_quantile(quantile))));
        row.push(told(histogram.max()));
        row
    }
}

fn histogram_of(points: &[(f64, f64)]) -> Histogram<u64> {
    let mut histogram =
        Histogram::new(3).unwrap_or_else(|error| unreachable!("3 digits are allowed: {error}"));
    for (_, value) in points {
        // The histogram grows by itself; only a value beyond u64 would not fit.
        let _ = histogram.record(us_of(*value));
    }
    histogram
}

/// Milliseconds of microseconds.
pub(crate) fn ms_of(us: u64) -> f64 {
    Duration::from_micros(us).as_secs_f64() * US_A_MS
}

fn us_of(ms: f64) -> u64 {
    Duration::try_from_secs_f64(ms.max(0.0) / US_A_MS)
        .map_or(0, |time| u64::try_from(time.as_micros()).unwrap_or(0))
}

/// Writes every series, tagged with its name, ten values an interval.
pub(crate) fn write_log(path: &Path, all: &[Series], began: SystemTime) -> Result<()> {
    let mut file =
        BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?);
    let mut serializer = V2DeflateSerializer::new();
    let mut log = IntervalLogWriterBuilder::new()
        .add_comment("vmferry-bench downtime; values in microseconds")
        .with_start_time(began)
        .with_base_time(began)
        .with_max_value_divisor(US_A_MS)
        .begin_log_with(&mut file, &mut serializer)?;
    for series in all {
        let tag = series.name.replace([' ', ','], "-");
        for points in series.points.chunks(INTERVAL_POINTS) {
            let (from, to) = (points[0].0, points[points.len() - 1]);
            let start = Duration::from_micros(us_of(from));
            let length = Duration::from_micros(us_of(to.0 - from + to.1));
            let histogram = histogram_of(points);
            log.write_histogram(&histogram, start, length, Tag::new(&tag))
                .map_err(|error| anyhow::anyhow!("cannot write an interval: {error:?}"))?;
        }
    }
    file.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_come_back_in_milliseconds() {
        let points = (1..=1000).map(|value| (f64::from(value), f64::from(value) / 10.0)).collect();
        let row = Series::new("gap", points).row();
        assert_eq!(row[..3], ["gap", "1000", "0.10"]);
        let median: f64 = row[3].parse().unwrap();
        assert!((49.9..50.1).contains(&median), "{median}");
    }

    #[test]
    fn the_log_reads_back() {
        use hdrhistogram::serialization::interval_log::{IntervalLogIterator, LogEntry};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.hlog");
        let points: Vec<_> = (0..25).map(|value| (f64::from(value) * 100.0, 5.0)).collect();
        write_log(&path, &[Series::new("guest gap", points)], SystemTime::UNIX_EPOCH).unwrap();
        let text = std::fs::read(path).unwrap();
        let entries: Vec<_> = IntervalLogIterator::new(&text).map(|entry| entry.unwrap()).collect();
        let intervals = entries.iter().filter(|entry| matches!(entry, LogEntry::Interval(_))).count();
        assert_eq!(intervals, 3);
    }
}
