//! Carrying memory over one lane, with both ends in this process or one end only, for whoever counts from outside.

use std::io::{Read, Write, stdin};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use nix::unistd::getpgrp;
use serde::{Deserialize, Serialize};
use vmferry_datapath::link::rdma::RdmaCounts;
use vmferry_datapath::{
    Access, Cipher, Compression, GuestRam, LaneEnd, LaneKey, LaneKeys, Link, OpenRam, PAGE_BYTES, PageSet,
    Pin, RdmaConnection, RdmaLink, RdmaListener, Receiver, SendPlan, Sender, TcpLink, fastest_provider,
};

use crate::memory::Memory;

/// The other end may start slowly: under valgrind, on an emulated host.
const WITHIN: Duration = Duration::from_secs(60);
/// A port of the connection manager that nobody else uses here.
const RDMA_PORT: u16 = 20_000;

/// How memory is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Way {
    /// io_uring over TCP, sealed.
    Tcp,
    /// RDMA, every record through the ring, sealed.
    Sealed,
    /// RDMA, pages straight into the target, records sealed.
    Direct,
}

impl Way {
    /// As it is said on the command line.
    pub(crate) fn word(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }
}

/// One end of the lane, in a process of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum End {
    /// It sends.
    Source,
    /// It takes in.
    Target,
}

/// What the carrier counted by itself: both ends.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Own {
    pub(crate) requests: u64,
    pub(crate) placed: u64,
    pub(crate) sleeps: u64,
}

/// A link, and what counts on it where it is one over RDMA.
type Counted = (Box<dyn Link>, Option<RdmaCounts>);

/// Where the target's end waits.
enum Waiting {
    Tcp(TcpListener),
    Rdma(RdmaListener),
}

impl Waiting {
    fn at(way: Way, address: IpAddr) -> Result<(Waiting, SocketAddr)> {
        if way == Way::Tcp {
            let listener = TcpListener::bind(SocketAddr::new(address, 0))?;
            let at = listener.local_addr()?;
            return Ok((Waiting::Tcp(listener), at));
        }
        let at = SocketAddr::new(address, RDMA_PORT);
        Ok((Waiting::Rdma(RdmaListener::bind(at)?), at))
    }

    fn accept(&self, way: Way, ram: &Arc<GuestRam>) -> Result<Counted> {
        let listener = match self {
            Waiting::Tcp(listener) => return Ok((Box::new(TcpLink::new(listener.accept()?.0)), None)),
            Waiting::Rdma(listener) => listener,
        };
        let connection = listener.next(WITHIN).context("nobody connected to this bench's own listener")?;
        let connection = connection.accept()?;
        let link = match way {
            Way::Direct => RdmaLink::open(connection, OpenRam::new(Arc::clone(ram), Pin::AsNeeded, 1)),
            Way::Tcp | Way::Sealed => RdmaLink::new(connection),
        };
        let counts = link.counts();
        Ok((Box::new(link), Some(counts)))
    }
}

fn dial(way: Way, at: SocketAddr, ram: &Arc<GuestRam>) -> Result<Counted> {
    let link = match way {
        Way::Tcp => return Ok((Box::new(TcpLink::new(TcpStream::connect(at)?)), None)),
        Way::Sealed => RdmaLink::new(RdmaConnection::connect(at, b"bench", WITHIN)?),
        Way::Direct => RdmaLink::placing(RdmaConnection::connect(at, b"bench", WITHIN)?, Arc::clone(ram)),
    };
    let counts = link.counts();
    Ok((Box::new(link), Some(counts)))
}

fn keys(outbound: u8, inbound: u8) -> Option<LaneKeys> {
    let key = |byte| LaneKey::from_bytes([byte; 32]);
    Some(LaneKeys { outbound: key(outbound), inbound: key(inbound) })
}

fn cipher() -> Cipher {
    Cipher::Aes256Gcm(fastest_provider().0)
}

fn receiver(ram: Arc<GuestRam>, link: Box<dyn Link>) -> Result<Receiver> {
    let end = LaneEnd { link, keys: keys(2, 1), cpu: None };
    Ok(Receiver::start(ram, vec![end], cipher())?.0)
}

fn sender(ram: Arc<GuestRam>, link: Box<dyn Link>) -> Result<Sender> {
    let plan =
        SendPlan { cipher: cipher(), compression: Compression::Off, keep_hashes: false, rate_limit: None };
    Ok(Sender::start(ram, vec![LaneEnd { link, keys: keys(1, 2), cpu: None }], plan)?)
}

/// Carries the memory once, between two marks.
pub(crate) fn both_ends(way: Way, address: IpAddr, memory: usize) -> Result<Own> {
    let (source, target) = (Memory::filled(memory)?, Memory::empty(memory)?);
    let (source, target) = (source.guest_ram(Access::ReadOnly)?, target.guest_ram(Access::ReadWrite)?);
    let (waiting, at) = Waiting::at(way, address)?;
    let ram = Arc::clone(&source);
    let dialling = std::thread::spawn(move || dial(way, at, &ram));
    let (far, far_counts) = waiting.accept(way, &target)?;
    let (near, near_counts) =
        dialling.join().map_err(|_| anyhow::anyhow!("the dialling thread panicked"))??;
    let counts: Vec<RdmaCounts> = [near_counts, far_counts].into_iter().flatten().collect();
    let receiver = receiver(target, far)?;
    let mut sender = sender(Arc::clone(&source), near)?;
    let before = read(&counts);
    getpgrp();
    sender.send(&PageSet::full(source.layout()), &mut || true)?;
    sender.flush()?;
    getpgrp();
    let after = read(&counts);
    drop((sender, receiver));
    Ok(Own {
        requests: after.requests - before.requests,
        placed: after.placed - before.placed,
        sleeps: after.sleeps - before.sleeps,
    })
}

/// Carries the memory once, with the other end in another process. The target says where it waits, and takes in until its
/// standard input ends; the source is told there where that is.
pub(crate) fn one_end(end: End, way: Way, address: IpAddr, memory: usize) -> Result<()> {
    match end {
        End::Source => {
            let ram = Memory::filled(memory)?.guest_ram(Access::ReadOnly)?;
            let mut at = String::new();
            stdin().read_line(&mut at)?;
            let at = at.trim().parse().context("nobody said where the target waits")?;
            let mut sender = sender(Arc::clone(&ram), dial(way, at, &ram)?.0)?;
            sender.send(&PageSet::full(ram.layout()), &mut || true)?;
            sender.finish()?;
        }
        End::Target => {
            let ram = Memory::empty(memory)?.guest_ram(Access::ReadWrite)?;
            let (waiting, at) = Waiting::at(way, address)?;
            println!("{at}");
            std::io::stdout().flush()?;
            let receiver = receiver(Arc::clone(&ram), waiting.accept(way, &ram)?.0)?;
            stdin().read_to_end(&mut Vec::new())?;
            let arrived = receiver.meter().data_pages * PAGE_BYTES as u64;
            anyhow::ensure!(arrived == memory as u64, "only {arrived} bytes arrived");
        }
    }
    Ok(())
}

fn read(counts: &[RdmaCounts]) -> Own {
    counts.iter().map(RdmaCounts::read).fold(Own::default(), |sum, count| Own {
        requests: sum.requests + count.requests,
        placed: sum.placed + count.placed,
        sleeps: sum.sleeps + count.sleeps,
    })
}
