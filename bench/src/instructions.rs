//! Instructions that each end's lane executes in user space for a GiB, as valgrind counts them.
//!
//! ```text
//!   bench ── valgrind --tool=callgrind ──► one end of the lane ◄─► the other end ◄── valgrind ── bench
//! ```
//!
//! Each end is a process of its own: valgrind 3.19 holds its lock while a thread waits in io_uring_enter, so the two lanes
//! would stop each other. They run twice, with a memory and with half of it: the difference is what carrying costs, and setting
//! up falls out; with `--quick` once, and it is in. Only the lane's thread counts, so filling the memory does not. What the
//! kernel does is not in it, and shows as system calls. Valgrind shows a program a processor with AES-NI and AVX2: one with
//! VAES seals with fewer instructions.

use std::io::{BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::carry::{End, Way};

/// Instructions for each GiB.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Instructions {
    pub(crate) way: Way,
    pub(crate) source: f64,
    pub(crate) target: f64,
}

/// Whether this host has what counts them.
pub(crate) fn can_be_counted() -> bool {
    let version =
        Command::new("valgrind").args(["--tool=callgrind", "--version"]).stdout(Stdio::null()).status();
    version.is_ok_and(|status| status.success())
}

/// Counts a way.
pub(crate) fn count(way: Way, address: IpAddr, memory: usize, once: bool) -> Result<Instructions> {
    let (first, half) = if once { (0, (0, 0)) } else { (memory / 2, run(way, address, memory / 2)?) };
    let whole = run(way, address, memory)?;
    let carried = memory - first;
    #[expect(clippy::cast_precision_loss, reason = "counts of one run are far below 2^52")]
    let per_gib =
        |less: u64, more: u64| more.saturating_sub(less) as f64 * (1_u64 << 30) as f64 / carried as f64;
    Ok(Instructions { way, source: per_gib(half.0, whole.0), target: per_gib(half.1, whole.1) })
}

/// Carries once: the instructions of the source's lane, and of the target's.
fn run(way: Way, address: IpAddr, memory: usize) -> Result<(u64, u64)> {
    let folder = tempfile::tempdir().context("no folder for callgrind's files")?;
    let mut target = start(End::Target, way, address, memory, folder.path())?;
    let mut source = start(End::Source, way, address, memory, folder.path())?;
    let mut said = String::new();
    BufReader::new(target.stdout.take().context("stdout is piped")?).read_line(&mut said)?;
    ensure!(!said.is_empty(), "the target did not say where it waits; its words are above");
    source.stdin.take().context("stdin is piped")?.write_all(said.as_bytes())?;
    ensure!(source.wait()?.success(), "the source failed under valgrind; its words are above");
    drop(target.stdin.take());
    ensure!(target.wait()?.success(), "the target failed under valgrind; its words are above");
    Ok((lanes_of(End::Source, folder.path())?, lanes_of(End::Target, folder.path())?))
}

fn start(end: End, way: Way, address: IpAddr, memory: usize, folder: &Path) -> Result<Child> {
    let out = folder.join(name_of(end));
    let mut command = Command::new("valgrind");
    command
        .args(["--quiet", "--tool=callgrind", "--separate-threads=yes", "--fair-sched=yes"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(std::env::current_exe()?)
        .args(["rdma", "--address", &address.to_string()])
        .args(["--memory", &memory.to_string(), "--carry", &way.word(), "--end", name_of(end)])
        .stdin(Stdio::piped());
    if end == End::Target {
        command.stdout(Stdio::piped());
    }
    command.spawn().context("valgrind does not start")
}

fn name_of(end: End) -> &'static str {
    match end {
        End::Source => "source",
        End::Target => "target",
    }
}

/// What all threads but the first executed, which are the lanes: callgrind writes a file for each.
fn lanes_of(end: End, folder: &Path) -> Result<u64> {
    let mut lanes = None;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let thread: Option<u32> =
            name.strip_prefix(name_of(end)).and_then(|rest| rest.strip_prefix('-')?.parse().ok());
        if thread.is_some_and(|thread| thread > 1) {
            let text = std::fs::read_to_string(entry.path())?;
            *lanes.get_or_insert(0) +=
                total(&text).with_context(|| format!("no total in callgrind's {name}"))?;
        }
    }
    lanes.with_context(|| format!("callgrind saw no lane of the {}", name_of(end)))
}

/// The number behind `totals:`.
fn total(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("totals: "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_threads_total_is_read() {
        assert_eq!(
            total("version: 1\nthread: 2\nevents: Ir\nsummary: 17\n\ntotals: 17267090\n"),
            Some(17_267_090)
        );
        assert_eq!(total("events: Ir\n"), None);
    }
}
