//! A short run of every fuzz body, bounded by count: `VMFERRY_FUZZ_ROUNDS` makes it longer.
//!
//! The corpus comes from the real encoders, so that a change of the wire format is fuzzed the day it is made.

use std::collections::BTreeMap;

use vmferry::door::LaneHello;
use vmferry_datapath::{ByteLen, RamBlock, RamLayout};
use vmferry_session::{
    AbortKind, AbortReason, Agreement, AttemptId, CipherSuite, CompressionMode, DeviceTimes, FinalTotals,
    GuestFacts, LaneTally, LaneTransport, Message, Offer, TargetTerms, TargetTimes, VERSION, encode,
};
use vmferry_tests::fuzz;
use vmferry_tests::world::Dice;

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
        transports: vec![LaneTransport::Tcp],
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
        transport: LaneTransport::Tcp,
        attempt: ATTEMPT,
        version: VERSION,
        cipher: CipherSuite::Aes256Gcm,
        compression: CompressionMode::Zstd,
        lanes: 4,
        verify: true,
    };
    let lanes = (0..4).map(|lane| LaneTally { lane, records: 100, bytes: 1 << 30 }).collect();
    let times =
        TargetTimes { complete_us: 10, load_us: 20, run_us: 30, devices: DeviceTimes::new(5, &[1, 2]) };
    vec![
        Message::Offer(Box::new(offer())),
        Message::Answer(agreement),
        Message::Refuse(reason()),
        Message::Final(FinalTotals {
            lanes,
            state_bytes: 1 << 20,
            digest: Some("00ff".into()),
            state_age_us: Some(20_000),
        }),
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

#[test]
fn the_corpus_itself_is_accepted() {
    for message in messages() {
        fuzz::control_bytes(&encode(&message).unwrap_or_else(|error| panic!("{error}")));
    }
}

#[test]
fn the_control_decoder_takes_noise() {
    let mut dice = Dice::new(0xC0DE);
    for _ in 0..rounds(200_000) {
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
    for _ in 0..rounds(100_000) {
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
        transports: vec![LaneTransport::Tcp],
        versions: vec![VERSION],
        ciphers: vec![CipherSuite::Aes256Gcm],
        compressions: vec![CompressionMode::Zstd],
        lanes_max: 64,
        guest: guest(),
    };
    let json = serde_json::to_vec(&offer()).unwrap_or_default();
    let mut reached = 0;
    for _ in 0..rounds(100_000) {
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
fn the_door_takes_damaged_greetings() {
    let mut dice = Dice::new(0xD00A);
    for lane in 0..u16::try_from(rounds(20_000) / 4).unwrap_or(u16::MAX) {
        let mut bytes = LaneHello { attempt: ATTEMPT, lane }.to_bytes().to_vec();
        fuzz::lane_greeting(&bytes);
        fuzz::mutate(&mut bytes, &mut dice);
        bytes.extend(fuzz::noise(&mut dice, 24));
        fuzz::lane_greeting(&bytes);
    }
}
