//! A TCP link that a test can cut or slow down: every connection through it ends at once, goes silent, or takes its time.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Relays connections to one address until it is cut.
pub struct Proxy {
    address: SocketAddr,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    cut: Arc<AtomicBool>,
    pace: Arc<Pace>,
}

/// How bytes pass.
#[derive(Default)]
struct Pace {
    silent: AtomicBool,
    /// The most, each way and connection; 0 is as fast as may be.
    bytes_per_second: AtomicU32,
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
        let proxy = Self { address, streams: Arc::default(), cut: Arc::default(), pace: Arc::default() };
        let (streams, cut, pace) =
            (Arc::clone(&proxy.streams), Arc::clone(&proxy.cut), Arc::clone(&proxy.pace));
        std::thread::spawn(move || {
            for here in listener.incoming().map_while(Result::ok).filter(|_| !cut.load(Ordering::SeqCst)) {
                let joined = TcpStream::connect(target).and_then(|there| join(here, there, &pace));
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
        self.pace.silent.store(true, Ordering::SeqCst);
    }

    /// Lets no more than so many bytes pass from now on, each way and connection.
    pub fn slow_down(&self, bytes_per_second: u32) {
        self.pace.bytes_per_second.store(bytes_per_second, Ordering::SeqCst);
    }
}

/// Relays both ways; gives the two streams back, to be cut.
fn join(here: TcpStream, there: TcpStream, pace: &Arc<Pace>) -> io::Result<[TcpStream; 2]> {
    for (from, to) in [(&here, &there), (&there, &here)] {
        from.set_nodelay(true)?;
        let (from, to, pace) = (from.try_clone()?, to.try_clone()?, Arc::clone(pace));
        std::thread::spawn(move || relay(from, to, &pace));
    }
    Ok([here, there])
}

fn relay(mut from: TcpStream, mut to: TcpStream, pace: &Pace) {
    let mut buffer = vec![0u8; 64 * 1024];
    while let Ok(taken @ 1..) = from.read(&mut buffer) {
        let bytes_per_second = pace.bytes_per_second.load(Ordering::SeqCst);
        if bytes_per_second > 0 {
            // Before they pass, as on a slow wire: a little that came after a pause takes its time too.
            std::thread::sleep(Duration::from_secs_f64(taken as f64 / f64::from(bytes_per_second)));
        }
        if !pace.silent.load(Ordering::SeqCst) && to.write_all(&buffer[..taken]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}
