//! Time against guest size: it must grow as a line does.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use clap::Args;
use serde::Serialize;
use vmferry_datapath::PageSet;
use vmferry_guest::GuestSpec;
use vmferry_rig::{Assets, RunningGuest};
use vmferry_workload::{PAGE_BYTES, Plan};

use crate::ferry::{Ferry, FerryPlan};
use crate::guest::Traveller;
use crate::measure::{Spread, cell, ms, now};
use crate::output::Output;

const MOVE_TIMEOUT: Duration = Duration::from_secs(120);
/// Scans of each size, and the time between them.
const SCANS: usize = 30;
const SCAN_PAUSE: Duration = Duration::from_millis(20);
const BYTES_A_MIB: f64 = 1_048_576.0;

/// `vmferry-bench growth`
#[derive(Debug, Args)]
pub(crate) struct GrowthArgs {
    /// The largest guest; the smallest has 512 MiB, each next one twice as much. Two guests must fit into memory.
    #[arg(long, default_value = "8GiB")]
    up_to: ByteSize,
    /// Moves of each size.
    #[arg(long, default_value_t = 5)]
    moves: usize,
}

#[derive(Debug, Serialize)]
struct Size {
    ram_bytes: u64,
    total_ms: Vec<f64>,
    gap_ms: Vec<f64>,
    scan_ms: Vec<f64>,
    first_scan_ms: Vec<f64>,
    sender_mib: Vec<f64>,
}

impl Size {
    fn new(ram_bytes: u64) -> Self {
        let none = Vec::new;
        Self {
            ram_bytes,
            total_ms: none(),
            gap_ms: none(),
            scan_ms: none(),
            first_scan_ms: none(),
            sender_mib: none(),
        }
    }
}

pub(crate) fn run(args: &GrowthArgs, quick: bool, output: &mut Output) -> Result<()> {
    let (largest, moves) = if quick { (ByteSize::gib(1), 2) } else { (args.up_to, args.moves) };
    let assets = Assets::find()?;
    let ferry = Ferry::find()?;
    let folder = tempfile::tempdir()?;
    let keys = folder.path().join("pki");
    ferry.make_keys(&keys)?;
    let plan = FerryPlan {
        keys: Some(keys),
        downtime_limit: Duration::from_millis(300),
        timeout: MOVE_TIMEOUT,
        send_words: Vec::new(),
    };
    let mut sizes = Vec::new();
    let mut ram = ByteSize::mib(512);
    while ram <= largest {
        output.say(&format!("booting a guest of {ram}"));
        sizes.push(
            size(&assets, &ferry, &plan, ram.as_u64(), moves).with_context(|| format!("a guest of {ram}"))?,
        );
        ram = ByteSize(ram.as_u64() * 2);
    }
    print(output, &sizes);
    output.keep("growth", &sizes);
    Ok(())
}

fn size(assets: &Assets, ferry: &Ferry, plan: &FerryPlan, ram_bytes: u64, moves: usize) -> Result<Size> {
    let pages = ram_bytes / 4 * 3 / PAGE_BYTES as u64;
    let work: Plan = format!("pages={pages},set=4096,rate=5MiB,zero=0,seed=31").parse()?;
    let keys = plan.keys.as_deref().context("growth is measured sealed")?;
    let mut traveller = Traveller::boot(assets, ram_bytes, work, keys)?;
    let mut size = Size::new(ram_bytes);
    size.scan_ms = scans(traveller.here())?;
    for _ in 0..moves {
        let (source, target) = traveller.ends()?;
        let (from, to) = (source.spec(), target.spec());
        let receiving = ferry.receive(&to, plan)?;
        let start = now();
        let report = ferry.send(&from, receiving, plan)?;
        if !report.converged {
            bail!("the move did not end well: {}", report.send);
        }
        let seen = traveller.arrived(start)?;
        size.total_ms.push(ms(seen.total));
        size.gap_ms.push(ms(seen.gap));
        size.first_scan_ms.extend(report.send["scan_ms_max"].as_f64());
        size.sender_mib
            .extend(report.send["own_memory_peak_bytes"].as_f64().map(|bytes| bytes / BYTES_A_MIB));
    }
    traveller.prove()?;
    Ok(size)
}

/// Dirty scans of the running guest, as a round of a move makes them; the first, which finds everything, left out.
fn scans(guest: &RunningGuest) -> Result<Vec<f64>> {
    let mut source = vmferry_guest::open_source(&GuestSpec::Qemu { qmp: guest.qmp_path().to_path_buf() })?;
    let mut log = source.attach()?;
    let mut scans = Vec::with_capacity(SCANS);
    let mut dirty = PageSet::new(&source.description().layout);
    log.collect(&mut dirty)?;
    for _ in 0..SCANS {
        std::thread::sleep(SCAN_PAUSE);
        dirty.clear();
        let start = now();
        log.collect(&mut dirty)?;
        scans.push(ms(start.elapsed()));
    }
    drop(log);
    source.detach();
    Ok(scans)
}

fn print(output: &Output, sizes: &[Size]) {
    let lines = sizes.iter().map(|size| {
        let gib = gib(size.ram_bytes);
        let each = |values: &[f64]| cell(Spread::of(values.iter().map(|value| value / gib)));
        vec![
            ByteSize(size.ram_bytes).to_string(),
            cell(Spread::of(size.total_ms.iter().copied())),
            each(&size.total_ms),
            cell(Spread::of(size.gap_ms.iter().copied())),
            each(&size.scan_ms),
            each(&size.first_scan_ms),
            cell(Spread::of(size.sender_mib.iter().copied())),
        ]
    });
    let head = [
        "guest",
        "total ms",
        "total ms/GiB",
        "gap ms",
        "scan ms/GiB",
        "worst scan of a move ms/GiB",
        "sender's own MiB",
    ];
    output.table("min / median / max; three quarters filled, 5 MiB/s dirty, sealed", &head, lines.collect());
}

fn gib(bytes: u64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a byte count of a guest is far below 2^52")]
    let gib = bytes as f64 / f64::from(1 << 30);
    gib
}
