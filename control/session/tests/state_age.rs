//! How old the VMM's state is when the target loads it: what the source told, and what passed here since.

#![expect(clippy::unwrap_used, reason = "a test: a panic is its failure")]

use std::collections::BTreeMap;
use std::time::Duration;

use vmferry_datapath::{ByteLen, RamBlock, RamLayout};
use vmferry_session::*;

fn guest() -> GuestFacts {
    let block = RamBlock { name: "ram".into(), len: ByteLen(1 << 20), page_bytes: 4096 };
    let layout = RamLayout::new(vec![block]).unwrap();
    GuestFacts { kind: "kvm".into(), name: "a".into(), facts: BTreeMap::new(), layout }
}

fn offer() -> Offer {
    Offer {
        attempt: AttemptId::from_bytes([1; 16]),
        versions: versions_for(&guest()),
        ciphers: vec![CipherSuite::Aes256Gcm],
        compressions: vec![],
        lanes: 1,
        transports: vec![LaneTransport::Tcp],
        verify: false,
        guest: guest(),
    }
}

fn terms() -> TargetTerms {
    TargetTerms {
        versions: VERSIONS.to_vec(),
        ciphers: vec![CipherSuite::Aes256Gcm],
        compressions: vec![],
        lanes_max: 1,
        transports: vec![LaneTransport::Tcp],
        guest: guest(),
    }
}

/// The lanes are awaited from 10 s on, Final comes at 13 s, the last page at 14 s.
fn age_at_load(told: Option<u64>) -> Duration {
    let second = Duration::from_secs;
    let limits = Limits::for_move(None, 1 << 20, false);
    let mut session = TargetSession::listen(VacantToken::claim(), terms(), limits, second(0));
    let totals = FinalTotals { lanes: vec![], state_bytes: 1, digest: None, state_age_us: told };
    session.handle(TargetEvent::Message(Message::Offer(Box::new(offer()))), second(9));
    session.handle(TargetEvent::Prepared, second(10));
    session.handle(TargetEvent::LanesAccepted, second(11));
    session.handle(TargetEvent::Message(Message::Final(totals)), second(13));
    let complete = TargetEvent::RamComplete { state_bytes: 1, digest: None, complete_us: 0 };
    let actions = session.handle(complete, second(14));
    let load = |action| if let TargetAction::LoadState(_, age) = action { Some(age) } else { None };
    actions.into_iter().find_map(load).unwrap()
}

#[test]
fn the_state_is_as_old_as_both_sides_know_and_no_older_than_the_lanes() {
    assert_eq!(age_at_load(Some(250_000)), Duration::from_millis(1250));
    assert_eq!(age_at_load(None), Duration::from_secs(1), "an older source tells nothing");
    assert_eq!(age_at_load(Some(u64::MAX)), Duration::from_secs(4), "a peer that lies");
}
