//! The contract of every link, whole transfers, and how a link ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use vmferry_datapath::link::contract::{self, Ends};
use vmferry_datapath::*;

use crate::cable::Cut;
use crate::world::{
    self, CIPHERS, SEALED, assert_same, empty_ram, end, fill, noise_page, plan, send_everything, yes,
};

const WITHIN: Duration = Duration::from_secs(10);
/// The card gives up after 3.8 s; everything here is emulated.
const CUT_NOTICED: Duration = Duration::from_secs(20);

/// The far end of the lab's cable, on a port that no other test of this process uses.
fn far() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    SocketAddr::from(([10, 77, 0, 2], NEXT.fetch_add(1, Ordering::Relaxed)))
}

/// Two connected ends, with the hello checked.
pub(crate) fn connected() -> (RdmaConnection, RdmaConnection) {
    connected_as(Service::Bulk)
}

/// The same, as a service of its own.
pub(crate) fn connected_as(service: Service) -> (RdmaConnection, RdmaConnection) {
    let far = far();
    let listener = RdmaListener::bind(far).unwrap();
    let dial = move || RdmaConnection::connect_as(service, far, b"hello", WITHIN).unwrap();
    let dialled = std::thread::spawn(dial);
    let knock = listener.next(WITHIN).expect("nobody knocked");
    assert_eq!(&knock.hello()[..6], b"hello\0");
    let accepted = knock.accept().unwrap();
    (dialled.join().unwrap(), accepted)
}

fn rdma() -> Ends {
    let (a, b) = connected();
    (Box::new(RdmaLink::new(a)), Box::new(RdmaLink::new(b)))
}

/// The lanes' ends of a transfer over RDMA.
fn lanes(cipher: Cipher, lanes: usize) -> world::Ends {
    let lane = |n| {
        let (a, b) = connected();
        (end(RdmaLink::new(a), cipher, n, true), end(RdmaLink::new(b), cipher, n, false))
    };
    (0..lanes).map(lane).unzip()
}

#[test]
fn rdma_keeps_the_contract_of_every_link() {
    contract::for_two_ways(&rdma);
}

#[test]
fn everything_arrives_on_every_cipher() {
    for (cipher, count) in CIPHERS.into_iter().zip([2, 1, 3]) {
        let (source, target) = (empty_ram(&[64 * 12 + 7, 1, 64]), empty_ram(&[64 * 12 + 7, 1, 64]));
        fill(&source, 11);
        let ends = lanes(cipher, count);
        let (mut receiver, _states) = Receiver::start(Arc::clone(&target), ends.1, cipher).unwrap();
        let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(cipher)).unwrap();
        send_everything(&mut sender, &source);
        sender.flush().unwrap();
        assert_same(&source, &target);
        let mut dirty = PageSet::new(source.layout());
        for page in (0..64 * 12).step_by(5) {
            source.write_page(PageIndex(page), &noise_page(page)).unwrap();
            dirty.insert_range(PageIndex(page), PageCount(1));
        }
        assert!(sender.send(&dirty, &mut yes()).unwrap());
        let totals = sender.finish().unwrap();
        assert!(receiver.wait_complete(&totals, &mut yes()).unwrap());
        assert_same(&source, &target);
        assert_eq!((sender.failure(), receiver.failure()), (None, None));
    }
}

#[test]
fn a_cut_cable_is_told_by_the_name_that_the_card_gives_it() {
    let (source, target) = (empty_ram(&[64 * 16]), empty_ram(&[64 * 16]));
    for page in 0..64 * 16 {
        source.write_page(PageIndex(page), &noise_page(page)).unwrap();
    }
    let ends = lanes(SEALED, 1);
    let (_receiver, _states) = Receiver::start(target, ends.1, SEALED).unwrap();
    let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(SEALED)).unwrap();
    let all = PageSet::full(source.layout());
    sender.send(&all, &mut yes()).unwrap();
    sender.flush().unwrap();
    let cut = Cut::now();
    let start = Instant::now();
    let lost = loop {
        if let Err(error) = sender.send(&all, &mut yes()).and_then(|_| sender.flush()) {
            break error;
        }
        assert!(start.elapsed() < CUT_NOTICED, "nobody noticed");
    };
    drop(cut);
    println!("lab: noticed after {:?}: {lost}", start.elapsed());
    assert_eq!(lost.blame(), Blame::Link);
    assert!(lost.to_string().contains("IBV_WC_RETRY_EXC_ERR"), "{lost}");
}

#[test]
fn a_peer_that_listens_not_or_is_not_there_is_told_apart() {
    let nobody = RdmaConnection::connect(far(), b"hello", WITHIN).err().unwrap();
    assert!(matches!(nobody, RdmaError::Rejected { .. }), "{nobody}");
    assert!(nobody.to_string().contains("vmferry receive --listen rdma://10.77.0.2:"), "{nobody}");
    let loopback = SocketAddr::from(([127, 0, 0, 1], 20_000));
    let no_card = RdmaConnection::connect(loopback, b"hello", WITHIN).err().unwrap();
    assert!(matches!(no_card, RdmaError::NoDevice { .. }), "{no_card}");
    let strange = SocketAddr::from(([10, 77, 0, 99], 20_000));
    let silent = RdmaConnection::connect(strange, b"hello", Duration::from_secs(2)).err().unwrap();
    assert!(matches!(silent, RdmaError::Silent { .. } | RdmaError::NoDevice { .. }), "{silent}");
}
