//! Boots lab hosts, runs the lab's tests in them and counts what came back.
//!
//! ```text
//!   tests (cargo builds and lists them) ──► plan ──► image ──► host a, host b (QEMU) ──► results ──► counts
//! ```
//!
//! What must never happen: a test that did not run looking like one that passed. The plan is made from what the test
//! binaries list outside; whatever of it did not come back as passed is a failure, and so is a run without tests.

mod host;
mod image;
mod plan;
mod pulse;
mod results;
mod tests;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmferry_rig::RigError;

use host::{Ended, LabHost, Mode};
use image::LabFiles;
use plan::Plan;
use results::Results;

/// A run that takes longer is ended. It should take less than six minutes; a busy machine gets more time before that is
/// called a hang.
const RUN_TIMEOUT: Duration = Duration::from_secs(1500);
/// One test's time, and with it the longest silence of a healthy host.
const TEST_TIMEOUT: Duration = Duration::from_secs(300);
/// Between two looks at what the hosts say.
const LOOK_EVERY: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["test"] => run_tests(None),
        ["test", filter] => run_tests(Some(filter)),
        ["shell"] => shell(false),
        ["two-hosts"] => shell(true),
        _ => {
            eprintln!("lab: use 'scripts/lab test [FILTER]', 'scripts/lab shell' or 'scripts/lab two-hosts'");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lab: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run_tests(filter: Option<&str>) -> Result<bool, RigError> {
    let files = LabFiles::find()?;
    let binaries = tests::build(filter)?;
    let plan = Plan::make(&binaries, filter)?;
    if plan.is_empty() {
        eprintln!("lab: no lab test has a name that contains {:?}", filter.unwrap_or_default());
        return Ok(false);
    }
    let folder = TempDir::new().map_err(|source| host_error("cannot create a folder", source))?;
    let image = image::build(&files, &plan, &binaries, folder.path())?;
    let began = clock();
    let mut hosts = plan
        .hosts()
        .map(|name| LabHost::boot(name, &files, &image, folder.path(), Mode::Tests(TEST_TIMEOUT)))
        .collect::<Result<Vec<_>, _>>()?;
    let mut results = Results::new(&plan);
    watch(&mut hosts, &mut results, began)?;
    drop(hosts);
    Ok(results.conclude(began.elapsed()))
}

/// Until every host has ended by itself, or went silent, or the time is over.
fn watch(hosts: &mut [LabHost], results: &mut Results, began: Instant) -> Result<(), RigError> {
    loop {
        let mut busy = false;
        for host in hosts.iter_mut() {
            for line in host.lines()? {
                results.heard(host.name(), &line);
            }
            match host.ended(TEST_TIMEOUT * 2) {
                Ended::No => busy = true,
                Ended::ByItself => results.ended(host.name(), &host.last_words()),
                Ended::Silent => {
                    results.trouble(host.name(), "hangs: it said nothing for too long", &host.last_words());
                    return Ok(());
                }
            }
        }
        if !busy {
            return Ok(());
        }
        if began.elapsed() > RUN_TIMEOUT {
            for host in hosts.iter() {
                results.trouble(host.name(), "was ended: the run took too long", &host.last_words());
            }
            return Ok(());
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Host a's shell on this terminal, and host b's on a socket beside it.
fn shell(two: bool) -> Result<bool, RigError> {
    let files = LabFiles::find()?;
    let binaries = tests::build(None)?;
    let folder = TempDir::new().map_err(|source| host_error("cannot create a folder", source))?;
    let image = image::build(&files, &Plan::whole(&binaries), &binaries, folder.path())?;
    let socket = folder.path().join("b.console");
    let boot = |name, mode| LabHost::boot(name, &files, &image, folder.path(), mode);
    let _other = two.then(|| boot("b", Mode::Socket(&socket))).transpose()?;
    if two {
        let socket = socket.display();
        println!(
            "lab: host b's shell: socat -,raw,echo=0,escape=0x1d UNIX-CONNECT:{socket} (10.78.0.1 and .2 are the hosts)"
        );
    }
    boot("a", Mode::Terminal)?.wait()
}

fn host_error(what: &str, source: std::io::Error) -> RigError {
    RigError::Host { what: what.to_owned(), source }
}

#[expect(clippy::disallowed_methods, reason = "the runner's deadlines are in the host's time")]
fn clock() -> Instant {
    Instant::now()
}
