//! Opening the lanes of one attempt: how many, on which CPUs, with which keys.

use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use vmferry_datapath::{GuestRam, LaneEnd, Link, TcpLink};
use vmferry_session::{Agreement, AttemptId, LaneTransport};

use crate::channel::{ControlChannel, dial};
use crate::door::LaneHello;
use crate::endpoint::Endpoint;
use crate::fabric;
use crate::failure::Failure;
use crate::quantity::{CpuList, LaneCount};

/// `--lanes auto` never opens more.
const LANES_AUTO_MAX: usize = 8;
/// `--lanes auto` opens one for so many CPUs: the others are the guest's, and the network stack's. Measured on two CPUs
/// with both hosts on them: two lanes move a guest no faster than one and cost a tenth more CPU.
const CPUS_PER_LANE: usize = 2;
/// All lanes must have arrived this long after the target agreed to them.
pub const LANES_TIMEOUT: Duration = Duration::from_secs(10);

/// Which end of the CPU list lanes are taken from. On one host both sides run, so they start from opposite ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PinFrom {
    /// The source: the lowest CPU first.
    Low,
    /// The target: the highest CPU first.
    High,
}

/// CPUs that lanes of this process may be pinned to, in the order in which they are taken.
pub fn lane_cpus(asked: Option<&CpuList>, from: PinFrom) -> Result<Vec<usize>, Failure> {
    let allowed = allowed_cpus();
    let mut cpus = match asked {
        None => allowed,
        Some(list) => {
            if let Some(missing) = list.0.iter().find(|cpu| !allowed.contains(cpu)) {
                return Err(Failure::Refused(format!(
                    "--cpus names CPU {missing}, which this process may not use: choose among {allowed:?}"
                )));
            }
            list.0.clone()
        }
    };
    if from == PinFrom::High {
        cpus.reverse();
    }
    Ok(cpus)
}

fn allowed_cpus() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap_or_else(|_| CpuSet::new());
    (0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect()
}

/// How many lanes to offer.
#[must_use]
pub fn lane_count(asked: LaneCount, cpus: &[usize]) -> u16 {
    match asked {
        LaneCount::Exactly(lanes) => lanes,
        LaneCount::Auto => u16::try_from((cpus.len() / CPUS_PER_LANE).clamp(1, LANES_AUTO_MAX)).unwrap_or(1),
    }
}

/// A lane that arrived or was dialled, and is no link yet.
pub enum LaneWire {
    /// A TCP connection.
    Tcp(TcpStream),
    /// A connected queue pair.
    Rdma(fabric::Lane),
}

impl LaneWire {
    /// Whether this is what was agreed on.
    #[must_use]
    pub fn fits(&self, agreed: LaneTransport) -> bool {
        match self {
            LaneWire::Tcp(_) => agreed == LaneTransport::Tcp,
            LaneWire::Rdma(_) => matches!(agreed, LaneTransport::RdmaSealed | LaneTransport::RdmaDirect),
        }
    }

    fn into_link(self, direct: Option<&fabric::Direct>) -> Box<dyn Link> {
        match self {
            LaneWire::Tcp(stream) => Box::new(TcpLink::new(stream)),
            LaneWire::Rdma(lane) => lane.into_link(direct),
        }
    }
}

/// One lane's link, keys and CPU; in direct mode with the guest that it reaches.
pub fn lane_end(
    channel: &ControlChannel,
    attempt: &AttemptId,
    lane: u16,
    wire: LaneWire,
    direct: Option<&fabric::Direct>,
    cpus: &[usize],
) -> Result<LaneEnd, Failure> {
    let cpu = (!cpus.is_empty()).then(|| cpus[usize::from(lane) % cpus.len()]);
    Ok(LaneEnd { link: wire.into_link(direct), keys: channel.lane_keys(attempt, lane)?, cpu })
}

/// Dials every lane of the agreement and says hello on each.
pub fn open(
    channel: &ControlChannel,
    endpoint: &Endpoint,
    agreement: &Agreement,
    ram: &Arc<GuestRam>,
    cpus: &[usize],
) -> Result<Vec<LaneEnd>, Failure> {
    let direct = agreement.transport.is_direct().then(|| fabric::Direct::source(Arc::clone(ram)));
    let (address, attempt) = (endpoint.resolve()?, agreement.attempt);
    (0..agreement.lanes)
        .map(|lane| {
            let hello = LaneHello { attempt, lane };
            let wire = match agreement.transport {
                LaneTransport::RdmaSealed | LaneTransport::RdmaDirect => {
                    fabric::Lane::dial(address, &hello.to_bytes()).map(LaneWire::Rdma)?
                }
                LaneTransport::Tcp | LaneTransport::Other => {
                    LaneWire::Tcp(dial_tcp(address, endpoint, &hello)?)
                }
            };
            lane_end(channel, &attempt, lane, wire, direct.as_ref(), cpus)
        })
        .collect()
}

fn dial_tcp(address: SocketAddr, endpoint: &Endpoint, hello: &LaneHello) -> Result<TcpStream, Failure> {
    let mut stream = dial(address, endpoint)?;
    std::io::Write::write_all(&mut stream, &hello.to_bytes())
        .and_then(|()| stream.set_read_timeout(None))
        .and_then(|()| stream.set_write_timeout(None))
        .map_err(|e| {
            Failure::Unavailable(format!("lane {} to {endpoint} was lost at once: {e}", hello.lane))
        })?;
    Ok(stream)
}
