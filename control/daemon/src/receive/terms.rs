//! What a waiting target brings to the table.

use vmferry_datapath::limits::LANES_MAX;
use vmferry_guest::TargetGuest;
use vmferry_session::{CipherSuite, CompressionMode, LaneTransport, TargetTerms, VERSIONS};

use crate::cli::ReceiveArgs;
use crate::endpoint::Transport;
use crate::fabric::{self, PinWish};
use crate::failure::Failure;
use crate::send::facts;

/// Lanes that are taken at most.
fn lanes_max() -> u16 {
    u16::try_from(LANES_MAX).unwrap_or(u16::MAX)
}

/// What lanes over RDMA pin here. Refuses what this process may not lock in memory, before anybody comes.
pub(super) fn pins(args: &ReceiveArgs, ram_bytes: u64) -> Result<fabric::Pins, Failure> {
    let wish = match (args.pin.rdma_pin_max, args.pin.rdma_pin_all) {
        (Some(most), _) => PinWish::AtMost(most.as_u64()),
        (None, true) => PinWish::All,
        (None, false) => PinWish::None,
    };
    let direct = args.rdma.rdma_direct_plaintext.then_some((ram_bytes, wish));
    fabric::pins_of_target(lanes_max(), direct, args.listen.resolve()?)
}

/// The terms of this wait.
pub(super) fn terms(args: &ReceiveArgs, guest: &dyn TargetGuest, pins: Option<&fabric::Pins>) -> TargetTerms {
    let cipher =
        if args.security.insecure_plaintext { CipherSuite::Plaintext } else { CipherSuite::Aes256Gcm };
    // The door takes lanes over TCP in any case: a source that falls back finds it open.
    let transports = match args.listen.transport {
        Transport::Tcp => vec![LaneTransport::Tcp],
        Transport::Rdma if args.rdma.rdma_direct_plaintext => {
            vec![LaneTransport::RdmaDirect, LaneTransport::Tcp]
        }
        Transport::Rdma => vec![LaneTransport::RdmaSealed, LaneTransport::Tcp],
    };
    TargetTerms {
        versions: VERSIONS.to_vec(),
        ciphers: vec![cipher],
        compressions: vec![CompressionMode::Zstd, CompressionMode::Off],
        lanes_max: pins.map_or(lanes_max(), |pins| pins.lanes_max),
        transports,
        guest: facts(guest.description(), guest.devices()),
    }
}
