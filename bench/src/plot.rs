//! Percentile plots: the axis counts nines, so that the tail takes as much room as the middle.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::{
    BLACK, BLUE, ChartBuilder, IntoDrawingArea, LineSeries, PathElement, RED, RGBColor, SVGBackend,
    SeriesLabelPosition, TextStyle, WHITE,
};
use plotters::style::Color;

use crate::histogram::{Series, ms_of};

const SIZE: (u32, u32) = (900, 500);
const POINTS: u32 = 300;
const COLOURS: [RGBColor; 2] = [RED, BLUE];

/// Draws one line for each series, value in milliseconds over percentile.
pub(crate) fn percentiles(path: &Path, title: &str, all: &[Series]) -> Result<()> {
    let curves: Vec<Vec<(f64, f64)>> = all.iter().map(curve).collect();
    let most = |pick: fn(&(f64, f64)) -> f64| curves.iter().flatten().map(pick).fold(0.0, f64::max);
    let (nines, top) = (most(|point| point.0).max(1.0), most(|point| point.1).max(1.0) * 1.05);
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(|error| anyhow!("{error}"))?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, TextStyle::from(("sans-serif", 20)))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..nines, 0.0..top)
        .map_err(|error| anyhow!("{error}"))?;
    chart
        .configure_mesh()
        .x_labels(whole_nines(all) + 1)
        .x_label_formatter(&|nines| format!("{:.4} %", percent(*nines)).replace(".0000", ""))
        .x_desc("percentile")
        .y_desc("ms")
        .draw()
        .map_err(|error| anyhow!("{error}"))?;
    for (series, (points, colour)) in all.iter().zip(curves.into_iter().zip(COLOURS)) {
        let line = chart.draw_series(LineSeries::new(points, colour.stroke_width(2)));
        line.map_err(|error| anyhow!("{error}"))?
            .label(series.name())
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 20, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()
        .map_err(|error| anyhow!("{error}"))?;
    root.present().map_err(|error| anyhow!("{error}"))
}

/// How many nines the longest series can tell.
fn whole_nines(all: &[Series]) -> usize {
    let most = all.iter().map(|series| series.histogram().len()).max().unwrap_or(1);
    usize::try_from(most.max(10).ilog10()).unwrap_or(1)
}

/// (nines, milliseconds) up to the last percentile that this many values can tell.
fn curve(series: &Series) -> Vec<(f64, f64)> {
    let histogram = series.histogram();
    #[expect(clippy::cast_precision_loss, reason = "a count of moves is far below 2^52")]
    let last = (histogram.len() as f64).max(1.0).log10();
    let nines = (0..=POINTS).map(|point| last * f64::from(point) / f64::from(POINTS));
    nines.map(|nines| (nines, ms_of(histogram.value_at_quantile(percent(nines) / 100.0)))).collect()
}

/// One nine is 90 %, two are 99 %.
fn percent(nines: f64) -> f64 {
    100.0 * (1.0 - 10_f64.powf(-nines))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_is_drawn_with_both_lines() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.svg");
        let points: Vec<_> = (1..=200).map(|value| (f64::from(value), f64::from(value % 37))).collect();
        percentiles(
            &path,
            "title",
            &[Series::new("guest gap", points.clone()), Series::new("blackout", points)],
        )
        .unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        assert!(
            text.contains("guest gap") && text.contains("blackout") && text.matches("<polyline").count() >= 2
        );
    }
}
