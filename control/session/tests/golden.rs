//! The bytes of each protocol version, as shipped: what this build writes, and what it must read for ever.
//!
//! Version 2 adds what a guest with devices needs, and nothing else: everything without them is as in version 1. Version 3
//! adds the age of the state.
//!
//! A new version adds a file; `UPDATE_GOLDEN=1` writes the file of the newest one, never an older one.

#![expect(clippy::unwrap_used, reason = "a test: a panic is its failure")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use vmferry_datapath::{ByteLen, RamBlock, RamLayout};
use vmferry_session::*;

fn messages() -> Vec<Message> {
    let attempt = AttemptId::from_bytes(*b"0123456789abcdef");
    let block = |name: &str, page_bytes| RamBlock { name: name.into(), len: ByteLen(2 << 20), page_bytes };
    let guest = GuestFacts {
        kind: "qemu".into(),
        name: "a".into(),
        facts: BTreeMap::from([("machine".into(), "pc-q35-10.0".into())]),
        layout: RamLayout::new(vec![block("m0", 4096), block("m1", 2 << 20)]).unwrap(),
    };
    let offer = Offer {
        transports: vec![LaneTransport::Tcp],
        attempt,
        versions: vec![1],
        ciphers: vec![CipherSuite::Aes256Gcm, CipherSuite::Plaintext],
        compressions: vec![CompressionMode::Zstd, CompressionMode::Off],
        lanes: 2,
        verify: true,
        guest,
    };
    let agreement = Agreement {
        transport: LaneTransport::Tcp,
        attempt,
        version: 1,
        cipher: CipherSuite::Aes256Gcm,
        compression: CompressionMode::Off,
        lanes: 2,
        verify: true,
    };
    let totals = FinalTotals {
        lanes: vec![
            LaneTally { lane: 0, records: 3, bytes: 4096 },
            LaneTally { lane: 1, records: 1, bytes: 0 },
        ],
        state_bytes: 300_000,
        digest: Some("00ff".into()),
        state_age_us: None,
    };
    let times = TargetTimes { complete_us: 1, load_us: 2, run_us: 3, devices: DeviceTimes::default() };
    let reason = || AbortReason::new(AbortKind::HostRefused, "the host refused");
    vec![
        Message::Offer(Box::new(offer)),
        Message::Answer(agreement),
        Message::Refuse(AbortReason::new(AbortKind::Plaintext, "this side wants TLS")),
        Message::Final(totals),
        Message::Ready(times),
        Message::Commit,
        Message::Running(times),
        Message::NeverRan { attempt, reason: reason() },
        Message::Unknown { attempt },
        Message::Ask { attempt },
        Message::Heard,
        Message::Abort(reason()),
        Message::Ping(1),
        Message::Pong(u64::MAX),
    ]
}

/// One message a line: the length in hexadecimal, a blank, the JSON.
fn as_line(bytes: &[u8]) -> String {
    let (length, json) = bytes.split_at(4);
    let length: String = length.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{length} {}\n", std::str::from_utf8(json).unwrap())
}

/// What version 2 adds: a guest with two devices, and how long their states took to load.
fn messages_with_devices() -> Vec<Message> {
    let Some(Message::Offer(mut offer)) = messages().into_iter().next() else { panic!("no offer") };
    let device = |name: &str| DeviceIdentity { name: name.into(), model: "mtty-2".into() };
    offer.guest.facts.extend(device_facts(&[device("eth1"), device("eth0")]));
    offer.versions = vec![VERSION_WITH_DEVICES];
    let times = TargetTimes { complete_us: 1, load_us: 2, run_us: 3, devices: DeviceTimes::new(4, &[5, 6]) };
    vec![Message::Offer(offer), Message::Ready(times), Message::Running(times)]
}

#[test]
fn version_1_is_written_and_read_as_shipped() {
    as_shipped("v1.txt", &messages());
}

/// What version 3 adds: how old the state is.
fn messages_with_state_age() -> Vec<Message> {
    let Some(Message::Offer(mut offer)) = messages().into_iter().next() else { panic!("no offer") };
    offer.versions = versions_for(&offer.guest);
    let totals =
        FinalTotals { lanes: vec![], state_bytes: 300_000, digest: None, state_age_us: Some(12_345) };
    vec![Message::Offer(offer), Message::Final(totals)]
}

#[test]
fn version_2_is_written_and_read_as_shipped() {
    as_shipped("v2.txt", &messages_with_devices());
}

#[test]
fn version_3_is_written_and_read_as_shipped() {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let written: String =
            messages_with_state_age().iter().map(|message| as_line(&encode(message).unwrap())).collect();
        std::fs::write(golden("v3.txt"), written).unwrap();
    }
    as_shipped("v3.txt", &messages_with_state_age());
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn as_shipped(name: &str, messages: &[Message]) {
    let written: String = messages.iter().map(|message| as_line(&encode(message).unwrap())).collect();
    let path = golden(name);
    let shipped = std::fs::read_to_string(&path).unwrap();
    assert_eq!(written, shipped, "the wire format changed: that is a new protocol version, not a new file");
    for (line, message) in shipped.lines().zip(messages) {
        let (length, json) = line.split_once(' ').unwrap();
        let mut decoder = Decoder::default();
        decoder.push(&u32::from_str_radix(length, 16).unwrap().swap_bytes().to_le_bytes());
        decoder.push(json.as_bytes());
        assert_eq!(decoder.next_message(), Ok(Some(message.clone())));
    }
}
