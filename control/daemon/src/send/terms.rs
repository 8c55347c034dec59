//! What a move is begun with: the offer to the target, and the plan for the session.

use vmferry_datapath::{ByteLen, Cipher, fastest_provider};
use vmferry_guest::failover::{CancelFlag, FailoverMode, FailoverOptions, OnUnplugTimeout};
use vmferry_guest::{Description, DeviceFacts, SourceGuest};
use vmferry_session::{
    AttemptId, CipherSuite, CompressionMode, ConvergePlan, DeviceIdentity, GuestFacts, LaneTransport, Limits,
    Offer, OnNoConverge, Predictor, Priors, SaveOrder, SourcePlan, device_facts, versions_for,
};

use super::hands::SourceHands;
use super::history::HistoryFile;
use crate::cli::{Compress, Failover, Fallback, NoConverge, SendArgs, UnplugTimeout};
use crate::endpoint::Transport;
use crate::failure::Failure;

/// So many devices that each take all of `--unplug-timeout` fit into the time for preparing.
const PRIMARIES_FORESEEN: u32 = 4;

pub(super) fn offer(args: &SendArgs, attempt: AttemptId, lanes: u16, guest: &dyn SourceGuest) -> Offer {
    let cipher =
        if args.security.insecure_plaintext { CipherSuite::Plaintext } else { CipherSuite::Aes256Gcm };
    let compressions = match args.compress {
        Compress::Zstd | Compress::Auto => vec![CompressionMode::Zstd, CompressionMode::Off],
        Compress::Off => vec![CompressionMode::Off],
    };
    let guest = facts(guest.description(), guest.devices());
    let mut transports = match args.to.transport {
        Transport::Tcp => vec![LaneTransport::Tcp],
        Transport::Rdma if args.rdma.rdma_direct_plaintext => vec![LaneTransport::RdmaDirect],
        Transport::Rdma => vec![LaneTransport::RdmaSealed],
    };
    if args.rdma.rdma_fallback == Some(Fallback::Tcp) && !transports.contains(&LaneTransport::Tcp) {
        transports.push(LaneTransport::Tcp);
    }
    Offer {
        transports,
        attempt,
        versions: versions_for(&guest),
        ciphers: vec![cipher],
        compressions,
        lanes,
        verify: args.verify,
        guest,
    }
}

/// The guest's description and its devices in the session's words.
#[must_use]
pub fn facts(guest: &Description, devices: &[DeviceFacts]) -> GuestFacts {
    let streamed = devices.iter().filter(|device| device.has_stream());
    let identity =
        |device: &DeviceFacts| DeviceIdentity { name: device.name.clone(), model: device.model.clone() };
    let mut facts = guest.facts.clone();
    facts.extend(device_facts(&streamed.map(identity).collect::<Vec<_>>()));
    GuestFacts { kind: guest.kind.clone(), name: guest.name.clone(), facts, layout: guest.layout.clone() }
}

/// The cipher of an agreement, with this CPU's faster provider.
#[must_use]
pub fn cipher(suite: CipherSuite) -> Cipher {
    match suite {
        CipherSuite::Plaintext => Cipher::Plain,
        CipherSuite::Aes256Gcm | CipherSuite::Other => Cipher::Aes256Gcm(fastest_provider().0),
    }
}

/// The operator's choices about devices that cannot migrate.
pub(super) fn failover(args: &SendArgs, cancel: &CancelFlag) -> FailoverOptions {
    let chosen = &args.failover;
    let mode = match chosen.failover {
        Failover::Auto => FailoverMode::Auto,
        Failover::Off => FailoverMode::Off,
    };
    let on_unplug_timeout = match chosen.on_unplug_timeout {
        UnplugTimeout::Abort => OnUnplugTimeout::Abort,
        UnplugTimeout::Wait => OnUnplugTimeout::Wait,
    };
    FailoverOptions {
        mode,
        unplug_timeout: chosen.unplug_timeout,
        on_unplug_timeout,
        standbys: chosen.standbys.clone(),
        cancel: cancel.clone(),
    }
}

/// The deadlines; preparing takes as long as the guest may take to give its devices up.
fn limits(args: &SendArgs, ram_bytes: u64) -> Limits {
    let limits = Limits::for_move(Some(args.timeout), ram_bytes, args.verify);
    let unplug = match args.failover.on_unplug_timeout {
        UnplugTimeout::Abort => args.failover.unplug_timeout * PRIMARIES_FORESEEN,
        UnplugTimeout::Wait => args.timeout,
    };
    Limits { prepare: limits.prepare + unplug, ..limits }
}

pub(super) fn plan(args: &SendArgs, offer: Offer, hands: &SourceHands, history: &HistoryFile) -> SourcePlan {
    let ram_bytes = hands.ram().layout().total_bytes().0;
    let on_no_converge = match args.on_no_converge {
        NoConverge::Abort => OnNoConverge::Abort,
        NoConverge::Throttle => OnNoConverge::Throttle,
        NoConverge::Force => OnNoConverge::Force,
    };
    let priors = if offer.guest.kind == "process" { Priors::PROCESS } else { Priors::QEMU };
    let priors = Priors { save_order: SaveOrder::BesidePages, ..priors };
    let predictor = Predictor::new(priors, history.past());
    let predictor = if args.verify { predictor.with_verify(ByteLen(ram_bytes)) } else { predictor };
    SourcePlan {
        offer,
        limits: limits(args, ram_bytes),
        converge: ConvergePlan { downtime_limit: args.downtime_limit, on_no_converge },
        predictor,
    }
}

pub(super) fn new_attempt() -> Result<AttemptId, Failure> {
    let mut bytes = [0u8; 16];
    let filled = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    match filled {
        Ok(16) => Ok(AttemptId::from_bytes(bytes)),
        Ok(_) | Err(_) => Err(Failure::Bug("the kernel gave no random bytes".into())),
    }
}
