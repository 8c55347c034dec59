//! What a lane asks of the kernel and the card for each GiB: over TCP, and over RDMA in both modes.
//!
//! ```text
//!   bench ── ptrace: every system call of every thread ──► the same bench, carrying memory between two lanes
//! ```
//!
//! Counts, not times: a soft card's time says nothing, and being traced costs more than carrying. Only what happens
//! between two marks is counted, so that setting up is not. A soft card takes each request by a system call; a real one
//! takes it by a store to its doorbell, so its system calls are those of a lane that sleeps.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;
use std::net::IpAddr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use bytesize::ByteSize;
use clap::Args;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::Serialize;
use vmferry_datapath::CHUNK_BYTES;

use crate::carry::{End, Own, Way, both_ends, one_end};
use crate::instructions::{self, Instructions};
use crate::output::Output;

/// What nothing in this program calls but the marks.
const MARK: i64 = libc::SYS_getpgrp;

/// Reading the clock and giving way. A host whose clock the kernel maps into the process reads it without a call, and a
/// lane that spins for a moment gives way more often the slower the host: neither says what a lane asks for.
const IDLE_CALLS: [i64; 2] = [libc::SYS_clock_gettime, libc::SYS_sched_yield];

/// `vmferry-bench rdma`
#[derive(Debug, Args)]
pub(crate) struct RdmaArgs {
    /// An address of an RDMA card of this host.
    #[arg(long)]
    address: IpAddr,
    /// Memory that is carried, once each way of carrying.
    #[arg(long, default_value = "64MiB")]
    memory: ByteSize,
    /// Only this way of carrying.
    #[arg(long)]
    way: Option<Way>,
    /// Count instructions instead, by valgrind. Slow: take 16 or 32 MiB.
    #[arg(long)]
    instructions: bool,
    /// Carry, and be counted by who started this.
    #[arg(long, hide = true)]
    carry: Option<Way>,
    /// Be one end only.
    #[arg(long, hide = true, requires = "carry")]
    end: Option<End>,
}

const WAYS: [Way; 3] = [Way::Tcp, Way::Sealed, Way::Direct];

/// A way's row, for each GiB.
#[derive(Debug, Serialize)]
struct Row {
    way: Way,
    /// Requests to the card, or operations given to io_uring.
    operations: f64,
    system_calls: f64,
    /// The most frequent ones, by number.
    by_call: BTreeMap<i64, u64>,
}

pub(crate) fn run(args: &RdmaArgs, quick: bool, output: &mut Output) -> Result<()> {
    let memory = if quick { 8 << 20 } else { args.memory.as_u64() };
    let memory = usize::try_from(memory)?.next_multiple_of(CHUNK_BYTES);
    match (args.carry, args.end) {
        (Some(way), Some(end)) => return one_end(end, way, args.address, memory),
        (Some(way), None) => {
            println!("{}", serde_json::to_string(&both_ends(way, args.address, memory)?)?);
            return Ok(());
        }
        (None, _) => {}
    }
    let ways = WAYS.into_iter().filter(|way| args.way.is_none_or(|wanted| wanted == *way));
    if args.instructions {
        ensure!(
            instructions::can_be_counted(),
            "valgrind is not installed: nothing here counts instructions"
        );
        let say = |way: Way| output.say(&format!("{}: {} MiB under valgrind", way.word(), memory >> 20));
        let counted =
            ways.inspect(|way| say(*way)).map(|way| instructions::count(way, args.address, memory, quick));
        tell_instructions(&counted.collect::<Result<Vec<_>>>()?, output);
        return Ok(());
    }
    let mut rows = Vec::new();
    for way in ways {
        output.say(&format!("{}: {} MiB", way.word(), memory >> 20));
        rows.push(count(way, args.address, memory)?);
    }
    tell(&rows, output);
    Ok(())
}

fn tell_instructions(rows: &[Instructions], output: &mut Output) {
    let millions = |count: f64| format!("{:.0} M", count / 1e6);
    let cells = rows.iter().map(|row| vec![row.way.word(), millions(row.source), millions(row.target)]);
    let head = ["lane over", "source: instructions / GiB", "target: instructions / GiB"];
    output.table("What each end's lane executes in user space", &head, cells.collect());
    output.note("the kernel's instructions are not in it; a soft card works there");
    output.keep("instructions", &rows);
}

fn tell(rows: &[Row], output: &mut Output) {
    let cells = rows.iter().map(|row| {
        let (operations, calls) = (format!("{:.0}", row.operations), format!("{:.0}", row.system_calls));
        vec![row.way.word(), operations, calls, frequent(&row.by_call).join(", ")]
    });
    let head = ["lane over", "operations / GiB", "system calls / GiB", "of those"];
    output.table("What both ends of one lane ask for", &head, cells.collect());
    output.note("tcp: operations are entries given to io_uring; rdma: work requests posted for sending");
    output.note("system calls: of both ends, without clock_gettime and sched_yield");
    output.keep("rdma", &rows);
}

/// The four most frequent calls, for people.
fn frequent(calls: &BTreeMap<i64, u64>) -> Vec<String> {
    let mut by_count: Vec<(u64, i64)> = calls.iter().map(|(call, count)| (*count, *call)).collect();
    by_count.sort_unstable_by(|a, b| b.cmp(a));
    by_count.into_iter().take(4).map(|(count, call)| format!("{count} {}", call_name(call))).collect()
}

fn call_name(call: i64) -> String {
    match call {
        libc::SYS_io_uring_enter => "io_uring_enter".into(),
        libc::SYS_write => "write".into(),
        libc::SYS_read => "read".into(),
        libc::SYS_ioctl => "ioctl".into(),
        libc::SYS_poll => "poll".into(),
        libc::SYS_ppoll => "ppoll".into(),
        libc::SYS_futex => "futex".into(),
        libc::SYS_pwrite64 => "pwrite64".into(),
        libc::SYS_setsockopt => "setsockopt".into(),
        other => format!("call {other}"),
    }
}

/// Starts a carrier, counts what it calls between its marks, and reads what it counted itself.
fn count(way: Way, address: IpAddr, memory: usize) -> Result<Row> {
    let word = way.word();
    let mut child = Command::new(std::env::current_exe()?)
        .args(["rdma", "--address", &address.to_string(), "--memory", &memory.to_string(), "--carry", &word])
        .stdout(Stdio::piped())
        .spawn()?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let tally = trace(pid).context("tracing the carrier; may this user ptrace its own processes?")?;
    let mut said = String::new();
    child.stdout.take().context("stdout is piped")?.read_to_string(&mut said)?;
    let last = said.lines().last().unwrap_or_default();
    let own: Own = serde_json::from_str(last).context("the carrier failed; its words are above")?;
    #[expect(clippy::cast_precision_loss, reason = "counts of one run are far below 2^52")]
    let per_gib = |count: u64| count as f64 * (1_u64 << 30) as f64 / memory as f64;
    let operations = if way == Way::Tcp { tally.submitted } else { own.requests };
    Ok(Row {
        way,
        operations: per_gib(operations),
        system_calls: per_gib(tally.calls.values().sum()),
        by_call: tally.calls,
    })
}

/// What was called between the marks.
#[derive(Default)]
struct Tally {
    counting: bool,
    calls: BTreeMap<i64, u64>,
    /// Entries given to io_uring.
    submitted: u64,
}

impl Tally {
    fn entered(&mut self, pid: Pid) -> Result<()> {
        let registers = ptrace::getregs(pid)?;
        let call = i64::try_from(registers.orig_rax).unwrap_or(-1);
        if call == MARK {
            self.counting = !self.counting;
        } else if self.counting && !IDLE_CALLS.contains(&call) {
            *self.calls.entry(call).or_default() += 1;
            if call == libc::SYS_io_uring_enter {
                self.submitted += registers.rsi;
            }
        }
        Ok(())
    }
}

/// Follows every thread of a process to its end.
fn trace(main: Pid) -> Result<Tally> {
    let options = ptrace::Options::PTRACE_O_TRACESYSGOOD | ptrace::Options::PTRACE_O_TRACECLONE;
    ptrace::seize(main, options)?;
    ptrace::interrupt(main)?;
    let (mut tally, mut inside) = (Tally::default(), HashSet::new());
    loop {
        match waitpid(None, Some(WaitPidFlag::__WALL))? {
            WaitStatus::PtraceSyscall(pid) => {
                if inside.remove(&pid) {
                    ptrace::syscall(pid, None)?;
                    continue;
                }
                inside.insert(pid);
                tally.entered(pid)?;
                ptrace::syscall(pid, None)?;
            }
            WaitStatus::PtraceEvent(pid, ..) => go_on(pid, None)?,
            WaitStatus::Stopped(pid, signal) => go_on(pid, Some(signal))?,
            WaitStatus::Exited(pid, _) if pid == main => return Ok(tally),
            WaitStatus::Signaled(pid, signal, _) if pid == main => bail!("the carrier died of {signal}"),
            WaitStatus::Exited(..)
            | WaitStatus::Signaled(..)
            | WaitStatus::Continued(_)
            | WaitStatus::StillAlive => {}
        }
    }
}

/// A thread that died in between is no failure.
fn go_on(pid: Pid, signal: Option<Signal>) -> Result<()> {
    match ptrace::syscall(pid, signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
