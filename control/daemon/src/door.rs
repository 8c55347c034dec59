//! The listening door of `receive`: sorts what arrives into control connections and lanes.
//!
//! Anybody can knock. A connection proves itself in a bounded time and in a bounded number of threads, or it is
//! counted and dropped; nothing that arrives here can end the wait for an honest source.

use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use rustls::ServerConfig;
use vmferry_session::AttemptId;

use crate::channel::{ControlChannel, HANDSHAKE_TIMEOUT, PLAIN_PREAMBLE, Security, notice_silence};
use crate::endpoint::{Endpoint, Transport};
use crate::fabric;
use crate::failure::Failure;
use crate::lanes::LaneWire;

/// Connections that may prove themselves at the same time; further ones are dropped and counted.
const KNOCKS_MAX: usize = 64;
/// Arrivals waiting to be taken: a control connection and every lane of one attempt.
const ARRIVALS_MAX: usize = 128;
/// Sleep while this process has no descriptor left for a new connection.
const CROWDED_SLEEP: Duration = Duration::from_millis(50);
const TLS_CLIENT_HELLO: u8 = 0x16;
const LANE_MAGIC: [u8; 4] = *b"VMFL";
/// Length of [`LaneHello`] on the wire.
const LANE_HELLO_BYTES: usize = 24;

/// What a lane connection says first, in clear: which attempt and lane it belongs to. It proves nothing; the
/// first record under the lane's key does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneHello {
    /// The attempt that the control channel agreed on.
    pub attempt: AttemptId,
    /// Lane number, from 0.
    pub lane: u16,
}

impl LaneHello {
    /// magic(4) ‖ lane u16 LE ‖ zero(2) ‖ attempt(16).
    #[must_use]
    pub fn to_bytes(&self) -> [u8; LANE_HELLO_BYTES] {
        let mut bytes = [0u8; LANE_HELLO_BYTES];
        bytes[..4].copy_from_slice(&LANE_MAGIC);
        bytes[4..6].copy_from_slice(&self.lane.to_le_bytes());
        bytes[8..].copy_from_slice(self.attempt.as_bytes());
        bytes
    }

    /// Reads what [`LaneHello::to_bytes`] wrote; anything else is `None`.
    #[must_use]
    pub fn parse(bytes: &[u8; LANE_HELLO_BYTES]) -> Option<Self> {
        let attempt: [u8; 16] = bytes[8..].try_into().ok()?;
        let lane = u16::from_le_bytes([bytes[4], bytes[5]]);
        (bytes[..4] == LANE_MAGIC && bytes[6..8] == [0, 0])
            .then(|| Self { attempt: AttemptId::from_bytes(attempt), lane })
    }
}

/// One connection that said what it is.
pub enum Arrival {
    /// An authenticated (or agreed plain) control connection.
    Control(ControlChannel),
    /// A lane; its keys are proven by its first record.
    Lane(LaneHello, LaneWire),
}

/// The listener and its sorting threads. Dropping it closes the port.
pub struct Door {
    arrivals: Receiver<Arrival>,
    turned_away: Arc<AtomicU64>,
    address: SocketAddr,
    transport: Transport,
    listener: TcpListener,
    closed: Arc<AtomicBool>,
}

impl Door {
    /// Listens on `endpoint`.
    pub fn open(endpoint: &Endpoint, security: Security<ServerConfig>) -> Result<Self, Failure> {
        let cannot = |e: io::Error| {
            if e.kind() == io::ErrorKind::PermissionDenied {
                return Failure::Permission(format!(
                    "cannot listen on {endpoint}: {e}; choose a port above 1023"
                ));
            }
            Failure::Refused(format!(
                "cannot listen on {endpoint}: {e}; choose another port, or an address of this host"
            ))
        };
        let listener = TcpListener::bind(endpoint.resolve()?).map_err(cannot)?;
        let address = listener.local_addr().map_err(cannot)?;
        let turned_away = Arc::new(AtomicU64::new(0));
        let (sender, arrivals) = bounded(ARRIVALS_MAX);
        let sorter =
            Sorter { security, sender, turned_away: Arc::clone(&turned_away), knocking: Arc::default() };
        let accepting = listener.try_clone().map_err(cannot)?;
        let closed = Arc::<AtomicBool>::default();
        if endpoint.transport == Transport::Rdma {
            let (lanes, sorter, closed) =
                (fabric::Listener::bind(address)?, sorter.clone(), Arc::clone(&closed));
            std::thread::Builder::new()
                .name("rdma door".into())
                .spawn(move || sorter.take_lanes(&lanes, &closed))
                .map_err(cannot)?;
        }
        std::thread::Builder::new()
            .name("door".into())
            .spawn(move || sorter.accept_all(&accepting))
            .map_err(cannot)?;
        Ok(Self { arrivals, turned_away, address, transport: endpoint.transport, listener, closed })
    }

    /// Where it listens, with the port that was chosen when 0 was asked for.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        let (host, port) = (self.address.ip().to_string(), self.address.port());
        Endpoint { transport: self.transport, host, port }
    }

    /// What arrives.
    #[must_use]
    pub fn arrivals(&self) -> &Receiver<Arrival> {
        &self.arrivals
    }

    /// Connections that did not prove themselves.
    #[must_use]
    pub fn turned_away(&self) -> u64 {
        self.turned_away.load(Ordering::Relaxed)
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
        // Wakes the accepting thread: accept on a shut-down listener returns an error.
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

#[derive(Clone)]
struct Sorter {
    security: Security<ServerConfig>,
    sender: Sender<Arrival>,
    turned_away: Arc<AtomicU64>,
    knocking: Arc<AtomicUsize>,
}

impl Sorter {
    fn accept_all(&self, listener: &TcpListener) {
        loop {
            match listener.accept() {
                Ok((stream, from)) => self.answer_knock(stream, from),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) if error.raw_os_error() == Some(libc::EMFILE) => std::thread::sleep(CROWDED_SLEEP),
                Err(_) => return,
            }
        }
    }

    /// Takes lanes over RDMA until the door is closed. A lane is let in at once and proves itself by its first record,
    /// so none holds up the next.
    fn take_lanes(&self, listener: &fabric::Listener, closed: &AtomicBool) {
        let parse = |said: &[u8]| LaneHello::parse(said.first_chunk()?);
        let turned_away = |why: &str| {
            self.turned_away.fetch_add(1, Ordering::Relaxed);
            tracing::warn!("turned away: {why}");
        };
        while !closed.load(Ordering::Acquire) {
            if let Some((hello, lane)) = listener.next(parse, turned_away) {
                let _ =
                    self.sender.send_timeout(Arrival::Lane(hello, LaneWire::Rdma(lane)), HANDSHAKE_TIMEOUT);
            }
        }
    }

    fn answer_knock(&self, stream: TcpStream, from: SocketAddr) {
        if self.knocking.fetch_add(1, Ordering::Relaxed) >= KNOCKS_MAX {
            self.knocking.fetch_sub(1, Ordering::Relaxed);
            self.turn_away(from, "too many connections at once");
            return;
        }
        let sorter = self.clone();
        let spawned = std::thread::Builder::new().name("knock".into()).spawn(move || {
            match sorter.sort(stream) {
                Ok(arrival) => {
                    let _ = sorter.sender.send_timeout(arrival, HANDSHAKE_TIMEOUT);
                }
                Err(why) => sorter.turn_away(from, &why),
            }
            sorter.knocking.fetch_sub(1, Ordering::Relaxed);
        });
        if spawned.is_err() {
            self.knocking.fetch_sub(1, Ordering::Relaxed);
            self.turn_away(from, "no thread could be started");
        }
    }

    fn turn_away(&self, from: SocketAddr, why: &str) {
        self.turned_away.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(%from, "turned away: {why}");
    }

    fn sort(&self, mut stream: TcpStream) -> Result<Arrival, String> {
        let text = |e: io::Error| e.to_string();
        stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT)).map_err(text)?;
        let mut first = [0u8; 1];
        if stream.peek(&mut first).map_err(text)? == 0 {
            return Err("closed without a word".into());
        }
        match (first[0], &self.security) {
            (TLS_CLIENT_HELLO, Security::Tls(config)) => {
                ControlChannel::accept_tls(stream, config).map(Arrival::Control)
            }
            (TLS_CLIENT_HELLO, Security::InsecurePlaintext) => {
                // Bytes that are no TLS record: the source then says «does not speak TLS» instead of «closed».
                let _ = io::Write::write_all(&mut stream, &PLAIN_PREAMBLE);
                let _ = stream.shutdown(Shutdown::Write);
                Err("speaks TLS, and this side was started with --insecure-plaintext: drop it here or add it there".into())
            }
            _ => self.sort_plain(stream),
        }
    }

    fn sort_plain(&self, mut stream: TcpStream) -> Result<Arrival, String> {
        let text = |e: io::Error| e.to_string();
        let mut head = [0u8; PLAIN_PREAMBLE.len()];
        stream.read_exact(&mut head).map_err(text)?;
        if head == PLAIN_PREAMBLE {
            let channel = ControlChannel::accept_plain(stream).map_err(text)?;
            return match &self.security {
                Security::InsecurePlaintext => Ok(Arrival::Control(channel)),
                Security::Tls(_) => {
                    let reason = vmferry_session::AbortReason::plaintext_refused();
                    let _ = channel.send(&vmferry_session::Message::Refuse(reason));
                    channel.close();
                    Err("speaks plaintext, and this side wants TLS".into())
                }
            };
        }
        let mut hello = [0u8; LANE_HELLO_BYTES];
        hello[..head.len()].copy_from_slice(&head);
        stream.read_exact(&mut hello[head.len()..]).map_err(text)?;
        let hello = LaneHello::parse(&hello).ok_or("speaks neither TLS nor vmferry")?;
        stream.set_read_timeout(None).and_then(|()| notice_silence(&stream)).map_err(text)?;
        Ok(Arrival::Lane(hello, LaneWire::Tcp(stream)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lane_hello_survives_the_wire_and_garbage_does_not() {
        let hello = LaneHello { attempt: AttemptId::from_bytes([7; 16]), lane: 3 };
        let bytes = hello.to_bytes();
        assert_eq!(LaneHello::parse(&bytes), Some(hello));
        for at in [0, 3, 6, 7] {
            let mut damaged = bytes;
            damaged[at] ^= 1;
            assert_eq!(LaneHello::parse(&damaged), None, "byte {at}");
        }
    }
}
