//! A TCP link that a test can cut: every connection through it ends at once, or goes silent.

use std::io::{Read, Write};
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
            for here in listener.incoming().map_while(Result::ok) {
                if cut.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(there) = TcpStream::connect(target) else { continue };
                for (from, to) in [(&here, &there), (&there, &here)] {
                    let _ = from.set_nodelay(true);
                    let (Ok(from), Ok(to), silent) = (from.try_clone(), to.try_clone(), Arc::clone(&silent))
                    else {
                        continue;
                    };
                    std::thread::spawn(move || relay(from, to, &silent));
                }
                let mut held = streams.lock().unwrap_or_else(PoisonError::into_inner);
                held.extend([here, there]);
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

fn relay(mut from: TcpStream, mut to: TcpStream, silent: &AtomicBool) {
    let mut buffer = vec![0u8; 256 * 1024];
    loop {
        let Ok(taken @ 1..) = from.read(&mut buffer) else { break };
        if !silent.load(Ordering::SeqCst) && to.write_all(&buffer[..taken]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
