//! The urgent path over a queue pair of its own: it passes the bulk of the pages, and never brings an older one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, eth, recv, socket_with};
use vmferry_datapath::*;

use crate::links::{connected, connected_as};
use crate::world::{self, SEALED, assert_same, empty_ram, end, noise_page, plan, yes};

/// 32 MiB, twice what may wait at a lane.
const CHUNKS: u64 = 128;
const ALL: u64 = CHUNKS * 64;

fn noisy() -> Arc<GuestRam> {
    let ram = empty_ram(&[ALL]);
    (0..ALL).for_each(|page| ram.write_page(PageIndex(page), &noise_page(page)).unwrap());
    ram
}

fn page_of(ram: &GuestRam, page: PageIndex) -> Vec<u8> {
    let mut bytes = vec![0; PAGE_BYTES];
    ram.gather(page.chunk(), 1 << page.bit(), &mut bytes);
    bytes
}

/// The end of an urgent path on each side.
fn urgent_ends() -> (LaneEnd, LaneEnd) {
    let (a, b) = connected_as(Service::Urgent);
    (end(RdmaLink::new(a), SEALED, 9, true), end(RdmaLink::new(b), SEALED, 9, false))
}

/// Sends all of a guest on `lanes`, and its last pages urgently as soon as the first ones have arrived.
fn urgent_beside(source: &Arc<GuestRam>, target: &Arc<GuestRam>, lanes: world::Ends) {
    let (mut receiver, _state) = Receiver::start(Arc::clone(target), lanes.1, SEALED).unwrap();
    let mut sender = Sender::start(Arc::clone(source), lanes.0, plan(SEALED)).unwrap();
    let (near, far) = urgent_ends();
    let mut urgent_receiver = receiver.open_urgent(far).unwrap();
    let mut urgent = sender.open_urgent(near).unwrap();
    let all = PageSet::full(source.layout());
    let bulk = std::thread::scope(|scope| {
        let bulk = scope.spawn(|| sender.send_rest(&all, &mut yes()).and_then(|_| sender.flush()));
        while receiver.meter().data_pages < 64 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let wanted = [ALL - 1, ALL - 64, ALL - 130].map(PageIndex);
        for page in wanted {
            assert!(urgent.send(page).unwrap(), "the bulk was faster than {page:?}");
            urgent.flush().unwrap();
            let through = receiver.meter().data_pages;
            println!("lab: {page:?} has arrived, and {through} pages of {ALL} that were queued before it");
            assert_eq!(page_of(target, page), page_of(source, page));
            assert!(through < ALL - 3, "the urgent page waited for the bulk");
            assert!(!urgent.send(page).unwrap(), "a page was sent twice");
        }
        bulk.join().unwrap()
    });
    bulk.unwrap();
    assert_same(source, target);
    assert_eq!(sender.meter().data_pages, ALL - 3, "each page by one path");
    let (rest, totals) = (sender.finish().unwrap(), urgent.finish().unwrap());
    assert!(receiver.wait_complete(&rest, &mut yes()).unwrap());
    assert!(urgent_receiver.wait_complete(&totals, &mut yes()).unwrap());
    assert!(sender.send(&all, &mut yes()).is_err(), "beside an urgent path only the rest is sent");
}

#[test]
fn an_urgent_page_passes_sealed_pages_that_were_queued_before_it() {
    let (a, b) = connected();
    let ends = (vec![end(RdmaLink::new(a), SEALED, 0, true)], vec![end(RdmaLink::new(b), SEALED, 0, false)]);
    urgent_beside(&noisy(), &empty_ram(&[ALL]), ends);
}

#[test]
fn an_urgent_page_passes_pages_that_are_placed() {
    let (source, target) = (noisy(), empty_ram(&[ALL]));
    let (a, b) = connected();
    let open = OpenRam::new(Arc::clone(&target), Pin::AsNeeded, 1);
    let placing = end(RdmaLink::placing(a, Arc::clone(&source)), SEALED, 0, true);
    let opened = end(RdmaLink::open(b, open), SEALED, 0, false);
    urgent_beside(&source, &target, (vec![placing], vec![opened]));
}

/// Sources of RDMA packets of this traffic class that came by on any interface, until `over`.
fn sources_of_class(class: u8, over: &AtomicBool) -> Vec<[u8; 4]> {
    let every = socket_with(AddressFamily::PACKET, SocketType::DGRAM, SocketFlags::NONBLOCK, Some(eth::ALL));
    let every = every.unwrap();
    let (mut packet, mut sources) = ([0_u8; 128], Vec::new());
    while !over.load(Ordering::Relaxed) {
        let Ok((len, _)) = recv(&every, &mut packet, RecvFlags::empty()) else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        // IPv4 without options, UDP to the port of RoCE.
        if len > 28 && packet[0] == 0x45 && packet[22..24] == [0x12, 0xb7] && packet[1] & !3 == class {
            sources.extend(packet[12..16].first_chunk::<4>());
        }
    }
    sources
}

#[test]
fn urgent_packets_say_so_on_the_wire_in_both_directions() {
    const EXPEDITED: u8 = 46 << 2;
    let over = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let watch = scope.spawn(|| sources_of_class(EXPEDITED, &over));
        std::thread::sleep(Duration::from_millis(100));
        let (source, target) = (empty_ram(&[64]), empty_ram(&[64]));
        source.write_page(PageIndex(5), &noise_page(5)).unwrap();
        let (near, far) = urgent_ends();
        let (_receiver, _state) = Receiver::start(Arc::clone(&target), vec![far], SEALED).unwrap();
        let mut sender = Sender::start(Arc::clone(&source), vec![near], plan(SEALED)).unwrap();
        sender.send(&PageSet::full(source.layout()), &mut yes()).unwrap();
        sender.flush().unwrap();
        over.store(true, Ordering::Relaxed);
        watch.join().unwrap()
    });
    println!("lab: {} packets of the urgent class", seen.len());
    assert!(seen.contains(&[10, 77, 0, 1]) && seen.contains(&[10, 77, 0, 2]), "{seen:?}");
}
