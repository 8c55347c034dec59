//! The only program of a test guest: it works, beats and answers, and never ends by itself.
//!
//! ```text
//!   serial line ──► console ──► worker: writes pages, verifies them, answers
//!                   beat: one byte each ms to port 0xe9, before everything else
//!                   disk: O_DIRECT reads into known pages, where there is a disk
//!                   net: numbered datagrams to the host on the wire, with `vmferry.net` on the command line
//!                   relay: a turn that goes round the processors, where there are several
//! ```

mod beat;
mod console;
mod disk;
mod net;
mod relay;
mod sys;
mod worker;

use std::sync::Arc;

use vmferry_workload::Plan;

/// Real-time priorities: the beat must come through whatever the workload does on a single processor.
const BEAT_PRIORITY: i32 = 50;
const CONSOLE_PRIORITY: i32 = 40;

fn main() {
    if std::process::id() != 1 {
        eprintln!("vmferry-guest-init is the init of a test guest: boot it with vmferry-rig, not by hand");
        std::process::exit(2);
    }
    sys::mount("devtmpfs", c"/dev");
    sys::mount("proc", c"/proc");
    sys::mount("sysfs", c"/sys");
    let words = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let beat_ms = word(&words, "vmferry.beat_ms=").parse().unwrap_or(beat::BEAT_MS);
    let with_port = word(&words, "vmferry.beat_port=") != "off";
    let beat = Arc::new(beat::Counters::default());
    let beating = Arc::clone(&beat);
    std::thread::spawn(move || {
        sys::become_real_time(BEAT_PRIORITY);
        beat::run(&beating, beat_ms, with_port);
    });
    let plan = word(&words, "vmferry.plan=").parse::<Plan>();
    let disk = disk::start();
    let net = net::start(&words);
    let relay = relay::start();
    let mut serial = console::Serial::open().expect("the guest has a serial line");
    let plan = match plan {
        Ok(plan) => plan,
        Err(error) => {
            serial.say(&format!("error {error}"));
            panic!("no plan");
        }
    };
    let requests = worker::start(plan, worker::Counters { beat, disk, net, relay });
    serial.say("ready");
    sys::become_real_time(CONSOLE_PRIORITY);
    loop {
        let answer =
            serial.read_command().map_or_else(|error| format!("error {error}"), |line| requests.ask(line));
        serial.say(&answer);
    }
}

/// What follows `name` on the kernel's command line.
fn word<'a>(command_line: &'a str, name: &str) -> &'a str {
    command_line.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap_or_default()
}
