//! A process beside the VMM that maps the guest's memory too and writes it, as a vhost-user backend does.
//!
//! `vmferry-second-writer FILE FIRST_PAGE PLAN` writes until its standard input ends, then prints its registers in
//! hexadecimal, so that whoever started it can hold any copy of the memory against them.

use std::fs::OpenOptions;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use vmferry_workload::{MappedPages, Pace, Plan, Writer};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let mut words = std::env::args().skip(1);
    let usage = "usage: vmferry-second-writer FILE FIRST_PAGE PLAN";
    let (file, first, plan) =
        (words.next().ok_or(usage)?, words.next().ok_or(usage)?, words.next().ok_or(usage)?);
    let (first, plan): (u64, Plan) = (first.parse()?, plan.parse()?);
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    let mut memory = MappedPages::shared(&file, first, usize::try_from(plan.pages)?)?;
    let mut pace = Pace::new(plan.rate, now());
    let mut writer = Writer::new(plan);
    writer.fill(&mut memory);
    println!("ready");
    let over = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&over);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        told.store(true, Ordering::Release);
    });
    while !over.load(Ordering::Acquire) {
        let due = pace.due(now());
        writer.write(&mut memory, due);
        pace.wrote(due);
        if due == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let registers = writer.registers().save();
    println!("{}", registers.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    Ok(())
}

fn now() -> Duration {
    let time = clock_gettime(ClockId::Monotonic);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}
