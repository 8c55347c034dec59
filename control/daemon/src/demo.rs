//! `vmferry demo`: the main job on this machine, with the same commands that an operator types.
//!
//! A guest whose every page is known to its own workload is moved there and back between two VMMs, sealed. Then the
//! guest verifies its memory, and a histogram shows how long each move took it away. What must never happen: a demo that
//! ends well although the guest found a wrong page.

mod process_guests;
mod qemu_guests;
mod run;

use hdrhistogram::Histogram;
use vmferry_rig::Assets;

use crate::cli::{DemoArgs, DemoGuests};
use crate::failure::Failure;
use run::Moved;

/// Moves of one demo.
const MOVES: usize = 10;

/// Two places between which one guest moves.
trait Stage {
    /// What is shown, in one line.
    fn title(&self) -> String;
    /// Moves the guest to the other place.
    fn move_once(&mut self, pki: &std::path::Path) -> Result<Moved, Failure>;
    /// Asks the guest itself whether all of its memory is right; the answer in one line.
    fn verify(&mut self) -> Result<String, Failure>;
}

/// Moves a guest from one VMM on this machine to another, and back.
pub fn demo(args: &DemoArgs) -> Result<(), Failure> {
    let pki = tempfile::tempdir()
        .map_err(|e| Failure::Permission(format!("cannot make a directory for keys: {e}")))?;
    crate::keys::init(pki.path(), &["127.0.0.1".to_owned()])?;
    let mut stage = stage(args)?;
    eprintln!("demo: {}", stage.title());
    let mut moves = Vec::new();
    for number in 1..=MOVES {
        let moved = stage.move_once(pki.path())?;
        eprintln!("demo: move {number:2}: {}", moved.line());
        moves.push(moved);
    }
    let verdict = stage.verify()?;
    eprintln!("demo: {verdict}");
    print(args, &moves, &verdict);
    Ok(())
}

fn stage(args: &DemoArgs) -> Result<Box<dyn Stage>, Failure> {
    let ram = args.ram.as_u64();
    let process = || process_guests::ProcessStage::start(ram).map(|stage| Box::new(stage) as Box<dyn Stage>);
    match (args.guests, Assets::find()) {
        (DemoGuests::Process, _) => process(),
        (DemoGuests::Auto | DemoGuests::Qemu, Ok(assets)) => {
            Ok(Box::new(qemu_guests::QemuStage::start(&assets, ram)?))
        }
        (DemoGuests::Qemu, Err(missing)) => Err(Failure::Refused(missing.to_string())),
        (DemoGuests::Auto, Err(missing)) => {
            eprintln!("demo: {missing}; showing process guests instead");
            process()
        }
    }
}

fn print(args: &DemoArgs, moves: &[Moved], verdict: &str) {
    let blackout = histogram(moves.iter().map(|m| m.blackout_ms));
    let gap = histogram(moves.iter().filter_map(|m| m.gap_ms));
    if args.json {
        let figures = |h: &Histogram<u64>| serde_json::json!({ "moves": h.len(), "p50": at(h, 0.5), "p90": at(h, 0.9), "max": at(h, 1.0) });
        let object = serde_json::json!({
            "status": "completed", "verdict": verdict, "blackout_ms": figures(&blackout), "guest_gap_ms": figures(&gap),
        });
        println!("{object}");
        return;
    }
    println!("\nHow long the guest was away, {} moves:", moves.len());
    println!("{:<44} {:>8} {:>8} {:>8}", "", "p50 ms", "p90 ms", "max ms");
    for (name, h) in [
        ("blackout (source stopped to target running)", &blackout),
        ("guest-visible gap (its heart beat, host clock)", &gap),
    ] {
        if !h.is_empty() {
            println!("{name:<46} {:>6.1} {:>8.1} {:>8.1}", at(h, 0.5), at(h, 0.9), at(h, 1.0));
        }
    }
    bars(&blackout);
    println!("{verdict}");
}

/// One line a bucket of the blackout, as wide as it is full.
fn bars(h: &Histogram<u64>) {
    const WIDTH: u64 = 40;
    let step_us = (h.max() / 8).max(1000).next_multiple_of(1000);
    println!("\nblackout");
    for bucket in h.iter_linear(step_us) {
        let count = bucket.count_since_last_iteration();
        let from = (bucket.value_iterated_to() + 1).saturating_sub(step_us) / 1000;
        let length = usize::try_from(count * WIDTH / h.len().max(1)).unwrap_or(0);
        println!("{from:>6} to {:>4} ms  {:<40} {count}", from + step_us / 1000, "#".repeat(length));
    }
}

fn histogram(values_ms: impl Iterator<Item = f64>) -> Histogram<u64> {
    let mut histogram =
        Histogram::new(3).unwrap_or_else(|_| unreachable!("three digits are a valid precision"));
    for ms in values_ms {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a time, never negative")]
        let us = (ms * 1e3) as u64;
        // An auto-resizing histogram refuses only what no move can take.
        let _ = histogram.record(us.max(1));
    }
    histogram
}

fn at(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "microseconds of a move")]
    let us = histogram.value_at_quantile(quantile) as f64;
    us / 1e3
}
