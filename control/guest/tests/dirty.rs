//! `PAGEMAP_SCAN` on another process: the contract of dirty logs, and the end of that process.

#[path = "commanded/process.rs"]
mod process;

use rustix::io::Errno;
use vmferry_datapath::dirty::contract::{Scribe, check};
use vmferry_datapath::{PageIndex, PageSet, TrackError};
use vmferry_guest::attach;
use vmferry_rig::require;

use process::Process;

#[test]
fn pagemap_scan_keeps_the_contract() {
    require!(vmferry_rig::root());
    require!(attach::kernel_support());
    let mut process = Process::start();
    let mut tracked = process.track(attach::track).unwrap();
    check(&mut process, tracked.log.as_mut()).unwrap();
}

#[test]
fn a_writer_that_ended_is_an_error_and_never_a_quiet_one() {
    require!(vmferry_rig::root());
    require!(attach::kernel_support());
    let mut process = Process::start();
    let mut tracked = process.track(attach::track).unwrap();
    let mut pages = PageSet::new(process.layout());
    tracked.log.collect(&mut pages).unwrap();
    process.write(&[PageIndex(7)]).unwrap();
    drop(process);
    let outcome = tracked.log.collect(&mut pages);
    assert!(matches!(outcome, Err(TrackError::GuestChanged { errno: Errno::SRCH, .. })), "{outcome:?}");
}
