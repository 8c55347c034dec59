//! Transfers that go well.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vmferry_datapath::*;

use crate::world::*;

/// Blocks that end in the middle of a chunk, one of them tiny.
const BLOCKS: [u64; 3] = [64 * 40 + 7, 1, 64 * 11];

/// Moves everything twice, with device state, and compares all there is to compare.
fn move_all(ends: Ends, plan: SendPlan) -> (Meter, Meter) {
    let (source, target) = (empty_ram(&BLOCKS), empty_ram(&BLOCKS));
    fill(&source, 11);
    let holes = target.populated().unwrap();
    assert!(holes.is_empty());
    let (mut receiver, mut state) = Receiver::start(Arc::clone(&target), ends.1, plan.cipher).unwrap();
    let mut sender = Sender::start(Arc::clone(&source), ends.0, plan).unwrap();
    send_everything(&mut sender, &source);
    sender.flush().unwrap();
    assert_same(&source, &target);
    let untouched = target.populated().unwrap().count();
    assert!(untouched < source.populated().unwrap().count(), "zero pages were allocated on the target");

    // A second round: some pages change, some become zero.
    let mut dirty = PageSet::new(source.layout());
    for page in (0..2000).step_by(7) {
        let bytes = if page % 3 == 0 { [0; PAGE_BYTES] } else { noise_page(page) };
        source.write_page(PageIndex(page), &bytes).unwrap();
        dirty.insert_range(PageIndex(page), PageCount(1));
    }
    assert!(sender.send(&dirty, &mut yes()).unwrap());
    let device: Vec<u8> = (0..700_001_u32).map(|n| n.to_le_bytes()[1]).collect();
    let sent = device.clone();
    let reader = thread::spawn(move || {
        let mut got = Vec::new();
        state.read_to_end(&mut got).map(|_| got)
    });
    sender.send_state(&sent).unwrap();
    sender.end_state().unwrap();
    let totals = sender.finish().unwrap();
    assert!(receiver.wait_complete(&totals, &mut yes()).unwrap());
    assert!(reader.join().unwrap().unwrap() == device, "the device state differs");
    assert_same(&source, &target);
    assert_eq!((sender.failure(), receiver.failure()), (None, None));
    let (out, into) = (sender.meter(), receiver.meter());
    assert_eq!(out.wire_bytes, into.wire_bytes);
    assert_eq!((out.data_pages, out.zero_pages), (into.data_pages, into.zero_pages));
    assert_eq!(out.state_bytes, 700_001);
    assert_eq!(out.wire_bytes, totals.iter().map(|lane| lane.bytes).sum::<u64>());
    (out, into)
}

#[test]
fn everything_arrives_over_memory_on_every_cipher() {
    for cipher in CIPHERS {
        for lanes in [1, 3] {
            move_all(over_memory(cipher, lanes), plan(cipher));
        }
    }
}

#[test]
fn everything_arrives_over_tcp_on_every_cipher() {
    for cipher in CIPHERS {
        for lanes in [1, 2, 5] {
            move_all(over_tcp(cipher, lanes), plan(cipher));
        }
    }
}

#[test]
fn compression_and_hashes_change_nothing_but_the_wire() {
    let plain = move_all(over_tcp(SEALED, 2), plan(SEALED)).0;
    let hashed = SendPlan { keep_hashes: true, ..plan(SEALED) };
    assert_eq!(move_all(over_tcp(SEALED, 2), hashed).0.wire_bytes, plain.wire_bytes);
    let packed = SendPlan { compression: Compression::Zstd { level: 1 }, ..hashed };
    let packed = move_all(over_memory(SEALED, 2), packed).0;
    assert!(packed.wire_bytes < plain.wire_bytes, "text did not shrink");
}

#[test]
fn a_zero_guest_costs_almost_nothing_on_the_wire() {
    let (source, target) = (empty_ram(&[64 * 4096]), empty_ram(&[64 * 4096]));
    let ends = over_memory(SEALED, 2);
    let (mut receiver, _state) = Receiver::start(Arc::clone(&target), ends.1, SEALED).unwrap();
    let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(SEALED)).unwrap();
    send_everything(&mut sender, &source);
    let totals = sender.finish().unwrap();
    assert!(receiver.wait_complete(&totals, &mut yes()).unwrap());
    assert_eq!(sender.meter().zero_pages, 64 * 4096);
    assert!(sender.meter().wire_bytes < 64 * 1024, "1 GiB of holes took {} bytes", sender.meter().wire_bytes);
    assert!(target.populated().unwrap().is_empty() && source.populated().unwrap().is_empty());
}

#[test]
fn a_newer_copy_is_never_overtaken() {
    let (source, target) = (empty_ram(&[64 * 8]), empty_ram(&[64 * 8]));
    let ends = over_tcp(SEALED, 3);
    let (_receiver, _state) = Receiver::start(Arc::clone(&target), ends.1, SEALED).unwrap();
    let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(SEALED)).unwrap();
    let all = PageSet::full(source.layout());
    for round in 0..200 {
        for page in 0..512 {
            let bytes = if (page + round) % 5 == 0 {
                [0; PAGE_BYTES]
            } else {
                [u8::try_from(round).unwrap(); PAGE_BYTES]
            };
            source.write_page(PageIndex(page), &bytes).unwrap();
        }
        sender.send(&all, &mut yes()).unwrap();
    }
    sender.flush().unwrap();
    assert_same(&source, &target);
}

#[test]
fn a_page_written_while_it_is_sealed_is_torn_at_worst_and_right_when_sent_again() {
    let (source, target) = (empty_ram(&[64 * 32]), empty_ram(&[64 * 32]));
    fill(&source, 5);
    let ends = over_tcp(SEALED, 2);
    let (_receiver, _state) = Receiver::start(Arc::clone(&target), ends.1, SEALED).unwrap();
    let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(SEALED)).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (guest, running) = (Arc::clone(&source), Arc::clone(&stop));
    let writer = thread::spawn(move || {
        let mut state = 1;
        while !running.load(Ordering::Relaxed) {
            let page = splitmix(&mut state) % (64 * 32);
            guest.write_page(PageIndex(page), &noise_page(state)).unwrap();
        }
    });
    let all = PageSet::full(source.layout());
    for _ in 0..20 {
        sender.send(&all, &mut yes()).unwrap();
    }
    sender.flush().unwrap();
    assert_eq!(sender.failure(), None, "a torn read must not break the seal");
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    sender.send(&all, &mut yes()).unwrap();
    sender.flush().unwrap();
    assert_same(&source, &target);
}

#[test]
fn hashes_find_exactly_the_pages_that_changed() {
    let (source, target) = (empty_ram(&[64 * 4]), empty_ram(&[64 * 4]));
    fill(&source, 3);
    source.write_page(PageIndex(17), &noise_page(1)).unwrap();
    source.write_page(PageIndex(18), &[0; PAGE_BYTES]).unwrap();
    let ends = over_memory(SEALED, 2);
    let (_receiver, _state) = Receiver::start(target, ends.1, SEALED).unwrap();
    let hashed = SendPlan { keep_hashes: true, ..plan(SEALED) };
    let mut sender = Sender::start(Arc::clone(&source), ends.0, hashed).unwrap();
    let all = PageSet::full(source.layout());
    assert_eq!(sender.changed_since_sent(&all).count().0, 256, "nothing was sent yet");
    sender.send(&all, &mut yes()).unwrap();
    sender.flush().unwrap();
    assert!(sender.changed_since_sent(&all).is_empty());
    source.write_page(PageIndex(17), &noise_page(2)).unwrap();
    source.write_page(PageIndex(18), &noise_page(3)).unwrap();
    let changed = sender.changed_since_sent(&all);
    assert_eq!(changed.iter_chunks().collect::<Vec<_>>(), vec![(ChunkIndex(0), 0b11 << 17)]);
}

#[test]
fn the_rate_limit_holds_for_all_lanes_together() {
    let (source, target) = (empty_ram(&[64 * 64]), empty_ram(&[64 * 64]));
    for page in 0..64 * 64 {
        source.write_page(PageIndex(page), &noise_page(page)).unwrap();
    }
    let ends = over_tcp(SEALED, 2);
    let (_receiver, _state) = Receiver::start(target, ends.1, SEALED).unwrap();
    let limited = SendPlan { rate_limit: Some(40_000_000), ..plan(SEALED) };
    let mut sender = Sender::start(Arc::clone(&source), ends.0, limited).unwrap();
    let start = Instant::now();
    sender.send(&PageSet::full(source.layout()), &mut yes()).unwrap();
    sender.flush().unwrap();
    let took = start.elapsed();
    assert!(took > Duration::from_millis(350), "16 MiB at 40 MB/s took only {took:?}");
    sender.set_rate_limit(None);
    let again = Instant::now();
    sender.send(&PageSet::full(source.layout()), &mut yes()).unwrap();
    sender.flush().unwrap();
    assert!(again.elapsed() < took / 2, "the limit was not lifted");
}
