//! The contract of dirty logs on another process, by the soft-dirty bits that only the lab's kernel has, and by
//! `PAGEMAP_SCAN` on that kernel.

#[path = "commanded/process.rs"]
mod process;

use vmferry_datapath::dirty::contract::check;
use vmferry_guest::attach;

use process::Process;

#[test]
fn pagemap_scan_keeps_the_contract() {
    let mut process = Process::start();
    let mut tracked = process.track(attach::track).unwrap();
    assert_eq!(tracked.log.name(), "pagemap-scan");
    check(&mut process, tracked.log.as_mut()).unwrap();
}

#[test]
fn soft_dirty_keeps_the_contract() {
    let mut process = Process::start();
    let mut tracked = process.track(attach::track_by_soft_dirty).unwrap();
    assert_eq!(tracked.log.name(), "soft-dirty");
    check(&mut process, tracked.log.as_mut()).unwrap();
}
