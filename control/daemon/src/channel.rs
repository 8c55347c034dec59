//! The control channel: TLS 1.3 with both sides authenticated, or plain where both sides asked for it.
//!
//! ```text
//!   session ── send(Message) ──► [ TLS ] ──► peer          a send writes at once, from the caller's thread:
//!   session ◄── event sink ◄── reader ◄── [ TLS ] ◄── peer    in the blackout a thread's hop would be counted
//! ```
//!
//! It carries decisions only. What must never happen here: a page, or device state.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, Connection, ServerConfig, ServerConnection};
use vmferry_datapath::{LaneKey, LaneKeys};
use vmferry_session::{AttemptId, Decoder, Message, encode};

use crate::endpoint::Endpoint;
use crate::failure::Failure;

/// A peer that is silent this long at the transport is lost: unanswered segments or keep-alive probes.
pub const SILENCE_MS_MAX: u32 = 5_000;
/// Time for a TCP connect and a TLS handshake together.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// What a plain control connection says first; a TLS one begins with a ClientHello (0x16).
pub const PLAIN_PREAMBLE: [u8; 8] = *b"VMFP\x01\0\0\0";

/// How the control channel is protected; lanes follow it.
#[derive(Clone)]
pub enum Security<Config> {
    /// TLS 1.3, both sides with X.509.
    Tls(Arc<Config>),
    /// `--insecure-plaintext` on both sides.
    InsecurePlaintext,
}

/// What the reader thread reports.
#[derive(Debug)]
pub enum ChannelEvent {
    /// A whole, well-formed message.
    Message(Message),
    /// The connection ended; the sentence says how.
    Lost(String),
    /// The peer sent what no honest peer sends.
    Misbehaved(String),
}

/// Which end of the control connection this process is; it decides which exported key is outbound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Dialled.
    Source,
    /// Listened.
    Target,
}

enum Wire {
    Tls(Box<Connection>),
    Plain,
}

/// One control connection. Cheap to clone; the last clone closes it.
#[derive(Clone)]
pub struct ControlChannel {
    stream: Arc<TcpStream>,
    wire: Arc<Mutex<Wire>>,
    end: End,
}

impl ControlChannel {
    /// Dials the target and finishes the handshake; the peer's certificate must carry `name` (the endpoint's host, or `--tls-hostname`).
    pub fn connect(
        endpoint: &Endpoint,
        name: &str,
        security: &Security<ClientConfig>,
    ) -> Result<Self, Failure> {
        let address = endpoint.resolve()?;
        let mut stream = dial(address, endpoint)?;
        let wire = match security {
            Security::InsecurePlaintext => {
                stream.write_all(&PLAIN_PREAMBLE).map_err(|e| lost_early(endpoint, &e))?;
                Wire::Plain
            }
            Security::Tls(config) => {
                let server_name = ServerName::try_from(name.to_owned()).map_err(|_| {
                    Failure::Refused(format!(
                        "{name:?} is not a name that a certificate can carry: give --tls-hostname"
                    ))
                })?;
                let connection = ClientConnection::new(Arc::clone(config), server_name)
                    .map_err(|e| Failure::Bug(format!("TLS client could not start: {e}")))?;
                let mut connection = Connection::Client(connection);
                handshake(&mut connection, &mut stream)
                    .map_err(|e| client_handshake_failed(endpoint, name, &e))?;
                Wire::Tls(Box::new(connection))
            }
        };
        Self::over(stream, wire, End::Source).map_err(|e| lost_early(endpoint, &e))
    }

    /// Finishes the handshake of an accepted connection that began with a ClientHello. The error is a sentence for the log.
    pub fn accept_tls(mut stream: TcpStream, config: &Arc<ServerConfig>) -> Result<Self, String> {
        let connection = ServerConnection::new(Arc::clone(config)).map_err(|e| e.to_string())?;
        let mut connection = Connection::Server(connection);
        bound_handshake(&stream).map_err(|e| e.to_string())?;
        handshake(&mut connection, &mut stream).map_err(|e| format!("the TLS handshake failed: {e}"))?;
        Self::over(stream, Wire::Tls(Box::new(connection)), End::Target).map_err(|e| e.to_string())
    }

    /// Takes an accepted connection that began with [`PLAIN_PREAMBLE`] (already read).
    pub fn accept_plain(stream: TcpStream) -> io::Result<Self> {
        Self::over(stream, Wire::Plain, End::Target)
    }

    fn over(stream: TcpStream, wire: Wire, end: End) -> io::Result<Self> {
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        notice_silence(&stream)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream: Arc::new(stream), wire: Arc::new(Mutex::new(wire)), end })
    }

    /// Sends one message, from the caller's thread.
    pub fn send(&self, message: &Message) -> Result<(), Failure> {
        let bytes =
            encode(message).map_err(|e| Failure::Bug(format!("a message could not be encoded: {e}")))?;
        let mut wire = self.lock();
        let written = match &mut *wire {
            Wire::Plain => write_all_nonblocking(&self.stream, &bytes),
            Wire::Tls(connection) => {
                connection.writer().write_all(&bytes).and_then(|()| self.flush_tls(connection))
            }
        };
        written
            .map_err(|e| Failure::Unavailable(format!("the control connection was lost while sending: {e}")))
    }

    /// Starts the thread that reads messages into `sink` until the connection ends or `sink` returns false.
    pub fn start_reader(
        &self,
        mut sink: impl FnMut(ChannelEvent) -> bool + Send + 'static,
    ) -> io::Result<()> {
        let channel = self.clone();
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || channel.read_until_end(&mut sink))?;
        Ok(())
    }

    /// Lane keys by the TLS exporter (RFC 8446 section 7.5): one per lane, direction and attempt. `None` on a plain channel.
    pub fn lane_keys(&self, attempt: &AttemptId, lane: u16) -> Result<Option<LaneKeys>, Failure> {
        let wire = self.lock();
        let Wire::Tls(connection) = &*wire else { return Ok(None) };
        let key = |sender: End| {
            let mut context = [0u8; 19];
            context[..16].copy_from_slice(attempt.as_bytes());
            context[16..18].copy_from_slice(&lane.to_le_bytes());
            context[18] = u8::from(sender == End::Target);
            connection
                .export_keying_material([0u8; 32], b"EXPORTER-vmferry-lane", Some(&context))
                .map(LaneKey::from_bytes)
                .map_err(|e| Failure::Bug(format!("the TLS exporter gave no lane key: {e}")))
        };
        let (source, target) = (key(End::Source)?, key(End::Target)?);
        Ok(Some(match self.end {
            End::Source => LaneKeys { outbound: source, inbound: target },
            End::Target => LaneKeys { outbound: target, inbound: source },
        }))
    }

    /// The peer's own certificate (DER), to tell whether a second connection is the same peer's. `None` on a plain channel.
    #[must_use]
    pub fn peer_identity(&self) -> Option<Vec<u8>> {
        match &*self.lock() {
            Wire::Tls(connection) => {
                connection.peer_certificates().and_then(|chain| chain.first()).map(|cert| cert.to_vec())
            }
            Wire::Plain => None,
        }
    }

    /// Ends the connection; the reader reports it as lost.
    pub fn close(&self) {
        if let Wire::Tls(connection) = &mut *self.lock() {
            connection.send_close_notify();
            let _ = self.flush_tls(connection);
        }
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    fn read_until_end(&self, sink: &mut dyn FnMut(ChannelEvent) -> bool) {
        let mut decoder = Decoder::default();
        let mut buffer = [0u8; 16 * 1024];
        loop {
            let taken = match self.read_some(&mut buffer) {
                Ok(0) => {
                    sink(ChannelEvent::Lost("the peer closed the control connection".into()));
                    return;
                }
                Ok(taken) => taken,
                Err(error) => {
                    sink(ChannelEvent::Lost(format!("the control connection was lost: {error}")));
                    return;
                }
            };
            decoder.push(&buffer[..taken]);
            if !drain(&mut decoder, sink) {
                return;
            }
        }
    }

    /// Waits for bytes without holding the lock, then takes them through TLS.
    fn read_some(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.read_now(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => wait(&self.stream, PollFlags::IN)?,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut wire = self.lock();
        match &mut *wire {
            Wire::Plain => (&*self.stream).read(buffer),
            Wire::Tls(connection) => match connection.reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if connection.read_tls(&mut &*self.stream)? == 0 {
                        return Ok(0);
                    }
                    connection
                        .process_new_packets()
                        .map_err(|e| io::Error::new(ErrorKind::InvalidData, e))?;
                    self.flush_tls(connection)?;
                    connection.reader().read(buffer)
                }
                // The peer ended without close_notify (a kill): the same as an end here, nothing is inferred from it.
                Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(0),
                result => result,
            },
        }
    }

    fn flush_tls(&self, connection: &mut Connection) -> io::Result<()> {
        while connection.wants_write() {
            match connection.write_tls(&mut &*self.stream) {
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => wait(&self.stream, PollFlags::OUT)?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Wire> {
        self.wire.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Every whole message to the sink; whether to read on.
fn drain(decoder: &mut Decoder, sink: &mut dyn FnMut(ChannelEvent) -> bool) -> bool {
    loop {
        match decoder.next_message() {
            Ok(Some(message)) => {
                if !sink(ChannelEvent::Message(message)) {
                    return false;
                }
            }
            Ok(None) => return true,
            Err(error) => {
                sink(ChannelEvent::Misbehaved(error.to_string()));
                return false;
            }
        }
    }
}

/// Connects with a bound on time and makes the socket notice a silent peer.
pub fn dial(address: SocketAddr, endpoint: &Endpoint) -> Result<TcpStream, Failure> {
    let stream = TcpStream::connect_timeout(&address, HANDSHAKE_TIMEOUT).map_err(|e| {
        Failure::Unavailable(format!(
            "cannot connect to {endpoint}: {e}; is 'vmferry receive --listen {endpoint}' running there?"
        ))
    })?;
    bound_handshake(&stream).and_then(|()| notice_silence(&stream)).map_err(|e| lost_early(endpoint, &e))?;
    Ok(stream)
}

/// Makes the kernel report a peer that vanished without a word, on data in flight and on an idle connection alike.
pub fn notice_silence(stream: &TcpStream) -> io::Result<()> {
    use rustix::net::sockopt;
    stream.set_nodelay(true)?;
    sockopt::set_tcp_user_timeout(stream, SILENCE_MS_MAX)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(1))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(1))?;
    sockopt::set_tcp_keepcnt(stream, SILENCE_MS_MAX / 1000)?;
    Ok(())
}

fn bound_handshake(stream: &TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(HANDSHAKE_TIMEOUT))?;
    stream.set_write_timeout(Some(HANDSHAKE_TIMEOUT))
}

fn handshake(connection: &mut Connection, stream: &mut TcpStream) -> io::Result<()> {
    while connection.is_handshaking() {
        connection.complete_io(stream)?;
    }
    while connection.wants_write() {
        connection.write_tls(stream)?;
    }
    Ok(())
}

fn wait(stream: &TcpStream, flags: PollFlags) -> io::Result<()> {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), flags)];
        match poll(&mut fds, None) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn write_all_nonblocking(mut stream: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match stream.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => wait(stream, PollFlags::OUT)?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn lost_early(endpoint: &Endpoint, error: &io::Error) -> Failure {
    Failure::Unavailable(format!("the connection to {endpoint} ended before the move began: {error}"))
}

fn client_handshake_failed(endpoint: &Endpoint, name: &str, error: &io::Error) -> Failure {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(why)) => Failure::Refused(format!(
            "the certificate of {endpoint} is not good for {name:?}: {why}; issue one there with 'vmferry keys init --host {name}' from the same CA, or give --tls-hostname"
        )),
        Some(rustls::Error::InvalidMessage(_)) => Failure::Refused(format!(
            "{endpoint} does not speak TLS: start it with --tls-dir, or give --insecure-plaintext on both sides"
        )),
        Some(rustls::Error::AlertReceived(alert)) => Failure::Refused(format!(
            "{endpoint} refused this host's certificate ({alert:?}): it must be issued by the CA in the target's --tls-dir"
        )),
        Some(other) => Failure::Refused(format!("the TLS handshake with {endpoint} failed: {other}")),
        None => Failure::Unavailable(format!(
            "{endpoint} ended the TLS handshake ({error}): is a vmferry with --tls-dir listening there?"
        )),
    }
}
