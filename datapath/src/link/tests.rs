//! The links that every machine has keep the contract. The lab's test runs the same clauses over RDMA.

use std::net::{TcpListener, TcpStream};

use super::contract::{Ends, for_one_way, for_two_ways};
use super::file::FileLink;
use super::memory::MemoryLink;
use super::tcp::TcpLink;

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

fn file() -> Ends {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream");
    let writer = FileLink::create(&path).unwrap();
    (Box::new(writer), Box::new(FileLink::open(&path).unwrap()))
}

#[test]
fn memory_keeps_the_contract() {
    for_two_ways(&memory);
}

#[test]
fn tcp_keeps_the_contract() {
    for_two_ways(&tcp);
}

#[test]
fn a_file_keeps_the_contract_one_way() {
    for_one_way(&file);
}
