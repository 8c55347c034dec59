//! A TCP link that a test can cut: every connection through it ends at once, or goes silent.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Relays connections to one address until it is cut.
pub struct Proxy {
    address: SocketAddr,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    cut: Arc<AtomicBool>,
    silent: Arc<AtomicBool>,
}

impl Proxy {
    /// Relays to `tcp://HOST:PORT`.
    ///
    /// # Panics
    /// When no port is free.
    #[must_use]
    pub fn to(target: &str) -> Self {
        let target: SocketAddr = target
            .trim_start_matches("tcp://")
            .parse()
            .unwrap_or_else(|e| panic!("{target} is no address: {e}"));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|e| panic!("no port: {e}"));
        let address = listener.local_addr().unwrap_or_else(|e| panic!("no address: {e}"));
        let proxy = Self { address, streams: Arc::default(), cut: Arc::default(), silent: Arc::default() };
        let (streams, cut, silent) =
            (Arc::clone(&proxy.streams), Arc::clone(&proxy.cut), Arc::clone(&proxy.silent));
        std::thread::spawn(move || {
            for here in listener.incoming().map_while(Result::ok).filter(|_| !cut.load(Ordering::SeqCst)) {
                let joined = TcpStream::connect(target).and_then(|there| join(here, there, &silent));
                streams.lock().unwrap_or_else(PoisonError::into_inner).extend(joined.into_iter().flatten());
            }
        });
        proxy
    }

    /// Where to connect instead.
    #[must_use]
    pub fn address(&self) -> String {
        format!("tcp://{}", self.address)
    }

    /// Ends every connection and takes no new one.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::SeqCst);
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Takes new connections again.
    pub fn mend(&self) {
        self.cut.store(false, Ordering::SeqCst);
    }

    /// Swallows every byte from now on, and says nothing.
    pub fn fall_silent(&self) {
        self.silent.store(true, Ordering::SeqCst);
    }
}

/// Relays both ways; gives the two streams back, to be cut.
fn join(here: TcpStream, there: TcpStream, silent: &Arc<AtomicBool>) -> io::Result<[TcpStream; 2]> {
    for (from, to) in [(&here, &there), (&there, &here)] {
        from.set_nodelay(true)?;
        let (from, to, silent) = (from.try_clone()?, to.try_clone()?, Arc::clone(silent));
        std::thread::spawn(move || relay(from, to, &silent));
    }
    Ok([here, there])
}

fn relay(mut from: TcpStream, mut to: TcpStream, silent: &AtomicBool) {
    let mut buffer = vec![0u8; 256 * 1024];
    while let Ok(taken @ 1..) = from.read(&mut buffer) {
        if !silent.load(Ordering::SeqCst) && to.write_all(&buffer[..taken]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
