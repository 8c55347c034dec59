//! The same guest, moved by QEMU and by vmferry in turn.
//!
//! One guest travels through all runs of a scenario, one mover after the other, so that a busy minute of the machine
//! meets all of them. Time runs from the command to the first beat on the target, and the gap from the last beat on
//! the source: the host's clock, not the mover's own claim.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use serde::Serialize;
use vmferry_rig::Assets;
use vmferry_workload::{PAGE_BYTES, Plan};

use crate::ferry::{Ferry, FerryPlan};
use crate::guest::{Seen, Traveller};
use crate::measure::{Spread, cell, ms, now};
use crate::output::Output;
use crate::qemu_move::{self, Mode};
use crate::scenario::{self, Scenario};
use crate::{cpu, qemu_move::QemuClaim};

/// `vmferry-bench migrate`
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// Whom to compare with.
    #[arg(long, value_enum, default_value_t = Versus::Qemu)]
    vs: Versus,
    /// Guest memory; three quarters of it are filled.
    #[arg(long, default_value = "2GiB")]
    ram: ByteSize,
    /// Moves by each mover in each scenario.
    #[arg(long, default_value_t = 5)]
    pairs: usize,
    /// A move that takes longer counts as not converging.
    #[arg(long, default_value = "30s", value_parser = humantime::parse_duration)]
    give_up: Duration,
    /// Acceptable blackout, for all movers.
    #[arg(long, default_value = "300ms", value_parser = humantime::parse_duration)]
    downtime_limit: Duration,
    /// A folder with keys for 127.0.0.1 under QEMU's file names; made with 'vmferry keys init' unless given.
    #[arg(long)]
    tls_dir: Option<PathBuf>,
    /// Only movers whose name contains this.
    #[arg(long)]
    only: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Versus {
    /// QEMU's own migration: plain, multifd, multifd with TLS.
    Qemu,
    /// Nobody.
    None,
}

/// Who moves the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Mover {
    Qemu(Mode),
    FerrySealed,
    FerryPlain,
}

impl Mover {
    fn name(self) -> &'static str {
        match self {
            Self::Qemu(Mode::Plain) => "qemu",
            Self::Qemu(Mode::Multifd) => "qemu multifd",
            Self::Qemu(Mode::MultifdTls) => "qemu multifd tls",
            Self::FerrySealed => "vmferry sealed",
            Self::FerryPlain => "vmferry plain",
        }
    }
}

/// One move.
#[derive(Debug, Clone, Serialize)]
struct Run {
    converged: bool,
    /// Why the guest stayed where it was.
    why: Option<String>,
    total_ms: f64,
    gap_ms: f64,
    own_gap_ms: f64,
    claimed_gap_ms: f64,
    bytes: u64,
    rounds: u64,
    cpu_seconds: f64,
}

#[derive(Debug, Serialize)]
struct Row {
    scenario: Scenario,
    mover: &'static str,
    runs: Vec<Run>,
}

impl Row {
    fn has_converged(&self) -> bool {
        self.runs.iter().all(|run| run.converged)
    }
}

struct Bench<'a> {
    args: &'a MigrateArgs,
    ferry: Option<Ferry>,
    keys: PathBuf,
    traveller: Traveller,
}

pub(crate) fn run(args: &MigrateArgs, quick: bool, output: &mut Output) -> Result<()> {
    let assets = Assets::find()?;
    let folder = tempfile::tempdir()?;
    let ferry = Ferry::find();
    let keys = match &args.tls_dir {
        Some(given) => given.clone(),
        None => {
            let keys = folder.path().join("pki");
            ferry.as_ref().map_err(|error| anyhow!("{error}"))?.make_keys(&keys)?;
            keys
        }
    };
    let ram = if quick { ByteSize::mib(512) } else { args.ram };
    let pairs = if quick { 2 } else { args.pairs };
    let data_bytes = ram.as_u64() / 4 * 3;
    let plan: Plan = format!("pages={},rate=0,zero=0,seed=11", data_bytes / PAGE_BYTES as u64).parse()?;
    output.say(&format!("booting a guest of {ram}"));
    let traveller = Traveller::boot(&assets, ram.as_u64(), plan, &keys)?;
    let mut bench = Bench { args, ferry: ferry.ok(), keys, traveller };
    let mut rows = Vec::new();
    for scenario in scenario::all(data_bytes >> 20, quick) {
        rows.extend(bench.scenario(scenario, pairs, output)?);
    }
    print(output, &rows, data_bytes);
    output.keep("migrate", &rows);
    Ok(())
}

impl Bench<'_> {
    fn movers(&self) -> Vec<Mover> {
        let qemu = [Mode::Plain, Mode::Multifd, Mode::MultifdTls].map(Mover::Qemu);
        let ferry = [Mover::FerrySealed, Mover::FerryPlain];
        let versus = if self.args.vs == Versus::Qemu { &qemu[..] } else { &[] };
        let wanted =
            |mover: &Mover| self.args.only.as_ref().is_none_or(|word| mover.name().contains(word.as_str()));
        versus.iter().chain(&ferry).copied().filter(wanted).collect()
    }

    fn scenario(&mut self, scenario: Scenario, pairs: usize, output: &Output) -> Result<Vec<Row>> {
        let movers = self.movers();
        let row = |mover: &Mover| Row { scenario, mover: mover.name(), runs: Vec::new() };
        let mut rows: Vec<Row> = movers.iter().map(row).collect();
        for pair in 0..pairs {
            // A mover that gave up once gives up again: once is measured, not five times.
            for (mover, row) in movers.iter().zip(&mut rows).filter(|(_, row)| row.has_converged()) {
                self.traveller.work(&scenario.rate_word(), scenario.set_pages())?;
                let run =
                    self.one(*mover).with_context(|| format!("{} ({})", mover.name(), scenario.name()))?;
                output.say(&format!(
                    "{}: {} {}/{pairs}: {}",
                    scenario.name(),
                    mover.name(),
                    pair + 1,
                    told(&run)
                ));
                row.runs.push(run);
            }
        }
        Ok(rows)
    }

    fn one(&mut self, mover: Mover) -> Result<Run> {
        self.traveller.forget_gaps()?;
        let run = match mover {
            Mover::Qemu(mode) => self.by_qemu(mode),
            Mover::FerrySealed => self.by_ferry(Some(self.keys.clone())),
            Mover::FerryPlain => self.by_ferry(None),
        }?;
        self.traveller.here().console().ask("rate 0")?;
        self.traveller.prove()?;
        Ok(run)
    }

    fn by_qemu(&mut self, mode: Mode) -> Result<Run> {
        let (source, target) = self.traveller.ends()?;
        let uri = qemu_move::prepare(mode, source, target, self.args.downtime_limit)?;
        let (watch, start) = (cpu::Watch::begin([source.pid(), target.pid()]), now());
        let claim = qemu_move::run(&uri, source, self.args.give_up)?;
        if claim.converged {
            let _ = target.beats().wait_since(start, Duration::from_secs(20));
        }
        let cpu_seconds = watch.end();
        let elapsed = start.elapsed();
        let why = format!("no end in sight after {:.0} ms", ms(elapsed));
        self.settle(claim, why, start, elapsed, cpu_seconds)
    }

    fn by_ferry(&mut self, keys: Option<PathBuf>) -> Result<Run> {
        let ferry = self.ferry.clone().context("vmferry is not built")?;
        let plan = FerryPlan {
            keys,
            downtime_limit: self.args.downtime_limit,
            timeout: self.args.give_up,
            send_words: Vec::new(),
        };
        let (source, target) = self.traveller.ends()?;
        let (from, to) = (source.spec(), target.spec());
        let watch = cpu::Watch::begin([source.pid(), target.pid()]);
        let children = cpu::children_seconds();
        let receiving = ferry.receive(&to, &plan)?;
        let start = now();
        let report = ferry.send(&from, receiving, &plan)?;
        let elapsed = start.elapsed();
        let cpu_seconds = watch.end() + cpu::children_seconds() - children;
        let claim = QemuClaim {
            converged: report.converged,
            bytes: report.send["ram"]["wire_bytes"].as_u64().unwrap_or(0),
            downtime_ms: report.send["blackout_ms"].as_f64().unwrap_or(0.0),
            rounds: report.send["ram"]["rounds"].as_u64().unwrap_or(0),
        };
        let why = report.send["error-desc"].as_str().unwrap_or("vmferry gave no reason").to_owned();
        self.settle(claim, why, start, elapsed, cpu_seconds)
    }

    fn settle(
        &mut self,
        claim: QemuClaim,
        why: String,
        start: std::time::Instant,
        elapsed: Duration,
        cpu_seconds: f64,
    ) -> Result<Run> {
        let nothing = Seen { total: elapsed, gap: Duration::ZERO, own_gap: Duration::ZERO };
        let seen = if claim.converged { self.traveller.arrived(start)? } else { nothing };
        if !claim.converged {
            self.traveller.stayed();
        }
        Ok(Run {
            converged: claim.converged,
            why: (!claim.converged).then_some(why),
            total_ms: ms(seen.total),
            gap_ms: ms(seen.gap),
            own_gap_ms: ms(seen.own_gap),
            claimed_gap_ms: claim.downtime_ms,
            bytes: claim.bytes,
            rounds: claim.rounds,
            cpu_seconds,
        })
    }
}

fn told(run: &Run) -> String {
    if !run.converged {
        let why = run.why.as_deref().unwrap_or_default();
        return format!("gave up after {:.0} ms and {}: {why}", run.total_ms, ByteSize(run.bytes));
    }
    format!(
        "{:.0} ms, gap {:.1} ms (claims {:.1}), {} in {} rounds, {:.2} CPU s",
        run.total_ms,
        run.gap_ms,
        run.claimed_gap_ms,
        ByteSize(run.bytes),
        run.rounds,
        run.cpu_seconds
    )
}

fn gib(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a byte count of a guest is far below 2^52")]
    let gib = bytes as f64 / f64::from(1 << 30);
    gib
}

fn print(output: &Output, rows: &[Row], data_bytes: u64) {
    let column = |row: &Row, value: fn(&Run) -> f64| {
        cell(Spread::of(row.runs.iter().filter(|run| run.converged).map(value)))
    };
    let lines = rows.iter().map(|row| {
        vec![
            row.scenario.name(),
            row.mover.to_owned(),
            format!("{} of {}", row.runs.iter().filter(|run| run.converged).count(), row.runs.len()),
            column(row, |run| run.total_ms),
            column(row, |run| gib(run.bytes) * 1000.0 / run.total_ms),
            column(row, |run| gib(run.bytes)),
            column(row, |run| run.cpu_seconds / gib(run.bytes)),
            column(row, |run| run.gap_ms),
            column(row, |run| run.own_gap_ms),
            column(row, |run| run.claimed_gap_ms),
        ]
    });
    let head = [
        "guest",
        "mover",
        "moved",
        "total ms",
        "GiB/s",
        "GiB moved",
        "CPU s/GiB",
        "gap ms (host)",
        "gap ms (guest)",
        "blackout ms (claimed)",
    ];
    let title = format!("min / median / max; {} of data", ByteSize(data_bytes));
    output.table(&title, &head, lines.collect());
    for row in rows {
        for why in row.runs.iter().filter_map(|run| run.why.as_ref()) {
            output.note(&format!("{}, {}: {why}", row.scenario.name(), row.mover));
        }
    }
    ratios(output, rows);
}

/// vmferry sealed against each other mover, pair by pair.
fn ratios(output: &Output, rows: &[Row]) {
    let mut lines = Vec::new();
    for ours in rows.iter().filter(|row| row.mover == Mover::FerrySealed.name()) {
        for theirs in rows.iter().filter(|row| row.scenario == ours.scenario && row.mover != ours.mover) {
            let pairs: Vec<_> = ours
                .runs
                .iter()
                .zip(&theirs.runs)
                .filter(|(ours, theirs)| ours.converged && theirs.converged)
                .collect();
            let ratio = |value: fn(&Run) -> f64| {
                cell(Spread::of(pairs.iter().map(|(ours, theirs)| value(theirs) / value(ours))))
            };
            lines.push(vec![
                ours.scenario.name(),
                theirs.mover.to_owned(),
                ratio(|run| run.total_ms),
                ratio(|run| run.total_ms / gib(run.bytes)),
                ratio(|run| run.cpu_seconds / gib(run.bytes)),
                ratio(|run| run.gap_ms),
            ]);
        }
    }
    let head = ["guest", "against", "time saved ×", "throughput ×", "CPU per GiB saved ×", "gap shorter ×"];
    output.table("vmferry sealed, how many times better (min / median / max of pairs)", &head, lines);
}
