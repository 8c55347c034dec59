//! The contract of every link.

use std::net::{TcpListener, TcpStream};
use std::thread;

use super::memory::MemoryLink;
use super::tcp::TcpLink;
use super::*;
use crate::testing::noise;

const PLAN: LinkPlan = LinkPlan { send_slots: 3, slot_bytes: 64 << 10, receive_bytes: 128 << 10 };
const TICK: Duration = Duration::from_millis(20);

type Ends = (Box<dyn Link>, Box<dyn Link>);

pub(crate) fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client, listener.accept().unwrap().0)
}

fn memory() -> Ends {
    let (a, b) = MemoryLink::pair();
    (Box::new(a), Box::new(b))
}

fn tcp() -> Ends {
    let (a, b) = tcp_pair();
    (Box::new(TcpLink::new(a)), Box::new(TcpLink::new(b)))
}

const LINKS: [fn() -> Ends; 2] = [memory, tcp];

fn send_all(link: &mut dyn Link, bytes: &[u8], piece: usize) -> Result<(), LinkTrouble> {
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

fn receive_all(link: &mut dyn Link, len: usize, consume: usize) -> Result<Vec<u8>, LinkTrouble> {
    let mut bytes = Vec::new();
    while bytes.len() < len {
        let take = link.arrived().len().min(consume);
        if take == 0 {
            link.progress(TICK)?;
            continue;
        }
        bytes.extend_from_slice(&link.arrived()[..take]);
        link.consume(take);
    }
    Ok(bytes)
}

#[test]
fn bytes_arrive_whole_and_in_order_both_ways() {
    for ends in LINKS {
        let (mut a, mut b) = ends();
        let (there, back) = (noise(1, 3_000_000), noise(2, 200_000));
        let echo = back.clone();
        let got = thread::spawn(move || {
            b.prepare(PLAN).unwrap();
            let got = receive_all(b.as_mut(), 3_000_000, 7001).unwrap();
            send_all(b.as_mut(), &echo, 999).unwrap();
            // Stays until the other end is done, as a lane does.
            while b.progress(TICK).is_ok() {}
            got
        });
        a.prepare(PLAN).unwrap();
        send_all(a.as_mut(), &there, 60_001).unwrap();
        assert!(receive_all(a.as_mut(), back.len(), usize::MAX).unwrap() == back);
        drop(a);
        assert!(got.join().unwrap() == there);
    }
}

#[test]
fn a_closed_link_gives_its_last_bytes_and_then_says_so() {
    for ends in LINKS {
        let (mut a, mut b) = ends();
        a.prepare(PLAN).unwrap();
        b.prepare(PLAN).unwrap();
        send_all(a.as_mut(), &[7; 1000], 1000).unwrap();
        drop(a);
        assert_eq!(receive_all(b.as_mut(), 1000, 10).unwrap(), vec![7; 1000]);
        let end = receive_all(b.as_mut(), 1, 1);
        assert_eq!(end, Err(LinkTrouble::Lost(LinkFault::Closed)), "{}", b.name());
    }
}

#[test]
fn a_breaker_wakes_a_waiting_lane() {
    for ends in LINKS {
        let (mut a, _b) = ends();
        let breaker = a.breaker().unwrap();
        let waiting = thread::spawn(move || {
            a.prepare(PLAN).unwrap();
            while a.progress(Duration::from_secs(20)).is_ok() {}
        });
        thread::sleep(Duration::from_millis(30));
        breaker.sever();
        waiting.join().unwrap();
    }
}

#[test]
fn a_stuck_peer_leaves_slots_busy_and_nobody_blocked() {
    for ends in LINKS {
        let (mut a, _b) = ends();
        a.prepare(PLAN).unwrap();
        let mut submitted = 0;
        while let Some(slot) = a.free_slot() {
            a.slot_mut(slot).fill(1);
            a.submit(slot, PLAN.slot_bytes).unwrap();
            submitted += 1;
            assert!(submitted < 4096, "a stuck peer took 256 MiB");
        }
        assert_eq!(a.unsent(), PLAN.send_slots);
        assert!(!a.progress(Duration::from_millis(30)).unwrap(), "nothing can have happened");
    }
}
