//! Memory that a card locks, and a process that may not lock it.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use vmferry_datapath::link::LinkTrouble;
use vmferry_datapath::link::contract::PLAN;
use vmferry_datapath::link::rdma::memlock;
use vmferry_datapath::{Link, RdmaLink};

use crate::links::connected;

/// Runs `work` on a thread that may lock only so many bytes. The limit is the process's, so it is put back.
fn with_limit(bytes: u64, work: fn()) {
    let before = getrlimit(Resource::Memlock);
    setrlimit(Resource::Memlock, Rlimit { current: Some(bytes), maximum: before.maximum }).unwrap();
    let limited = std::thread::spawn(move || {
        let mut sets = capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::IPC_LOCK);
        set_capabilities(None, sets).unwrap();
        work();
    });
    let done = limited.join();
    setrlimit(Resource::Memlock, before).unwrap();
    assert!(done.is_ok(), "the limited thread panicked");
}

#[test]
fn a_low_limit_is_told_before_the_start_with_the_exact_number() {
    with_limit(8 << 20, || {
        let low = memlock::check(1 << 30).unwrap_err().to_string();
        assert!(low.contains("needs 1 073 741 824 bytes locked, the limit is 8 388 608"), "{low}");
        assert!(low.contains("ulimit -l 1048576") && low.contains("LimitMEMLOCK=1073741824"), "{low}");
        assert_eq!(memlock::check(8 << 20), Ok(()));
    });
    assert_eq!(memlock::check(1 << 30), Ok(()), "root may lock what it likes");
}

#[test]
fn the_cards_own_refusal_names_the_limit_too() {
    with_limit(64 << 10, || {
        let (a, _b) = connected();
        let mut link = RdmaLink::new(a);
        let refused = link.prepare(PLAN);
        let Err(LinkTrouble::Refused { service, fix, .. }) = refused else {
            panic!("192 KiB were locked under a limit of 64: {refused:?}")
        };
        assert!(service.contains("RDMA card") && fix.contains("LimitMEMLOCK"), "{service}: {fix}");
    });
}
