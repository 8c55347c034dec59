//! The contract of every link, for whoever writes one: call each clause with a maker of fresh, connected ends.
//!
//! ```
//! use vmferry_datapath::MemoryLink;
//! use vmferry_datapath::link::contract::{self, Ends};
//!
//! let memory = || -> Ends {
//!     let (a, b) = MemoryLink::pair();
//!     (Box::new(a), Box::new(b))
//! };
//! contract::for_two_ways(&memory);
//! ```
//!
//! A clause panics where the link breaks it, and says how. The same clauses run over memory, TCP, files and, in the lab,
//! over RDMA.

use std::time::Duration;

use super::{Link, LinkPlan, LinkTrouble};
use crate::error::LinkFault;

/// Small buffers, so that every one of them is used many times.
pub const PLAN: LinkPlan = LinkPlan { send_slots: 3, slot_bytes: 64 << 10, receive_bytes: 128 << 10 };
const TICK: Duration = Duration::from_millis(20);
/// Slots that a peer who takes in nothing may swallow in buffers of its own.
const SWALLOWED_MAX: usize = 4096;

/// Two connected ends.
pub type Ends = (Box<dyn Link>, Box<dyn Link>);

/// Every clause of a link that carries both ways.
///
/// # Panics
/// Where the link breaks a clause.
pub fn for_two_ways(ends: &dyn Fn() -> Ends) {
    bytes_arrive_whole_and_in_order_both_ways(ends());
    a_closed_link_gives_its_last_bytes_and_then_says_so(ends());
    a_breaker_wakes_a_waiting_lane(ends());
    a_stuck_peer_leaves_slots_busy_and_nobody_blocked(ends());
}

/// Every clause of a link that carries one way only, from the first end to the second.
///
/// # Panics
/// Where the link breaks a clause.
pub fn for_one_way(ends: &dyn Fn() -> Ends) {
    bytes_arrive_whole_and_in_order(ends());
    a_closed_link_gives_its_last_bytes_and_then_says_so(ends());
}

/// Bytes that follow from `seed` and do not repeat soon.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_le_bytes()[7]
    };
    (0..len).map(|_| next()).collect()
}

/// Sends all bytes in pieces, and returns when the link has none of them any more.
///
/// # Panics
/// When the link hands a slot out while it is on its way.
pub fn send_all(link: &mut dyn Link, bytes: &[u8], piece: usize) -> Result<(), LinkTrouble> {
    for piece in bytes.chunks(piece) {
        let slot = loop {
            match link.free_slot() {
                Some(slot) => break slot,
                None => link.progress(TICK)?,
            };
        };
        link.slot_mut(slot)[..piece.len()].copy_from_slice(piece);
        link.submit(slot, piece.len())?;
        assert!(
            link.slot_mut(slot).is_empty() || link.unsent() == 0,
            "a slot was handed out while on its way"
        );
    }
    while link.unsent() > 0 {
        link.progress(TICK)?;
    }
    Ok(())
}

/// Receives so many bytes, giving them back to the link in pieces.
pub fn receive_all(link: &mut dyn Link, len: usize, piece: usize) -> Result<Vec<u8>, LinkTrouble> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let take = link.arrived().len().min(piece);
        if take == 0 {
            link.progress(TICK)?;
            continue;
        }
        bytes.extend_from_slice(&link.arrived()[..take]);
        link.consume(take);
    }
    Ok(bytes)
}

fn prepare(link: &mut dyn Link) {
    let prepared = link.prepare(PLAN);
    assert_eq!(prepared, Ok(()), "{}: its buffers were refused", link.name());
}

/// One way.
///
/// # Panics
/// When the bytes differ.
pub fn bytes_arrive_whole_and_in_order((mut a, mut b): Ends) {
    let sent = noise(1, 3_000_000);
    let expected = sent.clone();
    let receiving = std::thread::spawn(move || {
        prepare(b.as_mut());
        assert_eq!(receive_all(b.as_mut(), expected.len(), 7001).as_deref(), Ok(expected.as_slice()));
    });
    prepare(a.as_mut());
    assert_eq!(send_all(a.as_mut(), &sent, 60_001), Ok(()));
    drop(a);
    assert!(receiving.join().is_ok(), "the receiving end broke the contract");
}

/// There and back again, with buffers much smaller than what they carry.
///
/// # Panics
/// When the bytes differ.
pub fn bytes_arrive_whole_and_in_order_both_ways((mut a, mut b): Ends) {
    let (there, back) = (noise(1, 3_000_000), noise(2, 200_000));
    let (expected, echo) = (there.clone(), back.clone());
    let answering = std::thread::spawn(move || {
        prepare(b.as_mut());
        let got = receive_all(b.as_mut(), expected.len(), 7001);
        assert!(got.as_ref() == Ok(&expected), "{}: the bytes there differ, or {:?}", b.name(), got.err());
        assert_eq!(send_all(b.as_mut(), &echo, 999), Ok(()));
        // Stays until the other end is done, as a lane does.
        while b.progress(TICK).is_ok() {}
    });
    prepare(a.as_mut());
    assert_eq!(send_all(a.as_mut(), &there, 60_001), Ok(()));
    let got = receive_all(a.as_mut(), back.len(), usize::MAX);
    assert!(got.as_ref() == Ok(&back), "{}: the bytes back differ, or {:?}", a.name(), got.err());
    drop(a);
    assert!(answering.join().is_ok(), "the answering end broke the contract");
}

/// # Panics
/// When bytes are lost at the end, or the end is not told.
pub fn a_closed_link_gives_its_last_bytes_and_then_says_so((mut a, mut b): Ends) {
    prepare(a.as_mut());
    prepare(b.as_mut());
    assert_eq!(send_all(a.as_mut(), &[7; 1000], 1000), Ok(()));
    drop(a);
    assert_eq!(receive_all(b.as_mut(), 1000, 10), Ok(vec![7; 1000]));
    let end = receive_all(b.as_mut(), 1, 1);
    assert_eq!(end, Err(LinkTrouble::Lost(LinkFault::Closed)), "{}", b.name());
}

/// # Panics
/// When the lane's thread panicked. When it is not woken, this never returns.
pub fn a_breaker_wakes_a_waiting_lane((mut a, _b): Ends) {
    let breaker = match a.breaker() {
        Ok(breaker) => breaker,
        Err(trouble) => panic!("{}: no breaker: {trouble:?}", a.name()),
    };
    let waiting = std::thread::spawn(move || {
        prepare(a.as_mut());
        while a.progress(Duration::from_secs(20)).is_ok() {}
    });
    std::thread::sleep(Duration::from_millis(30));
    breaker.sever();
    assert!(waiting.join().is_ok(), "the waiting lane panicked");
}

/// # Panics
/// When a peer that takes in nothing is not felt, or blocks.
pub fn a_stuck_peer_leaves_slots_busy_and_nobody_blocked((mut a, _b): Ends) {
    prepare(a.as_mut());
    let mut submitted = 0;
    while let Some(slot) = a.free_slot() {
        a.slot_mut(slot).fill(1);
        assert_eq!(a.submit(slot, PLAN.slot_bytes), Ok(()));
        submitted += 1;
        assert!(submitted < SWALLOWED_MAX, "a stuck peer took 256 MiB");
    }
    assert_eq!(a.unsent(), PLAN.send_slots);
    let moved = a.progress(Duration::from_millis(30));
    assert_eq!(moved, Ok(false), "{}: nothing can have happened", a.name());
}
