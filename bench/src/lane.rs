//! One lane from memory to memory, as a move uses it.

use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use anyhow::Result;
use vmferry_datapath::{
    Cipher, Compression, GuestRam, LaneEnd, LaneKey, LaneKeys, Link, MemoryLink, PageSet, Receiver, SendPlan,
    Sender, TcpLink,
};

use crate::measure::now;

/// The core that sends, and the core that receives.
pub(crate) const CORES: (usize, usize) = (0, 1);
const GIGA: f64 = 1e9;

/// What a lane did.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LaneRun {
    /// Gigabytes a second from first to last byte.
    pub(crate) rate: f64,
    /// Gigabytes for each second that the sending lane was busy.
    pub(crate) busy_rate: f64,
}

/// Over TCP on loopback.
pub(crate) fn over_tcp(source: &Arc<GuestRam>, target: &Arc<GuestRam>, cipher: Cipher) -> Result<LaneRun> {
    let (near, far) = connected()?;
    run(source, target, cipher, Box::new(TcpLink::new(near)), Box::new(TcpLink::new(far)))
}

/// Over memory: all of a lane but the network.
pub(crate) fn over_memory(source: &Arc<GuestRam>, target: &Arc<GuestRam>, cipher: Cipher) -> Result<LaneRun> {
    let (near, far) = MemoryLink::pair();
    run(source, target, cipher, Box::new(near), Box::new(far))
}

/// Two ends of a loopback connection.
pub(crate) fn connected() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let near = TcpStream::connect(listener.local_addr()?)?;
    let (far, _) = listener.accept()?;
    for end in [&near, &far] {
        end.set_nodelay(true)?;
    }
    Ok((near, far))
}

fn run(
    source: &Arc<GuestRam>,
    target: &Arc<GuestRam>,
    cipher: Cipher,
    near: Box<dyn Link>,
    far: Box<dyn Link>,
) -> Result<LaneRun> {
    let sealed = cipher != Cipher::Plain;
    let key = |byte: u8| LaneKey::from_bytes([byte; 32]);
    // Fresh links and fresh random data would change nothing that is measured; a real move takes keys from TLS.
    let keys = |outbound: u8, inbound: u8| {
        sealed.then(|| LaneKeys { outbound: key(outbound), inbound: key(inbound) })
    };
    let far = LaneEnd { link: far, keys: keys(2, 1), cpu: Some(CORES.1) };
    let near = LaneEnd { link: near, keys: keys(1, 2), cpu: Some(CORES.0) };
    let plan = SendPlan { cipher, compression: Compression::Off, keep_hashes: false, rate_limit: None };
    let (mut receiver, _state) = Receiver::start(Arc::clone(target), vec![far], cipher)?;
    let mut sender = Sender::start(Arc::clone(source), vec![near], plan)?;
    let pages = PageSet::full(source.layout());
    let start = now();
    sender.send(&pages, &mut || true)?;
    sender.flush()?;
    let seconds = start.elapsed().as_secs_f64();
    let meter = sender.meter();
    sender.end_state()?;
    let totals = sender.finish()?;
    receiver.wait_complete(&totals, &mut || true)?;
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds and bytes of one run are far below 2^52")]
    let (bytes, busy_ns) = (meter.page_bytes as f64, meter.lanes[0].busy_ns as f64);
    Ok(LaneRun { rate: bytes / seconds / GIGA, busy_rate: bytes / busy_ns })
}
