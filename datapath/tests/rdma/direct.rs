//! Direct mode: pages written straight into the target's guest.

use std::sync::Arc;

use vmferry_datapath::error::Blame;
use vmferry_datapath::*;

use crate::links::connected;
use crate::world::{self, SEALED, assert_same, empty_ram, end, fill, noise_page, plan, send_everything, yes};

/// The lanes' ends of a transfer in direct mode, and what the target opened.
fn direct(
    source: &Arc<GuestRam>,
    target: &Arc<GuestRam>,
    cipher: Cipher,
    (lanes, pin): (usize, Pin),
) -> (world::Ends, Arc<OpenRam>) {
    let open = OpenRam::new(Arc::clone(target), pin, lanes);
    let lane = |n| {
        let (a, b) = connected();
        let placing = RdmaLink::placing(a, Arc::clone(source));
        let opened = RdmaLink::open(b, Arc::clone(&open));
        (end(placing, cipher, n, true), end(opened, cipher, n, false))
    };
    ((0..lanes).map(lane).unzip(), open)
}

const BLOCKS: [u64; 3] = [64 * 40 + 7, 1, 64];

#[test]
fn everything_arrives_and_zeroes_stay_zero() {
    for (cipher, lanes) in [(SEALED, 2), (Cipher::Plain, 1)] {
        let (source, target) = (empty_ram(&BLOCKS), empty_ram(&BLOCKS));
        fill(&source, 11);
        let (ends, open) = direct(&source, &target, cipher, (lanes, Pin::AsNeeded));
        let (mut receiver, _state) = Receiver::start(Arc::clone(&target), ends.1, cipher).unwrap();
        let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(cipher)).unwrap();
        send_everything(&mut sender, &source);
        sender.flush().unwrap();
        assert_same(&source, &target);
        let totals = sender.finish().unwrap();
        assert!(receiver.wait_complete(&totals, &mut yes()).unwrap());
        assert_eq!((sender.failure(), receiver.failure()), (None, None));
        let (out, into) = (sender.meter(), receiver.meter());
        assert_eq!(out.wire_bytes, into.wire_bytes);
        assert!(out.wire_bytes > out.data_pages * 4096, "what was placed counts as sent");
        println!("lab: {} regions open for {} data pages", open.opened(), out.data_pages);
    }
}

/// Regions of a target in direct mode.
const REGION: u64 = 4 << 20;

#[test]
fn a_guest_that_is_larger_than_what_may_be_pinned_arrives_through_regions_that_open_and_close() {
    let blocks = [64 * 16 * 12, 5];
    let (source, target) = (empty_ram(&blocks), empty_ram(&blocks));
    for page in (0..blocks[0] + 5).step_by(3) {
        source.write_page(PageIndex(page), &noise_page(page)).unwrap();
    }
    let pin = Pin::AtMost(REGION * 5);
    let (ends, open) = direct(&source, &target, SEALED, (2, pin));
    let (mut receiver, _state) = Receiver::start(Arc::clone(&target), ends.1, SEALED).unwrap();
    let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(SEALED)).unwrap();
    for round in 0..2 {
        send_everything(&mut sender, &source);
        sender.flush().unwrap();
        assert_same(&source, &target);
        println!("lab: round {round}: {} regions open, {} were closed", open.opened(), open.closed());
        assert!(open.opened() <= 5, "more is pinned than may be");
    }
    assert!(open.closed() >= 13 - 5, "{} regions were closed", open.closed());
    let totals = sender.finish().unwrap();
    assert!(receiver.wait_complete(&totals, &mut yes()).unwrap());
    assert_eq!((sender.failure(), receiver.failure()), (None, None));
}

#[test]
fn all_of_a_guest_is_pinned_before_the_first_page_when_asked_for() {
    let (source, target) = (empty_ram(&BLOCKS), empty_ram(&BLOCKS));
    fill(&source, 11);
    let (ends, open) = direct(&source, &target, SEALED, (2, Pin::All));
    let (_receiver, _state) = Receiver::start(Arc::clone(&target), ends.1, SEALED).unwrap();
    assert_eq!(open.opened(), 3 + 1 + 1, "each region of each block");
    let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(SEALED)).unwrap();
    send_everything(&mut sender, &source);
    sender.flush().unwrap();
    assert_same(&source, &target);
    assert_eq!((open.opened(), open.closed()), (5, 0));
}

#[test]
fn lanes_that_could_not_hold_a_region_each_are_refused() {
    let (source, target) = (empty_ram(&[64]), empty_ram(&[64]));
    let (ends, _open) = direct(&source, &target, SEALED, (2, Pin::AtMost(REGION)));
    let refused = Receiver::start(Arc::clone(&target), ends.1, SEALED).err().unwrap();
    assert!(refused.to_string().contains("--rdma-pin-max"), "{refused}");
}

#[test]
fn a_zero_that_is_on_its_way_never_wipes_out_a_newer_page() {
    let (source, target) = (empty_ram(&[64 * 4]), empty_ram(&[64 * 4]));
    let (ends, _open) = direct(&source, &target, SEALED, (1, Pin::AsNeeded));
    let (_receiver, _state) = Receiver::start(Arc::clone(&target), ends.1, SEALED).unwrap();
    let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(SEALED)).unwrap();
    let mut some = PageSet::new(source.layout());
    some.insert_range(PageIndex(60), PageCount(70));
    for round in 0..8_u64 {
        for page in 60..130 {
            source.write_page(PageIndex(page), &noise_page(round << 20 | page)).unwrap();
        }
        // The zero is told and not yet on the ring when the same pages are written past it.
        sender.send_zero(&some).unwrap();
        sender.send(&some, &mut yes()).unwrap();
        sender.flush().unwrap();
        assert_same(&source, &target);
    }
}

#[test]
fn what_a_target_did_not_agree_to_is_refused() {
    let (source, target) = (empty_ram(&[64]), empty_ram(&[64]));
    source.write_page(PageIndex(3), &noise_page(3)).unwrap();
    let (a, b) = connected();
    let placing = end(RdmaLink::placing(a, Arc::clone(&source)), SEALED, 0, true);
    let sealed = end(RdmaLink::new(b), SEALED, 0, false);
    let (receiver, mut state) = Receiver::start(Arc::clone(&target), vec![sealed], SEALED).unwrap();
    let all = PageSet::full(source.layout());
    let sent = Sender::start(Arc::clone(&source), vec![placing], plan(SEALED))
        .and_then(|mut sender| sender.send(&all, &mut yes()).and_then(|_| sender.flush()));
    assert_eq!(sent.unwrap_err().blame(), Blame::Peer, "the target lets it hold no region");
    assert!(std::io::Read::read(&mut state, &mut [0; 1]).is_err());
    assert_eq!(receiver.failure().map(|failure| failure.blame()), Some(Blame::Link));
    assert!(target.populated().unwrap().is_empty(), "nothing was written");
}
