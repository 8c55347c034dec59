//! A host that sends what no honest host sends: refused, named, and nothing written afterwards.

use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_datapath::error::Blame;
use vmferry_datapath::frame::{ChunkRecord, FrameFault, HEADER_BYTES, Kind, RECORD_BYTES_MAX, Record};
use vmferry_datapath::link::memory::Tap;
use vmferry_datapath::seal::{Sealer, Source};
use vmferry_datapath::*;

use crate::world::*;

/// A receiver whose peer is this test.
struct Prey {
    ram: Arc<GuestRam>,
    receiver: Receiver,
    state: StateStream,
    tap: Tap,
    sealer: Sealer,
}

const PAGES: u64 = 64 * 2 + 3;

impl Prey {
    fn new(cipher: Cipher) -> Prey {
        let ram = empty_ram(&[PAGES]);
        let (link, tap) = MemoryLink::tapped();
        let (receiver, state) =
            Receiver::start(Arc::clone(&ram), vec![end(link, cipher, 0, false)], cipher).unwrap();
        let sealer = Sealer::new(cipher, keys(cipher, 0, true).map(|keys| keys.outbound)).unwrap();
        Prey { ram, receiver, state, tap, sealer }
    }

    fn seal(&mut self, record: Record, body: &[u8]) -> Vec<u8> {
        let mut buffer = vec![0; RECORD_BYTES_MAX];
        buffer[HEADER_BYTES..HEADER_BYTES + body.len()].copy_from_slice(body);
        let len = self.sealer.seal(&record, Source::InPlace, &mut buffer).unwrap();
        buffer.truncate(len);
        buffer
    }

    /// A record with one page of a byte.
    fn page(&mut self, page: u64, byte: u8) -> Vec<u8> {
        let (chunk, mask) = (ChunkIndex(page / 64), 1 << (page % 64));
        let record = ChunkRecord { chunk, present: mask, data: mask, body_len: 4096, compressed: false };
        self.seal(Record::Chunk(record), &[byte; 4096])
    }

    fn send(&mut self, bytes: &[u8]) {
        // The prey may hang up in the middle of it.
        let _ = self.tap.write(bytes);
    }

    /// The failure, which must come and be the peer's.
    #[track_caller]
    fn fault(&self) -> FrameFault {
        let start = Instant::now();
        loop {
            match self.receiver.failure() {
                Some(error @ DataError::PeerMisbehaved { fault, .. }) => {
                    assert_eq!(error.blame(), Blame::Peer);
                    return fault;
                }
                Some(other) => panic!("the wrong blame: {other}"),
                None => assert!(start.elapsed() < Duration::from_secs(5), "nothing was refused"),
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn byte_of(&self, page: u64) -> u8 {
        let mut bytes = [0; PAGE_BYTES];
        self.ram.read_page(PageIndex(page), &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a page was torn");
        bytes[0]
    }

    /// Sends the bytes in question first.
    #[track_caller]
    fn refuses_at_once(mut self, bad: &[u8]) -> FrameFault {
        self.send(bad);
        self.fault()
    }

    /// Sends a good page, the bytes in question, and a page that must not be written any more.
    #[track_caller]
    fn refuses(mut self, bad: &[u8]) -> FrameFault {
        let (good, late) = (self.page(0, 1), self.page(1, 2));
        self.send(&good);
        self.send(bad);
        self.send(&late);
        let fault = self.fault();
        assert_eq!((self.byte_of(0), self.byte_of(1)), (1, 0), "something was written after {fault}");
        let mut state = Vec::new();
        assert!(self.state.read_to_end(&mut state).is_err(), "the state's reader was not told");
        fault
    }
}

#[test]
fn every_flipped_byte_of_a_sealed_record_is_refused() {
    let reference = Prey::new(SEALED).page(2, 9);
    let header = (0..HEADER_BYTES).step_by(3);
    for at in
        header.chain([HEADER_BYTES, 2000, reference.len() - 17, reference.len() - 16, reference.len() - 1])
    {
        let mut prey = Prey::new(SEALED);
        // The good page takes number 0, so the record in question is number 1.
        let (good, mut bad, late) = (prey.page(0, 1), prey.page(2, 9), prey.page(1, 2));
        bad[at] ^= 0x40;
        prey.send(&good);
        prey.send(&bad);
        prey.send(&late);
        // A length that grew within its limits makes the record wait for bytes: more of them decide it.
        prey.send(&vec![0; 2 * RECORD_BYTES_MAX]);
        prey.fault();
        assert_eq!((prey.byte_of(0), prey.byte_of(2), prey.byte_of(1)), (1, 0, 0), "flipped byte {at}");
    }
}

#[test]
fn replayed_dropped_and_reordered_records_are_refused() {
    for cipher in [SEALED, Cipher::Plain] {
        let mut prey = Prey::new(cipher);
        let records: Vec<_> = (0..3).map(|n| prey.page(n, 7)).collect();
        prey.send(&records[0]);
        prey.send(&records[2]);
        assert_eq!(prey.fault(), FrameFault::OutOfOrder { expected: 1, got: 2 });
        assert_eq!((prey.byte_of(0), prey.byte_of(2)), (7, 0));
        let mut prey = Prey::new(cipher);
        let first = prey.page(0, 7);
        prey.send(&first);
        prey.send(&first);
        assert_eq!(prey.fault(), FrameFault::OutOfOrder { expected: 1, got: 0 });
    }
}

#[test]
fn noise_is_not_a_record() {
    assert_eq!(
        Prey::new(SEALED).refuses(
            b"GET / HTTP/1.1\r\nHost: target.example.org\r\nUser-Agent: none\r\n\r\n....................."
        ),
        FrameFault::BadMagic
    );
}

#[test]
fn a_plain_record_on_a_sealed_lane_is_forged() {
    let mut plain = Prey::new(Cipher::Plain);
    plain.page(0, 1);
    let mut bad = plain.page(2, 9);
    bad.extend([0; 16]);
    assert_eq!(Prey::new(SEALED).refuses(&bad), FrameFault::Forged(1));
}

#[test]
fn honest_seals_over_dishonest_content_are_refused() {
    let chunk = |chunk, present, data: u64| {
        let body_len = data.count_ones() * 4096;
        Record::Chunk(ChunkRecord { chunk: ChunkIndex(chunk), present, data, body_len, compressed: false })
    };
    let packed =
        ChunkRecord { chunk: ChunkIndex(0), present: 0b11, data: 0b11, body_len: 100, compressed: true };
    let bomb = zstd::bulk::compress(&vec![0; 3 * 4096], 1).unwrap();
    let bomb_len = u32::try_from(bomb.len()).unwrap();
    let cases: [(Record, Vec<u8>, FrameFault); 10] = [
        (chunk(2, 0b1000, 0b1000), vec![9; 4096], FrameFault::NoSuchPage),
        (chunk(2, 0b1000, 0), vec![], FrameFault::NoSuchPage),
        (chunk(u64::MAX, 1, 0), vec![], FrameFault::NoSuchPage),
        (chunk(0, 0, 0), vec![], FrameFault::BadField("page mask")),
        (chunk(0, 1, 0b10), vec![9; 4096], FrameFault::BadField("page mask")),
        (Record::ZeroRun { first: ChunkIndex(0), count: u64::MAX }, vec![], FrameFault::NoSuchPage),
        (Record::ZeroRun { first: ChunkIndex(u64::MAX), count: 2 }, vec![], FrameFault::NoSuchPage),
        (Record::Chunk(packed), vec![9; 100], FrameFault::BadCompression),
        (Record::Chunk(ChunkRecord { body_len: bomb_len, ..packed }), bomb, FrameFault::BadCompression),
        (
            Record::Credit(frame::Credit { records: 1, bytes: 1 }),
            vec![],
            FrameFault::Unexpected(Kind::Credit),
        ),
    ];
    for (record, body, fault) in cases {
        let mut prey = Prey::new(SEALED);
        let good = prey.page(0, 1);
        let bad = prey.seal(record, &body);
        let late = prey.page(1, 2);
        [good, bad, late].iter().for_each(|bytes| prey.send(bytes));
        assert_eq!(prey.fault(), fault, "{record:?}");
        assert_eq!((prey.byte_of(0), prey.byte_of(1)), (1, 0), "written after {record:?}");
    }
}

#[test]
fn nothing_follows_the_end_and_state_ends_once() {
    let mut prey = Prey::new(SEALED);
    let records = [prey.seal(Record::End, &[]), prey.page(0, 1)];
    records.iter().for_each(|bytes| prey.send(bytes));
    assert_eq!(prey.fault(), FrameFault::Unexpected(Kind::Chunk));
    let mut prey = Prey::new(SEALED);
    let records = [
        prey.seal(Record::StateEnd { stream: 0 }, &[]),
        prey.seal(Record::State { stream: 0, len: 5 }, b"extra"),
    ];
    records.iter().for_each(|bytes| prey.send(bytes));
    assert_eq!(prey.fault(), FrameFault::Unexpected(Kind::State));
}

#[test]
fn a_state_stream_that_nobody_agreed_on_is_refused() {
    for stream in [1, 2, u16::MAX] {
        for record in [Record::State { stream, len: 4 }, Record::StateEnd { stream }] {
            let mut prey = Prey::new(SEALED);
            let body: &[u8] = if record.body_len() == 0 { &[] } else { b"evil" };
            let bad = prey.seal(record, body);
            assert_eq!(prey.refuses_at_once(&bad), FrameFault::UnknownStream(stream));
        }
    }
}

#[test]
fn a_state_stream_on_another_lane_is_refused() {
    let ((a, mut tap), (b, _other)) = (MemoryLink::tapped(), MemoryLink::tapped());
    let ends = vec![end(a, SEALED, 0, false), end(b, SEALED, 1, false)];
    let (receiver, mut states) = Receiver::start_with_devices(empty_ram(&[PAGES]), ends, SEALED, 2).unwrap();
    let mut sealer = Sealer::new(SEALED, keys(SEALED, 0, true).map(|keys| keys.outbound)).unwrap();
    let mut buffer = vec![0; RECORD_BYTES_MAX];
    let mut send = |record: Record, tap: &mut Tap| {
        let len = sealer.seal(&record, Source::InPlace, &mut buffer).unwrap();
        tap.write(&buffer[..len]).unwrap();
    };
    // Lane 0 carries the even streams: device 2's state may end here, device 1's may not.
    send(Record::StateEnd { stream: 2 }, &mut tap);
    assert_eq!(states[2].read(&mut [0; 8]).unwrap(), 0);
    send(Record::StateEnd { stream: 1 }, &mut tap);
    assert!(states[1].read(&mut [0; 8]).is_err(), "the reader of a refused stream is told");
    let refused = DataError::PeerMisbehaved { lane: 0, fault: FrameFault::WrongLane };
    assert_eq!(receiver.failure(), Some(refused));
}

#[test]
fn an_end_without_the_state_is_told_to_its_reader() {
    let mut prey = Prey::new(SEALED);
    let records = [prey.seal(Record::State { stream: 0, len: 4 }, b"half"), prey.seal(Record::End, &[])];
    records.iter().for_each(|bytes| prey.send(bytes));
    let mut state = Vec::new();
    assert!(prey.state.read_to_end(&mut state).is_err());
}

#[test]
fn totals_that_differ_are_refused() {
    let mut prey = Prey::new(SEALED);
    let records = [prey.page(0, 1), prey.seal(Record::End, &[])].concat();
    prey.send(&records);
    let right = LaneTotals { lane: 0, records: 2, bytes: records.len() as u64 };
    assert!(prey.receiver.wait_complete(&[right], &mut yes()).unwrap());
    let wrong = [
        vec![LaneTotals { records: 3, ..right }],
        vec![LaneTotals { bytes: 1, ..right }],
        vec![LaneTotals { lane: 1, ..right }],
        vec![right, right],
        vec![right, LaneTotals { lane: 1, ..right }],
        vec![],
    ];
    for totals in wrong {
        let refused = prey.receiver.wait_complete(&totals, &mut yes());
        assert!(matches!(refused, Err(DataError::PeerMisbehaved { .. })), "{totals:?}");
    }
}

#[test]
fn a_chunk_on_another_lane_is_refused() {
    let ram = empty_ram(&[PAGES]);
    let ((a, mut tap), (b, _other)) = (MemoryLink::tapped(), MemoryLink::tapped());
    let ends = vec![end(a, SEALED, 0, false), end(b, SEALED, 1, false)];
    let (receiver, _state) = Receiver::start(ram, ends, SEALED).unwrap();
    let mut sealer = Sealer::new(SEALED, keys(SEALED, 0, true).map(|keys| keys.outbound)).unwrap();
    let mut buffer = vec![0; RECORD_BYTES_MAX];
    let record = ChunkRecord { chunk: ChunkIndex(1), present: 1, data: 0, body_len: 0, compressed: false };
    let len = sealer.seal(&Record::Chunk(record), Source::InPlace, &mut buffer).unwrap();
    tap.write(&buffer[..len]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let refused = DataError::PeerMisbehaved { lane: 0, fault: FrameFault::WrongLane };
    assert_eq!(receiver.failure(), Some(refused));
}

#[test]
fn a_stranger_on_the_wire_is_found_out() {
    for at in [70, 300_000, 1_500_000] {
        let mut passed = 0;
        let (near, far, stranger) = tampered(SEALED, move |mut bytes| {
            if (passed..passed + bytes.len()).contains(&at) {
                bytes[at - passed] ^= 1;
            }
            passed += bytes.len();
            bytes
        });
        let (source, target) = (empty_ram(&[64 * 16]), empty_ram(&[64 * 16]));
        for page in 0..64 * 16 {
            source.write_page(PageIndex(page), &noise_page(page)).unwrap();
        }
        let (receiver, _state) = Receiver::start(target, vec![far], SEALED).unwrap();
        let mut sender = Sender::start(Arc::clone(&source), vec![near], plan(SEALED)).unwrap();
        let sent = sender.send(&PageSet::full(source.layout()), &mut yes()).and_then(|_| sender.flush());
        assert!(matches!(sent, Err(DataError::LinkLost { .. })), "the sender saw {sent:?}");
        // The link goes a moment before its reason is known.
        let start = Instant::now();
        while receiver.failure().is_none() && start.elapsed() < Duration::from_secs(1) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let failure = receiver.failure();
        assert!(
            matches!(failure, Some(DataError::PeerMisbehaved { .. })),
            "at {at}: {failure:?} but {sent:?}"
        );
        drop(sender);
        drop(receiver);
        stranger.join().unwrap();
    }
}

#[test]
fn false_credit_is_refused_by_the_sender() {
    for (records, bytes) in [(2, 100), (1, 1 << 40), (u64::MAX, u64::MAX)] {
        let (link, mut tap) = MemoryLink::tapped();
        let ram = empty_ram(&[64]);
        let mut sender =
            Sender::start(Arc::clone(&ram), vec![end(link, SEALED, 0, true)], plan(SEALED)).unwrap();
        let mut sealer = Sealer::new(SEALED, keys(SEALED, 0, false).map(|keys| keys.outbound)).unwrap();
        let mut buffer = vec![0; 4096];
        let credit = Record::Credit(frame::Credit { records, bytes });
        let len = sealer.seal(&credit, Source::InPlace, &mut buffer).unwrap();
        tap.write(&buffer[..len]).unwrap();
        let refused = sender.flush();
        assert_eq!(
            refused,
            Err(DataError::PeerMisbehaved { lane: 0, fault: FrameFault::BadCredit }),
            "{records} {bytes}"
        );
    }
}
