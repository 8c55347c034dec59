//! Many moves there and back of a guest that writes: how long it was away, how long each step took, and whether the
//! prediction had said so.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use clap::Args;
use serde::Serialize;
use serde_json::Value;
use vmferry_rig::Assets;
use vmferry_workload::{PAGE_BYTES, Plan};

use crate::ferry::{Ferry, FerryPlan};
use crate::guest::Traveller;
use crate::histogram::Series;
use crate::measure::{ms, now};
use crate::output::Output;
use crate::{histogram, plot};

/// Switch-overs are short: more than this is a failure, not a slow move.
const MOVE_TIMEOUT: Duration = Duration::from_secs(60);

/// `vmferry-bench downtime`
#[derive(Debug, Args)]
pub(crate) struct DowntimeArgs {
    /// How many moves.
    #[arg(long, default_value_t = 100)]
    moves: u32,
    /// Guest memory; half of it is filled.
    #[arg(long, default_value = "512MiB")]
    ram: ByteSize,
    /// What the guest writes: pages a second, N MiB a second, or max.
    #[arg(long, default_value = "20MiB")]
    rate: String,
    /// Working set.
    #[arg(long, default_value = "64MiB")]
    set: ByteSize,
    /// Acceptable blackout.
    #[arg(long, default_value = "300ms", value_parser = humantime::parse_duration)]
    downtime_limit: Duration,
    /// Where vmferry-downtime.hlog and vmferry-downtime.svg go.
    #[arg(long, default_value = ".")]
    out: PathBuf,
}

/// One move, in milliseconds.
#[derive(Debug, Clone, Serialize)]
struct Move {
    offset_ms: f64,
    total_ms: f64,
    gap_ms: f64,
    blackout_ms: f64,
    predicted: Option<Predicted>,
    phases: Vec<(String, f64)>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Predicted {
    p05: f64,
    p50: f64,
    p95: f64,
}

/// How often the truth fell where the prediction had said.
#[derive(Debug, Clone, Copy, Serialize)]
struct Calibration {
    predictions: usize,
    inside: usize,
    below_p05: usize,
    above_p95: usize,
}

pub(crate) fn run(args: &DowntimeArgs, quick: bool, output: &mut Output) -> Result<()> {
    let assets = Assets::find()?;
    let ferry = Ferry::find()?;
    let folder = tempfile::tempdir()?;
    let keys = folder.path().join("pki");
    ferry.make_keys(&keys)?;
    let page = PAGE_BYTES as u64;
    let (data, set) = (args.ram.as_u64() / 2 / page, args.set.as_u64() / page);
    let plan: Plan =
        format!("pages={data},set={},rate={},zero=50,seed=23", set.min(data), args.rate).parse()?;
    output.say(&format!("booting a guest of {}: {plan}", args.ram));
    let mut traveller = Traveller::boot(&assets, args.ram.as_u64(), plan, &keys)?;
    let limit = args.downtime_limit;
    let ferry_plan =
        FerryPlan { keys: Some(keys), downtime_limit: limit, timeout: MOVE_TIMEOUT, send_words: Vec::new() };
    let wanted = if quick { args.moves.min(5) } else { args.moves };
    let (began, clock) = (SystemTime::now(), now());
    let mut moves = Vec::new();
    for number in 1..=wanted {
        let one =
            one(&mut traveller, &ferry, &ferry_plan, clock).with_context(|| format!("move {number}"))?;
        output.say(&format!(
            "move {number}/{wanted}: gap {:.1} ms, blackout {:.1} ms",
            one.gap_ms, one.blackout_ms
        ));
        moves.push(one);
    }
    traveller.prove()?;
    tell(output, &moves, args, began)
}

fn one(traveller: &mut Traveller, ferry: &Ferry, plan: &FerryPlan, clock: Instant) -> Result<Move> {
    let (source, target) = traveller.ends()?;
    let (from, to) = (source.spec(), target.spec());
    let receiving = ferry.receive(&to, plan)?;
    let start = now();
    let report = ferry.send(&from, receiving, plan)?;
    if !report.converged {
        bail!("the move did not end well: {}", report.send);
    }
    let seen = traveller.arrived(start)?;
    let send = report.send;
    Ok(Move {
        offset_ms: ms(start.duration_since(clock)),
        total_ms: ms(seen.total),
        gap_ms: ms(seen.gap),
        blackout_ms: send["blackout_ms"].as_f64().unwrap_or(f64::NAN),
        predicted: predicted(&send["predicted_blackout_ms"]),
        phases: phases(&send["phases"]),
    })
}

fn predicted(value: &Value) -> Option<Predicted> {
    Some(Predicted { p05: value["p05"].as_f64()?, p50: value["p50"].as_f64()?, p95: value["p95"].as_f64()? })
}

fn phases(value: &Value) -> Vec<(String, f64)> {
    let list = value.as_array().map(Vec::as_slice).unwrap_or_default();
    list.iter()
        .filter_map(|phase| Some((phase["name"].as_str()?.to_owned(), phase["ms"].as_f64()?)))
        .collect()
}

fn calibration(moves: &[Move]) -> Calibration {
    let pairs: Vec<_> = moves.iter().filter_map(|one| Some((one.blackout_ms, one.predicted?))).collect();
    let below_p05 = pairs.iter().filter(|(truth, predicted)| *truth < predicted.p05).count();
    let above_p95 = pairs.iter().filter(|(truth, predicted)| *truth > predicted.p95).count();
    let predictions = pairs.len();
    Calibration { predictions, inside: predictions - below_p05 - above_p95, below_p05, above_p95 }
}

/// One series for each figure that every move has.
fn series(moves: &[Move]) -> Vec<Series> {
    let row = |name: &str, value: &dyn Fn(&Move) -> Option<f64>| {
        let points = moves.iter().filter_map(|one| Some((one.offset_ms, value(one)?)));
        Series::new(name, points.filter(|(_, value)| value.is_finite()).collect())
    };
    let mut all = vec![
        row("guest gap", &|one| Some(one.gap_ms)),
        row("blackout", &|one| Some(one.blackout_ms)),
        row("total", &|one| Some(one.total_ms)),
    ];
    let names = moves.first().map(|one| one.phases.as_slice()).unwrap_or_default();
    for (name, _) in names {
        let of = |one: &Move| one.phases.iter().find(|(phase, _)| phase == name).map(|(_, ms)| *ms);
        all.push(row(&format!("phase {name}"), &of));
    }
    all
}

fn tell(output: &mut Output, moves: &[Move], args: &DowntimeArgs, began: SystemTime) -> Result<()> {
    let all = series(moves);
    let title =
        format!("{} moves of {} with {} in {}; milliseconds", moves.len(), args.ram, args.rate, args.set);
    let head = ["", "moves", "min", "p50", "p90", "p99", "p99.9", "max"];
    output.table(&title, &head, all.iter().map(Series::row).collect());
    let found = calibration(moves);
    let share = 100 * found.inside / found.predictions.max(1);
    let Calibration { predictions, inside, below_p05, above_p95 } = found;
    output.note(&format!(
        "prediction: {inside} of {predictions} blackouts ({share} %) inside [p05, p95], {below_p05} below, {above_p95} above"
    ));
    std::fs::create_dir_all(&args.out)?;
    let (log, picture) = (args.out.join("vmferry-downtime.hlog"), args.out.join("vmferry-downtime.svg"));
    histogram::write_log(&log, &all, began).context("the histogram log")?;
    plot::percentiles(&picture, "vmferry: how long the guest was away", &all[..2]).context("the plot")?;
    output.note(&format!("wrote {} and {}", told(&log), told(&picture)));
    output.keep("moves", &moves);
    output.keep("calibration", &found);
    Ok(())
}

fn told(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_truth_is_counted_on_the_right_side_of_the_interval() {
        let one = |blackout_ms: f64, predicted: Option<Predicted>| Move {
            offset_ms: 0.0,
            total_ms: 0.0,
            gap_ms: 0.0,
            blackout_ms,
            predicted,
            phases: Vec::new(),
        };
        let said = Some(Predicted { p05: 10.0, p50: 15.0, p95: 20.0 });
        let moves = [
            one(9.0, said),
            one(10.0, said),
            one(20.0, said),
            one(21.0, said),
            one(22.0, said),
            one(5.0, None),
        ];
        let found = calibration(&moves);
        assert_eq!((found.predictions, found.inside, found.below_p05, found.above_p95), (5, 2, 1, 2));
    }
}
