//! The network of test guests: one host on the wire, which answers, counts and forgets nothing.
//!
//! ```text
//!   QEMU's NIC ── -netdev dgram (UNIX) ──► port ──► numbered frame: counted once, its answer goes back to the same port
//!   a card of this host ── packet socket ──► port ──►  … the same
//! ```
//!
//! Every NIC has a port of its own, and all ports are the same host: like a switch that has learned where the guest
//! is, an answer takes the port that the question came by. So the ports tell which device the guest sends over, and
//! the numbers tell what was lost on the way.

mod end;

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::RigError;
use crate::heartbeat::now;
use end::End;

/// The address that a guest takes.
pub const GUEST_ADDRESS: [u8; 4] = [10, 9, 0, 2];
/// The address of the host on the wire.
pub const WIRE_ADDRESS: [u8; 4] = [10, 9, 0, 1];
/// Where the numbered datagrams go.
pub const WIRE_PORT: u16 = 7007;
/// The same as it stands in a datagram.
const WIRE_PORT_BYTES: [u8; 2] = [27, 95];
const _: () = assert!(WIRE_PORT == WIRE_PORT_BYTES[0] as u16 * 256 + WIRE_PORT_BYTES[1] as u16);
/// The MAC of the host on the wire; a card that is a port must have it.
pub const WIRE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Longer than any frame.
const FRAME_BYTES_MAX: usize = 70_000;

/// What came over the wire.
#[derive(Debug, Default)]
struct Traffic {
    numbers: HashSet<u64>,
    by_port: Vec<(String, u64)>,
    undeliverable: u64,
    last: Option<Instant>,
    longest_silence: Duration,
}

/// The host on the wire. Its ports end with it.
#[derive(Debug)]
pub struct Wire {
    folder: PathBuf,
    traffic: Arc<Mutex<Traffic>>,
}

impl Wire {
    /// A wire whose sockets lie in `folder`.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_path_buf(), traffic: Arc::default() }
    }

    /// Opens a port; the words make QEMU connect a `-netdev` of the same name to it. One that was there is replaced.
    pub fn port(&self, name: &str) -> Result<[String; 2], RigError> {
        let path = |end: &str| self.folder.join(format!("{name}.{end}"));
        let (ours, theirs) = (path("wire"), path("nic"));
        for file in [&ours, &theirs] {
            let _ = std::fs::remove_file(file);
        }
        self.listen_at(End::datagrams(&ours, &theirs)?, name);
        let (local, remote) = (theirs.display(), ours.display());
        let ends = format!("local.type=unix,local.path={local},remote.type=unix,remote.path={remote}");
        Ok(["-netdev".to_owned(), format!("dgram,id={name},{ends}")])
    }

    /// Opens a port at a card of this host: whoever sends through the card (a function of it, say) is on the wire. The
    /// card must be up and have the address [`WIRE_MAC`].
    pub fn card_port(&self, name: &str, card: &str) -> Result<(), RigError> {
        self.listen_at(End::card(card)?, name);
        Ok(())
    }

    fn listen_at(&self, end: End, name: &str) {
        let (weak, port) = (Arc::downgrade(&self.traffic), name.to_owned());
        std::thread::spawn(move || listen(&end, &port, &weak));
    }

    /// Numbers that arrived, each once.
    #[must_use]
    pub fn arrived(&self) -> u64 {
        self.lock().numbers.len() as u64
    }

    /// Numbered frames that came in by a port.
    #[must_use]
    pub fn arrived_by(&self, port: &str) -> u64 {
        self.lock().by_port.iter().find(|(name, _)| name == port).map_or(0, |(_, count)| *count)
    }

    /// Answers that no NIC took.
    #[must_use]
    pub fn undeliverable(&self) -> u64 {
        self.lock().undeliverable
    }

    /// The longest time between two numbered frames since the last call.
    #[must_use]
    pub fn take_longest_silence(&self) -> Duration {
        std::mem::take(&mut self.lock().longest_silence)
    }

    /// Waits until numbered frames come in by a port.
    pub fn wait_traffic(&self, port: &str, timeout: Duration) -> Result<(), RigError> {
        let (start, before) = (now(), self.arrived_by(port));
        while self.arrived_by(port) == before {
            if now().duration_since(start) > timeout {
                let what = format!("the guest's traffic by `{port}`");
                return Err(RigError::Timeout { what, after_ms: timeout.as_millis() });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Traffic> {
        self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn listen(end: &End, port: &str, wire: &Weak<Mutex<Traffic>>) {
    let mut frame = vec![0; FRAME_BYTES_MAX];
    loop {
        let read = end.receive(&mut frame);
        let Some(traffic) = wire.upgrade() else { return };
        match read {
            Ok(len) => serve(end, &mut frame[..len], port, &traffic),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}

fn serve(end: &End, frame: &mut [u8], port: &str, traffic: &Mutex<Traffic>) {
    let answered = if answer_arp(frame) {
        true
    } else if let Some(number) = answer_datagram(frame) {
        traffic.lock().unwrap_or_else(PoisonError::into_inner).count(number, port);
        true
    } else {
        false
    };
    // A guest that stands still reads nothing: what would wait for it is lost, as on a real wire.
    if answered && end.answer(frame).is_err() {
        traffic.lock().unwrap_or_else(PoisonError::into_inner).undeliverable += 1;
    }
}

impl Traffic {
    fn count(&mut self, number: u64, port: &str) {
        let now = now();
        if let Some(last) = self.last.replace(now) {
            self.longest_silence = self.longest_silence.max(now.duration_since(last));
        }
        self.numbers.insert(number);
        match self.by_port.iter_mut().find(|(name, _)| name == port) {
            Some((_, count)) => *count += 1,
            None => self.by_port.push((port.to_owned(), 1)),
        }
    }
}

/// Turns a question for our MAC into its answer.
fn answer_arp(frame: &mut [u8]) -> bool {
    let asks = frame.len() >= 42
        && frame[12..14] == [8, 6]
        && frame[20..22] == [0, 1]
        && frame[38..42] == WIRE_ADDRESS;
    if asks {
        let (mac, address) = (frame[22..28].to_vec(), frame[28..32].to_vec());
        frame[0..6].copy_from_slice(&mac);
        frame[6..12].copy_from_slice(&WIRE_MAC);
        frame[21] = 2;
        frame[22..28].copy_from_slice(&WIRE_MAC);
        frame[28..32].copy_from_slice(&WIRE_ADDRESS);
        frame[32..38].copy_from_slice(&mac);
        frame[38..42].copy_from_slice(&address);
    }
    asks
}

/// Turns a numbered datagram round; its number. Swapping the ends leaves all checksums right.
fn answer_datagram(frame: &mut [u8]) -> Option<u64> {
    let ours = frame.len() >= 50
        && frame[12..15] == [8, 0, 0x45]
        && frame[23] == 17
        && frame[30..34] == WIRE_ADDRESS
        && frame[36..38] == WIRE_PORT_BYTES;
    if !ours {
        return None;
    }
    let number = u64::from_le_bytes(frame[42..50].try_into().ok()?);
    let mac = frame[6..12].to_vec();
    frame[0..6].copy_from_slice(&mac);
    frame[6..12].copy_from_slice(&WIRE_MAC);
    frame[26..34].rotate_left(4);
    frame[34..38].rotate_left(2);
    Some(number)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;

    #[test]
    fn a_numbered_datagram_goes_back_where_it_came_from() {
        let folder = tempfile::tempdir().unwrap();
        let wire = Wire::new(folder.path());
        wire.port("p").unwrap();
        let nic = UnixDatagram::bind(folder.path().join("p.nic")).unwrap();
        let mut frame = vec![0; 60];
        frame[6..12].copy_from_slice(&[0x52, 0x54, 0, 0, 0, 7]);
        frame[12..15].copy_from_slice(&[8, 0, 0x45]);
        frame[23] = 17;
        frame[26..30].copy_from_slice(&GUEST_ADDRESS);
        frame[30..34].copy_from_slice(&WIRE_ADDRESS);
        frame[34..36].copy_from_slice(&[1, 2]);
        frame[36..38].copy_from_slice(&WIRE_PORT_BYTES);
        frame[42..50].copy_from_slice(&77_u64.to_le_bytes());
        nic.send_to(&frame, folder.path().join("p.wire")).unwrap();
        let mut answer = [0; 100];
        assert_eq!(nic.recv(&mut answer).unwrap(), 60);
        assert_eq!(answer[..6], frame[6..12]);
        assert_eq!((&answer[26..30], &answer[30..34]), (&WIRE_ADDRESS[..], &GUEST_ADDRESS[..]));
        assert_eq!((&answer[36..38], &answer[42..50]), (&[1, 2][..], &frame[42..50]));
        assert_eq!((wire.arrived(), wire.arrived_by("p"), wire.arrived_by("q")), (1, 1, 0));
    }
}
