//! A short run of every fuzz body, bounded by count: `VMFERRY_FUZZ_ROUNDS` makes it longer.
//!
//! The corpus comes from the real encoders, so that a change of the wire format is fuzzed the day it is made.

use std::collections::BTreeMap;

use vmferry_datapath::frame::{ChunkRecord, Credit, Record};
use vmferry_datapath::{ByteLen, ChunkIndex, RamBlock, RamLayout};
use vmferry_session::{
    AbortKind, AbortReason, Agreement, AttemptId, CipherSuite, CompressionMode, FinalTotals, GuestFacts,
    LaneTally, Message, Offer, TargetTerms, TargetTimes, VERSION, encode,
};
use vmferry_tests::fuzz;
use vmferry_tests::world::Dice;
use zerocopy::IntoBytes;

fn rounds(default: u64) -> u64 {
    std::env::var("VMFERRY_FUZZ_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

const ATTEMPT: AttemptId = AttemptId::from_bytes([0x5A; 16]);

fn guest() -> GuestFacts {
    let block =
        |name: &str, mib: u64| RamBlock { name: name.into(), len: ByteLen(mib << 20), page_bytes: 4096 };
    let layout = RamLayout::new(vec![block("m0", 2), block("m1", 64)]).unwrap_or_else(|e| panic!("{e}"));
    let facts = [("machine", "pc-q35-10.0"), ("cpus", "4"), ("note-vmm", "10.0.2")];
    let facts: BTreeMap<_, _> = facts.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    GuestFacts { kind: "qemu".into(), name: "a".into(), facts, layout }
}

fn offer() -> Offer {
    Offer {
        attempt: ATTEMPT,
        versions: vec![VERSION],
        ciphers: vec![CipherSuite::Aes256Gcm],
        compressions: vec![CompressionMode::Zstd, CompressionMode::Off],
        lanes: 4,
        verify: true,
        guest: guest(),
    }
}

fn messages() -> Vec<Message> {
    let reason = || AbortReason::new(AbortKind::Cancelled, "the move was cancelled");
    let agreement = Agreement {
        attempt: ATTEMPT,
        version: VERSION,
        cipher: CipherSuite::Aes256Gcm,
        compression: CompressionMode::Zstd,
        lanes: 4,
        verify: true,
    };
    let lanes = (0..4).map(|lane| LaneTally { lane, records: 100, bytes: 1 << 30 }).collect();
    let times = TargetTimes { complete_us: 10, load_us: 20, run_us: 30 };
    vec![
        Message::Offer(Box::new(offer())),
        Message::Answer(agreement),
        Message::Refuse(reason()),
        Message::Final(FinalTotals { lanes, state_bytes: 1 << 20, digest: Some("00ff".into()) }),
        Message::Ready(times),
        Message::Commit,
        Message::Running(times),
        Message::NeverRan { attempt: ATTEMPT, reason: reason() },
        Message::Unknown { attempt: ATTEMPT },
        Message::Ask { attempt: ATTEMPT },
        Message::Heard,
        Message::Abort(reason()),
        Message::Ping(7),
        Message::Pong(u64::MAX),
    ]
}

fn records() -> Vec<Record> {
    let chunk = |present, data, body_len, compressed| {
        Record::Chunk(ChunkRecord { chunk: ChunkIndex(3), present, data, body_len, compressed })
    };
    vec![
        chunk(1, 1, 4096, false),
        chunk(u64::MAX, 0b11, 8192, false),
        chunk(0b111, 0b101, 500, true),
        chunk(0b1000, 0, 0, false),
        Record::ZeroRun { first: ChunkIndex(9), count: 1000 },
        Record::State { len: 300 },
        Record::StateEnd,
        Record::Sync,
        Record::End,
        Record::Credit(Credit { records: 5, bytes: 1 << 20 }),
    ]
}

/// One record as it travels, body and tag included.
fn framed(record: &Record, dice: &mut Dice) -> Vec<u8> {
    let mut bytes = record.header().as_bytes().to_vec();
    bytes.extend((0..record.body_len() + 16).map(|_| u8::try_from(dice.below(256)).unwrap_or(0)));
    bytes
}

#[test]
fn the_corpus_itself_is_accepted() {
    for message in messages() {
        fuzz::control_bytes(&encode(&message).unwrap_or_else(|error| panic!("{error}")));
    }
    for record in records() {
        assert_eq!(record.header().check(), Ok(record));
        fuzz::lane_bytes(&framed(&record, &mut Dice::new(1)));
    }
}

#[test]
fn the_control_decoder_takes_noise() {
    let mut dice = Dice::new(0xC0DE);
    for _ in 0..rounds(20_000) {
        let mut bytes = fuzz::noise(&mut dice, 300);
        // Half of the time the length field is small, or nothing behind it would ever be read.
        if dice.per_mille(500) && bytes.len() > 4 {
            bytes[1..4].fill(0);
        }
        fuzz::control_bytes(&bytes);
    }
}

#[test]
fn the_control_decoder_takes_damaged_messages() {
    let mut dice = Dice::new(0xDA7A);
    let corpus: Vec<Vec<u8>> = messages().iter().filter_map(|message| encode(message).ok()).collect();
    for _ in 0..rounds(30_000) {
        let mut bytes = Vec::new();
        for _ in 0..=dice.below(2) {
            bytes.extend_from_slice(&corpus[dice.index(corpus.len())]);
        }
        fuzz::mutate(&mut bytes, &mut dice);
        // Most damage breaks the frame; mend it, so that the JSON behind it is reached.
        if dice.per_mille(500) && bytes.len() > 4 {
            let length = u32::try_from(bytes.len() - 4).unwrap_or(u32::MAX);
            bytes[..4].copy_from_slice(&length.to_le_bytes());
        }
        fuzz::control_bytes(&bytes);
    }
}

#[test]
fn a_megabyte_without_an_end_is_not_kept() {
    let mut bytes = u32::MAX.to_le_bytes().to_vec();
    bytes.resize(1 << 20, b' ');
    fuzz::control_bytes(&bytes);
    let deep = "[".repeat(200_000);
    let mut bytes = u32::try_from(deep.len()).unwrap_or(0).to_le_bytes().to_vec();
    bytes.extend_from_slice(deep.as_bytes());
    fuzz::control_bytes(&bytes);
}

#[test]
fn negotiation_takes_damaged_offers() {
    let mut dice = Dice::new(0x0FFE);
    let terms = TargetTerms {
        versions: vec![VERSION],
        ciphers: vec![CipherSuite::Aes256Gcm],
        compressions: vec![CompressionMode::Zstd],
        lanes_max: 64,
        guest: guest(),
    };
    let json = serde_json::to_vec(&offer()).unwrap_or_default();
    let mut reached = 0;
    for _ in 0..rounds(30_000) {
        let mut bytes = json.clone();
        fuzz::mutate(&mut bytes, &mut dice);
        if let Ok(offer) = serde_json::from_slice::<Offer>(&bytes) {
            reached += 1;
            fuzz::negotiation(&offer, &terms);
        }
    }
    assert!(reached > 100, "only {reached} damaged offers were offers at all");
}

#[test]
fn the_lane_parser_takes_noise_and_damaged_records() {
    let mut dice = Dice::new(0x1A4E);
    let corpus = records();
    for _ in 0..rounds(20_000) {
        fuzz::lane_bytes(&fuzz::noise(&mut dice, 400));
        let mut bytes = Vec::new();
        for _ in 0..=dice.below(3) {
            let record = corpus[dice.index(corpus.len())];
            bytes.extend(framed(&record, &mut dice));
        }
        // Damage the first header rather than some byte of a body.
        let mut head = bytes[..64].to_vec();
        fuzz::mutate(&mut head, &mut dice);
        bytes.splice(..64, head);
        fuzz::lane_bytes(&bytes);
    }
}
