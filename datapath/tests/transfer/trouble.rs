//! A peer that is stuck or gone, a caller that stops, and the memory that all this takes.

use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_datapath::error::Blame;
use vmferry_datapath::*;

use crate::world::*;

const SOON: Duration = Duration::from_secs(2);

fn full_ram(pages: u64) -> Arc<GuestRam> {
    let ram = empty_ram(&[pages]);
    for page in 0..pages {
        ram.write_page(PageIndex(page), &noise_page(page)).unwrap();
    }
    ram
}

/// A lane to a peer that takes in nothing, and what keeps it open.
fn stuck(tcp: bool) -> (LaneEnd, Box<dyn std::any::Any>) {
    if tcp {
        let (a, b) = tcp_pair();
        return (end(TcpLink::new(a), SEALED, 0, true), Box::new(b));
    }
    let (a, tap) = MemoryLink::tapped();
    (end(a, SEALED, 0, true), Box::new(tap))
}

#[test]
fn a_stuck_peer_blocks_nobody_and_a_stop_is_quick() {
    for tcp in [false, true] {
        let (lane, _peer) = stuck(tcp);
        let source = full_ram(64 * 256);
        let mut sender = Sender::start(Arc::clone(&source), vec![lane], plan(SEALED)).unwrap();
        let (start, mut asked) = (Instant::now(), 0);
        let sent = sender.send(&PageSet::full(source.layout()), &mut || {
            asked += 1;
            start.elapsed() < Duration::from_millis(100)
        });
        assert_eq!(sent, Ok(false));
        assert!(asked > 3 && start.elapsed() < SOON, "asked {asked} times in {:?}", start.elapsed());
        assert_eq!(sender.flush_while(&mut || start.elapsed() < Duration::from_millis(200)), Ok(false));
        let stopping = Instant::now();
        sender.abort();
        assert!(stopping.elapsed() < SOON, "the stop took {:?}", stopping.elapsed());
        let lost = DataError::LinkLost { lane: 0, fault: LinkFault::Stopped };
        assert_eq!(sender.send(&PageSet::full(source.layout()), &mut yes()), Err(lost));
    }
}

#[test]
fn a_peer_that_goes_away_is_a_lost_link_on_both_sides() {
    for tcp in [false, true] {
        let ends = if tcp { over_tcp(SEALED, 2) } else { over_memory(SEALED, 2) };
        let (source, target) = (full_ram(64 * 64), empty_ram(&[64 * 64]));
        let (receiver, mut state) = Receiver::start(target, ends.1, SEALED).unwrap();
        let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(SEALED)).unwrap();
        sender.send(&PageSet::full(source.layout()), &mut yes()).unwrap();
        sender.flush().unwrap();
        drop(receiver);
        let start = Instant::now();
        let lost = loop {
            let sent = sender.send(&PageSet::full(source.layout()), &mut yes()).and_then(|_| sender.flush());
            if let Err(error) = sent {
                break error;
            }
            assert!(start.elapsed() < SOON);
        };
        assert_eq!(lost.blame(), Blame::Link, "{lost}");
        assert_eq!(sender.failure(), Some(lost));
        assert!(state.read(&mut [0; 16]).is_err(), "the state's reader waits for a receiver that is gone");
    }
}

#[test]
fn an_idle_lane_notices_that_its_peer_is_gone() {
    for ends in [over_tcp(SEALED, 1), over_memory(SEALED, 1)] {
        let (source, target) = (empty_ram(&[64]), empty_ram(&[64]));
        let (receiver, mut state) = Receiver::start(target, ends.1, SEALED).unwrap();
        let sender = Sender::start(source, ends.0, plan(SEALED)).unwrap();
        drop(sender);
        assert!(state.read(&mut [0; 16]).is_err());
        assert_eq!(receiver.failure().map(|error| error.blame()), Some(Blame::Link));
    }
}

#[test]
fn a_stop_in_the_middle_leaves_both_sides_quickly() {
    for stop_after_ms in [0, 1, 3, 10, 30] {
        let ends = over_tcp(SEALED, 2);
        let (source, target) = (full_ram(64 * 64), empty_ram(&[64 * 64]));
        let (mut receiver, _state) = Receiver::start(target, ends.1, SEALED).unwrap();
        let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(SEALED)).unwrap();
        let start = Instant::now();
        let mut go_on = || start.elapsed() < Duration::from_millis(stop_after_ms);
        while sender.send(&PageSet::full(source.layout()), &mut go_on).unwrap() {}
        drop(sender);
        let complete = receiver.wait_complete(&[], &mut yes());
        assert!(matches!(complete, Err(DataError::LinkLost { .. })), "{complete:?}");
        drop(receiver);
        assert!(start.elapsed() < SOON, "took {:?}", start.elapsed());
    }
}

#[test]
fn waiting_for_a_sender_that_is_not_done_can_be_given_up() {
    let ends = over_tcp(SEALED, 1);
    let (mut receiver, _state) = Receiver::start(empty_ram(&[64]), ends.1, SEALED).unwrap();
    let _sender = Sender::start(empty_ram(&[64]), ends.0, plan(SEALED)).unwrap();
    let start = Instant::now();
    let waited = receiver.wait_complete(&[], &mut || start.elapsed() < Duration::from_millis(50));
    assert_eq!(waited, Ok(false));
    assert!(start.elapsed() < SOON);
}

#[test]
fn a_cpu_that_is_not_ours_is_a_refusal_with_a_fix() {
    let mut ends = over_memory(SEALED, 1);
    ends.0[0].cpu = Some(1000);
    let refused = Sender::start(empty_ram(&[64]), ends.0, plan(SEALED)).err().unwrap();
    assert_eq!(refused.blame(), Blame::Host, "{refused}");
    assert!(refused.to_string().contains("taskset"));
}

#[test]
fn cipher_and_keys_must_agree() {
    let ends = over_memory(SEALED, 1);
    assert!(matches!(Sender::start(empty_ram(&[64]), ends.0, plan(Cipher::Plain)), Err(DataError::Bug(_))));
    let ends = over_memory(Cipher::Plain, 1);
    assert!(matches!(Receiver::start(empty_ram(&[64]), ends.1, SEALED), Err(DataError::Bug(_))));
}

/// Private memory of this process in KiB: not the guest's, which is shared and not ours to count.
fn private_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn memory_does_not_grow_with_what_was_sent() {
    let source = full_ram(64 * 512);
    let target = empty_ram(&[64 * 512]);
    let ends = over_tcp(SEALED, 2);
    let (_receiver, _state) = Receiver::start(target, ends.1, SEALED).unwrap();
    let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(SEALED)).unwrap();
    let all = PageSet::full(source.layout());
    sender.send(&all, &mut yes()).unwrap();
    sender.flush().unwrap();
    let before = private_kib();
    for _ in 0..4 {
        sender.send(&all, &mut yes()).unwrap();
    }
    sender.flush().unwrap();
    // Other tests may run beside this one in the same process; a leak of pages would be 512 MiB.
    let grown = private_kib().saturating_sub(before);
    assert!(grown < 48 * 1024, "512 MiB sent took {grown} KiB");
}
