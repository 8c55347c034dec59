//! Where the console's and the beat's bytes go and come from. No write blocks: its virtual CPU could not be paused.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use vmferry_kvm::{Console, Sink};

use super::args::Route;
use crate::GuestError;

/// Output that waits for a slow terminal; more is lost.
const OUTPUT_BYTES_MAX: usize = 64 << 10;
/// How long input waits for a guest that does not take it.
const INPUT_WAIT: Duration = Duration::from_millis(1);

/// One line of a machine, which outlives the machines that use it: a blank one is made anew after a failed move.
pub(super) enum Wire {
    Nothing,
    Stdio(SyncSender<u8>),
    Socket(Arc<UnixStream>),
}

impl Wire {
    pub(super) fn open(route: &Route, what: &str) -> Result<Wire, GuestError> {
        match route {
            Route::Nothing => Ok(Wire::Nothing),
            Route::Stdio => Ok(Wire::Stdio(print_apart())),
            Route::Unix(path) => {
                let what = format!("the {what} cannot reach {}: nobody listens there", path.display());
                Ok(Wire::Socket(Arc::new(UnixStream::connect(path).map_err(GuestError::refused(what))?)))
            }
        }
    }

    pub(super) fn sink(&self) -> Sink {
        match self {
            Wire::Nothing => Box::new(io::sink()),
            Wire::Stdio(sender) => Box::new(Printed(sender.clone())),
            Wire::Socket(stream) => Box::new(Sent(Arc::clone(stream))),
        }
    }

    /// Types what comes in into the console that is current, for ever.
    pub(super) fn feed(&self, current: Current) {
        let mut from: Box<dyn Read + Send> = match self {
            Wire::Nothing => return,
            Wire::Stdio(_) => Box::new(io::stdin()),
            Wire::Socket(stream) => Box::new(Received(Arc::clone(stream))),
        };
        std::thread::spawn(move || {
            let mut bytes = [0; 64];
            while let Ok(count @ 1..) = from.read(&mut bytes) {
                current.type_in(&bytes[..count]);
            }
        });
    }
}

/// The console of the machine that is there now.
#[derive(Clone, Default)]
pub(super) struct Current(Arc<Mutex<Option<Console>>>);

impl Current {
    pub(super) fn set(&self, console: &Console) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(console.clone());
    }

    fn type_in(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let console = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let taken = console.map_or(0, |console| console.offer(bytes));
            bytes = &bytes[taken..];
            if taken == 0 {
                std::thread::sleep(INPUT_WAIT);
            }
        }
    }
}

/// A thread that prints, so that a terminal that stands still stops nothing.
fn print_apart() -> SyncSender<u8> {
    let (sender, receiver) = sync_channel(OUTPUT_BYTES_MAX);
    std::thread::spawn(move || {
        let mut out = io::stdout();
        while let Ok(first) = receiver.recv() {
            let bytes: Vec<u8> = std::iter::once(first).chain(receiver.try_iter()).collect();
            let _ = out.write_all(&bytes).and_then(|()| out.flush());
        }
    });
    sender
}

struct Printed(SyncSender<u8>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            match self.0.try_send(*byte) {
                Ok(()) | Err(TrySendError::Full(_)) => {}
                Err(TrySendError::Disconnected(_)) => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Sent(Arc<UnixStream>);

impl Write for Sent {
    /// What does not fit is lost, as on a real serial line without flow control.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match send(&*self.0, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::AGAIN) => Ok(bytes.len()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Received(Arc<UnixStream>);

impl Read for Received {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(into)
    }
}
