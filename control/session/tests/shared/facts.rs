//! A guest, an offer and what a target grants, as the tests of both machines use them.

use std::collections::BTreeMap;

use vmferry_datapath::{ByteLen, RamBlock, RamLayout};
use vmferry_session::*;

/// The attempt of every offer.
pub(crate) const ATTEMPT: AttemptId = AttemptId::from_bytes([7; 16]);

/// A guest of one megabyte.
pub(crate) fn guest() -> GuestFacts {
    let block = RamBlock { name: "ram".into(), len: ByteLen(1 << 20), page_bytes: 4096 };
    let layout = RamLayout::new(vec![block]).unwrap();
    GuestFacts { kind: "process".into(), name: "a".into(), facts: BTreeMap::new(), layout }
}

/// What a source asks for.
pub(crate) fn offer() -> Offer {
    Offer {
        transports: vec![LaneTransport::Tcp],
        attempt: ATTEMPT,
        versions: vec![VERSION],
        ciphers: vec![CipherSuite::Aes256Gcm],
        compressions: vec![],
        lanes: 2,
        verify: false,
        guest: guest(),
    }
}

/// What a target grants.
pub(crate) fn terms() -> TargetTerms {
    TargetTerms {
        transports: vec![LaneTransport::Tcp],
        versions: vec![VERSION],
        ciphers: vec![CipherSuite::Aes256Gcm],
        compressions: vec![],
        lanes_max: 8,
        guest: guest(),
    }
}
