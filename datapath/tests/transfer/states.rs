//! State streams of several devices beside the pages, on the same lanes.

use std::io::Read;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use vmferry_datapath::limits::{DEVICE_STREAMS_MAX, STATE_PIECE_BYTES};
use vmferry_datapath::*;

use crate::world::*;

/// What device `stream` has to send: none, a few bytes, or some pieces.
fn state_of(stream: u16) -> Vec<u8> {
    let len = [0, 5, STATE_PIECE_BYTES, 3 * STATE_PIECE_BYTES + 1, 1_000_003][usize::from(stream) % 5];
    let mut state = u64::from(stream);
    std::iter::repeat_with(|| splitmix(&mut state).to_le_bytes()[0]).take(len).collect()
}

fn read_all(mut stream: StateStream) -> thread::JoinHandle<std::io::Result<Vec<u8>>> {
    thread::spawn(move || {
        let mut got = Vec::new();
        stream.read_to_end(&mut got).map(|_| got)
    })
}

fn move_with_devices(ends: Ends, cipher: Cipher, devices: u16) {
    let (source, target) = (empty_ram(&[64 * 30 + 5]), empty_ram(&[64 * 30 + 5]));
    fill(&source, 3);
    let (mut receiver, streams) =
        Receiver::start_with_devices(Arc::clone(&target), ends.1, cipher, devices.into()).unwrap();
    let readers: Vec<_> = streams.into_iter().map(read_all).collect();
    let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(cipher)).unwrap();
    let feeders: Vec<_> = (1..=devices)
        .map(|stream| {
            let mut feed = sender.device_feed(stream).unwrap();
            thread::spawn(move || {
                let state = state_of(stream);
                for part in state.chunks(100_000) {
                    assert!(feed.send(part, &mut yes()).unwrap());
                }
                feed.end().unwrap();
                assert_eq!(feed.sent_bytes(), state.len() as u64);
                assert!(matches!(feed.send(b"more", &mut yes()), Err(DataError::Bug(_))));
            })
        })
        .collect();
    send_everything(&mut sender, &source);
    sender.flush().unwrap();
    sender.send_state(&state_of(4)).unwrap();
    sender.end_state().unwrap();
    feeders.into_iter().for_each(|feeder| feeder.join().unwrap());
    let totals = sender.finish().unwrap();
    assert!(receiver.wait_complete(&totals, &mut yes()).unwrap());
    assert_same(&source, &target);
    for (stream, reader) in readers.into_iter().enumerate() {
        let sent = if stream == 0 { state_of(4) } else { state_of(u16::try_from(stream).unwrap()) };
        assert!(reader.join().unwrap().unwrap() == sent, "stream {stream} differs");
    }
}

#[test]
fn the_states_of_many_devices_travel_beside_the_pages() {
    for cipher in [Cipher::Plain, SEALED] {
        for lanes in [1, 2, 3] {
            move_with_devices(over_memory(cipher, lanes), cipher, 7);
        }
    }
    move_with_devices(over_tcp(SEALED, 2), SEALED, u16::try_from(DEVICE_STREAMS_MAX).unwrap());
}

#[test]
fn more_devices_than_the_limit_are_refused_on_both_sides() {
    let ends = over_memory(SEALED, 1);
    let over = DEVICE_STREAMS_MAX + 1;
    assert!(matches!(
        Receiver::start_with_devices(empty_ram(&[64]), ends.1, SEALED, over),
        Err(DataError::Bug(_))
    ));
    let sender = Sender::start(empty_ram(&[64]), ends.0, plan(SEALED)).unwrap();
    for stream in [0, u16::try_from(over).unwrap()] {
        assert!(matches!(sender.device_feed(stream), Err(DataError::Bug(_))));
    }
}

/// A device that never stops talking has a bounded share of a lane: the pages come through, and bring at most a
/// piece for each chunk with them.
#[test]
fn device_state_does_not_starve_the_pages() {
    const CHUNKS: u64 = 256;
    let (source, target) = (empty_ram(&[64 * CHUNKS]), empty_ram(&[64 * CHUNKS]));
    for page in 0..64 * CHUNKS {
        source.write_page(PageIndex(page), &noise_page(page)).unwrap();
    }
    let ends = over_memory(SEALED, 1);
    let (_receiver, streams) = Receiver::start_with_devices(target, ends.1, SEALED, 1).unwrap();
    let _readers: Vec<_> = streams.into_iter().map(read_all).collect();
    let mut sender = Sender::start(Arc::clone(&source), ends.0, plan(SEALED)).unwrap();
    let mut feed = sender.device_feed(1).unwrap();
    let talker = thread::spawn(move || {
        let chatter = vec![7; STATE_PIECE_BYTES];
        while feed.send(&chatter, &mut yes()).is_ok() {}
    });
    // Let it fill the lane first.
    let start = Instant::now();
    while sender.meter().state_bytes < 1 << 20 {
        assert!(start.elapsed() < Duration::from_secs(10), "the device does not get through");
    }
    let before = sender.meter().state_bytes;
    assert!(sender.send(&PageSet::full(source.layout()), &mut yes()).unwrap());
    sender.flush().unwrap();
    let beside = sender.meter().state_bytes - before;
    // A piece for each chunk, and some while orders change hands.
    let bound = (CHUNKS + 64) * STATE_PIECE_BYTES as u64;
    assert!(
        beside > 0 && beside <= bound,
        "{beside} bytes of device state came with {CHUNKS} chunks of pages"
    );
    sender.abort();
    talker.join().unwrap();
}

#[test]
fn a_feed_can_be_told_to_stop_and_hears_when_the_lanes_end() {
    let ends = over_memory(SEALED, 1);
    // Nobody reads: the pipe and the window fill up, and the feed has to wait.
    let (mut receiver, _streams) = Receiver::start_with_devices(empty_ram(&[64]), ends.1, SEALED, 1).unwrap();
    let mut sender = Sender::start(empty_ram(&[64]), ends.0, plan(SEALED)).unwrap();
    let mut feed = sender.device_feed(1).unwrap();
    let start = Instant::now();
    let go_on = &mut || start.elapsed() < Duration::from_millis(300);
    assert!(!feed.send(&vec![1; 64 << 20], go_on).unwrap());
    receiver.abort();
    sender.abort();
    assert!(feed.send(&vec![1; 64 << 20], &mut yes()).is_err());
}
