//! Ctrl-C and SIGTERM as an event: a move is cancelled, never torn.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::{Handle, Signals};

/// Catches signals while it lives.
pub struct Interrupts {
    came: Arc<AtomicBool>,
    handle: Handle,
}

/// Calls `tell` for every SIGINT or SIGTERM until it returns false.
pub fn forward(mut tell: impl FnMut() -> bool + Send + 'static) -> io::Result<Interrupts> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let handle = signals.handle();
    let came = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&came);
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        for _ in signals.forever() {
            flag.store(true, Ordering::SeqCst);
            if !tell() {
                break;
            }
        }
    })?;
    Ok(Interrupts { came, handle })
}

impl Interrupts {
    /// Whether one came.
    #[must_use]
    pub fn came(&self) -> bool {
        self.came.load(Ordering::SeqCst)
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        self.handle.close();
    }
}
