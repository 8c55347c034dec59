//! A packet ten times a second into a lab host's network: what revives a host that lost an interrupt.
//!
//! QEMU 10.0 emulates `VMRUN` with a read and a write of its word of pending interrupts, outside of the lock under which its
//! other threads set bits there. A timer that fires in between is lost, and with it the only thing that a host with one
//! CPU would have been woken by: its guest spins on, and the host never runs again. Seen once in four runs, and ended by
//! one packet: the next interrupt, whichever, finds the lost one still pending in the interrupt controller.

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use vmferry_rig::RigError;

use crate::host_error;

const EVERY: Duration = Duration::from_millis(100);
/// The shortest frame of Ethernet, its checksum left out.
const FRAME_BYTES: usize = 60;
/// To everybody, from nobody, of the type that IEEE 802 leaves to experiments: every kernel drops it.
const HEADER: [u8; 14] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0x78, 0, 0xff, 0x88, 0xb5];

/// Pulses until it is dropped.
pub(crate) struct Pulse {
    _stop: Sender<()>,
}

impl Pulse {
    /// Into the network whose socket is, or will be, at `path`.
    pub(crate) fn into(path: &Path) -> Result<Pulse, RigError> {
        let failed = |source| host_error("cannot open a socket", source);
        let socket = UnixDatagram::unbound().map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let (path, (stop, stopped)) = (path.to_owned(), channel::<()>());
        let mut frame = [0; FRAME_BYTES];
        frame[..HEADER.len()].copy_from_slice(&HEADER);
        std::thread::spawn(move || {
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                // A host that is not there yet, or no more, needs no pulse.
                let _ = socket.send_to(&frame, &path);
            }
        });
        Ok(Pulse { _stop: stop })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_come_until_it_is_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lan");
        let network = UnixDatagram::bind(&path).unwrap();
        let pulse = Pulse::into(&path).unwrap();
        let mut frame = [0; 128];
        assert_eq!(network.recv(&mut frame).unwrap(), FRAME_BYTES);
        assert_eq!(frame[12..14], [0x88, 0xb5]);
        drop(pulse);
        network.set_read_timeout(Some(EVERY * 5)).unwrap();
        // What was on its way may still come.
        let late = (0..10).take_while(|_| network.recv(&mut frame).is_ok()).count();
        assert!(late < 10, "it pulses on");
    }
}
