//! RDMA links on a real card (the lab's soft one): the contract of every link, and how a link ends.
#![expect(clippy::disallowed_methods, reason = "tests that wait need a deadline")]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use vmferry_datapath::link::contract::{self, Ends};
use vmferry_datapath::{RdmaConnection, RdmaLink, RdmaListener};

const WITHIN: Duration = Duration::from_secs(10);

/// The far end of the lab's wire.
fn far() -> SocketAddr {
    let port = 20_000 + u16::try_from(std::process::id() % 20_000).unwrap();
    SocketAddr::from(([10, 77, 0, 2], port))
}

/// Two connected ends, with the hello checked.
fn connected() -> (RdmaConnection, RdmaConnection) {
    let listener = RdmaListener::bind(far()).unwrap();
    let dialled = std::thread::spawn(|| RdmaConnection::connect(far(), b"hello", WITHIN).unwrap());
    let knock = listener.next(WITHIN).expect("nobody knocked");
    assert_eq!(&knock.hello()[..6], b"hello\0");
    let accepted = knock.accept().unwrap();
    (dialled.join().unwrap(), accepted)
}

fn rdma() -> Ends {
    let (a, b) = connected();
    (Box::new(RdmaLink::new(a)), Box::new(RdmaLink::new(b)))
}

#[test]
fn rdma_keeps_the_contract_of_every_link() {
    let start = Instant::now();
    contract::for_two_ways(&rdma);
    println!("the contract took {:?}", start.elapsed());
}
