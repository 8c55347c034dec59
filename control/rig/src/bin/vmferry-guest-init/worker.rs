//! The workload's thread: writes what is due, verifies a little, answers.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rustix::mm::{MlockAllFlags, mlockall};
use serde::Serialize;
use vmferry_rig::{GuestGap, GuestStatus};
use vmferry_workload::{MappedPages, Pace, Plan, Verifier, Writer};

use crate::beat;
use crate::disk::DiskCounters;
use crate::net::NetCounters;
use crate::relay::RelayCounters;
use crate::sys;

/// Pages verified in each turn of the loop: the background check costs little and meets every page in time.
const VERIFY_AT_ONCE: u64 = 2;
/// How long the loop sleeps when nothing is due.
const IDLE: Duration = Duration::from_millis(1);

struct Request {
    line: String,
    answer: Sender<String>,
}

/// The way to the worker.
pub(crate) struct Requests(Sender<Request>);

impl Requests {
    pub(crate) fn ask(&self, line: String) -> String {
        let (answer, receiver) = channel();
        let sent = self.0.send(Request { line, answer });
        sent.ok()
            .and_then(|()| receiver.recv().ok())
            .unwrap_or_else(|| "error the worker has ended".to_owned())
    }
}

struct Worker {
    memory: MappedPages,
    writer: Writer,
    verifier: Verifier,
    pace: Pace,
    writing: bool,
    counters: Counters,
}

/// What the other threads have done.
pub(crate) struct Counters {
    pub(crate) beat: Arc<beat::Counters>,
    pub(crate) disk: Arc<DiskCounters>,
    pub(crate) net: Arc<NetCounters>,
    pub(crate) relay: Arc<RelayCounters>,
}

/// Fills the memory, then starts the worker's thread.
pub(crate) fn start(plan: Plan, counters: Counters) -> Requests {
    let pages = usize::try_from(plan.pages).expect("a 64-bit guest");
    let mut memory = MappedPages::anonymous(pages).expect("the guest has enough memory for its plan");
    let mut writer = Writer::new(plan);
    writer.fill(&mut memory);
    mlockall(MlockAllFlags::CURRENT).expect("init may lock its memory");
    let pace = Pace::new(writer.registers().plan.rate, sys::uptime());
    let mut worker = Worker { memory, writer, verifier: Verifier::new(), pace, writing: true, counters };
    let (sender, requests) = channel();
    std::thread::spawn(move || worker.run(&requests));
    Requests(sender)
}

impl Worker {
    fn run(&mut self, requests: &Receiver<Request>) {
        loop {
            let due = if self.writing { self.pace.due(sys::uptime()) } else { 0 };
            self.writer.write(&mut self.memory, due);
            self.pace.wrote(due);
            self.verifier.some(&self.memory, self.writer.registers(), VERIFY_AT_ONCE);
            let request = if due == 0 { requests.recv_timeout(IDLE).ok() } else { requests.try_recv().ok() };
            if let Some(Request { line, answer }) = request {
                let _ = answer.send(self.answer(&line));
            }
        }
    }

    fn answer(&mut self, line: &str) -> String {
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        match command {
            "status" => ok(&self.status()),
            "verify" => ok(&self.verifier.all(&self.memory, self.writer.registers())),
            "gap" => ok(&GuestGap { gap_us: self.counters.beat.take_gap_us() }),
            "stop" | "start" => {
                self.writing = command == "start";
                self.pace = Pace::new(self.writer.registers().plan.rate, sys::uptime());
                ok(&self.status())
            }
            "net" => {
                self.counters.net.set_quiet(rest == "quiet");
                ok(&self.counters.net.status())
            }
            "cpus" => ok(&self.counters.relay.status()),
            "deaf" => ok(&crate::net::forget_hot_unplug()),
            "rate" => self.set("rate", rest),
            "set" => match rest.split_once('=') {
                Some((key, value)) => self.set(key, value),
                None => "error use set key=value".to_owned(),
            },
            _ => format!(
                "error unknown command '{command}': use status, verify, gap, net, cpus, deaf, stop, start, rate or set"
            ),
        }
    }

    fn set(&mut self, key: &str, value: &str) -> String {
        if let Err(error) = self.writer.set(key, value) {
            return format!("error {error}");
        }
        self.pace = Pace::new(self.writer.registers().plan.rate, sys::uptime());
        ok(&self.status())
    }

    fn status(&self) -> GuestStatus {
        let found = self.verifier.found();
        GuestStatus {
            plan: self.writer.registers().plan.to_string(),
            writing: self.writing,
            writes: self.writer.registers().writes(),
            verified: found.pages,
            wrong: found.wrong,
            disk_reads: self.counters.disk.reads(),
            disk_wrong: self.counters.disk.wrong(),
            beats: self.counters.beat.beats(),
            uptime_ms: u64::try_from(sys::uptime().as_millis()).unwrap_or(u64::MAX),
        }
    }
}

fn ok(answer: &impl Serialize) -> String {
    serde_json::to_string(answer).map_or_else(|error| format!("error {error}"), |json| format!("ok {json}"))
}
