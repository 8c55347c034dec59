//! What a test knows inside the lab: which of the two hosts it is on, and where to meet its other half.
//!
//! ```text
//!   lab host a: test x ──► meet("listening", "7700") ◄── test x :lab host b
//! ```
//!
//! The same test runs on both hosts at the same time and plays one role on each. Two halves that wait at different
//! places fail at once, and a half that died lets the other fail within [`MEET_TIMEOUT`]: no meeting hangs.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use crate::RigError;
use crate::heartbeat::now;

/// A half that waits longer for the other fails.
pub const MEET_TIMEOUT: Duration = Duration::from_secs(110);
/// Where host a waits for host b.
const MEET_PORT: u16 = 7999;
/// Between two knocks of host b.
const KNOCK_EVERY: Duration = Duration::from_millis(50);

/// One of the two lab hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// The first, by custom the source of a move.
    A,
    /// The second, by custom the target.
    B,
}

/// This lab host's place in a test of two halves.
#[derive(Debug, Clone)]
pub struct Place {
    /// Which host this is.
    pub host: Host,
    /// This host's address on the network between the two.
    pub address: IpAddr,
    /// The other's.
    pub peer: IpAddr,
}

impl Place {
    /// Read from what the lab's init sets: `VMFERRY_LAB_HOST`, `VMFERRY_LAB_ADDRESS`, `VMFERRY_LAB_PEER`.
    pub fn find() -> Result<Self, RigError> {
        let word = |name: &str| {
            std::env::var(name)
                .map_err(|_| RigError::Missing(format!("{name} is not set: run this by 'scripts/lab test'")))
        };
        let address = |name: &str| {
            word(name)?.parse().map_err(|_| RigError::Missing(format!("{name} is not an IP address")))
        };
        let host = match word("VMFERRY_LAB_HOST")?.as_str() {
            "a" => Host::A,
            "b" => Host::B,
            other => return Err(RigError::Missing(format!("VMFERRY_LAB_HOST is {other:?}, not a or b"))),
        };
        Ok(Self { host, address: address("VMFERRY_LAB_ADDRESS")?, peer: address("VMFERRY_LAB_PEER")? })
    }

    /// Waits for the other half at `place` and exchanges a line of text with it.
    pub fn meet(&self, place: &str, word: &str) -> Result<String, RigError> {
        let stream = match self.host {
            Host::A => self.wait_for_knock(place)?,
            Host::B => self.knock(place)?,
        };
        exchange(&stream, place, word)
            .map_err(RigError::host(format!("the meeting at '{place}' broke up")))?
    }

    fn wait_for_knock(&self, place: &str) -> Result<TcpStream, RigError> {
        let what = format!("cannot wait for the other half at '{place}'");
        let listener =
            TcpListener::bind(SocketAddr::new(self.address, MEET_PORT)).map_err(RigError::host(&what))?;
        listener.set_nonblocking(true).map_err(RigError::host(&what))?;
        until(place, || match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false).map_err(RigError::host(&what))?;
                Ok(Some(stream))
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(RigError::host(&what)(error)),
        })
    }

    fn knock(&self, place: &str) -> Result<TcpStream, RigError> {
        let there = SocketAddr::new(self.peer, MEET_PORT);
        until(place, || Ok(TcpStream::connect_timeout(&there, KNOCK_EVERY * 20).ok()))
    }
}

fn until<T>(place: &str, mut attempt: impl FnMut() -> Result<Option<T>, RigError>) -> Result<T, RigError> {
    let start = now();
    loop {
        if let Some(found) = attempt()? {
            return Ok(found);
        }
        if now().duration_since(start) > MEET_TIMEOUT {
            let what = format!("the other half of this test, at '{place}',");
            return Err(RigError::Timeout { what, after_ms: MEET_TIMEOUT.as_millis() });
        }
        std::thread::sleep(KNOCK_EVERY);
    }
}

fn exchange(mut stream: &TcpStream, place: &str, word: &str) -> std::io::Result<Result<String, RigError>> {
    stream.set_read_timeout(Some(MEET_TIMEOUT))?;
    stream.write_all(format!("{place}\n{word}\n").as_bytes())?;
    let mut reader = BufReader::new(stream);
    let mut line = || {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        Ok::<_, std::io::Error>(line.trim_end_matches('\n').to_owned())
    };
    let theirs = line()?;
    if theirs != place {
        let why =
            format!("the other half is at '{theirs}' and this one at '{place}': one of them went wrong");
        return Ok(Err(RigError::Guest(why)));
    }
    Ok(Ok(line()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn halves(addresses: [&str; 2]) -> (Place, Place) {
        let [a, b] = addresses.map(|text| text.parse().unwrap());
        (Place { host: Host::A, address: a, peer: b }, Place { host: Host::B, address: b, peer: a })
    }

    #[test]
    fn two_halves_exchange_words_and_notice_a_wrong_place() {
        let (a, b) = halves(["127.77.0.1", "127.77.0.2"]);
        let other = std::thread::spawn(move || {
            assert_eq!(b.meet("start", "from b").unwrap(), "from a");
            b.meet("middle", "").unwrap_err().to_string()
        });
        assert_eq!(a.meet("start", "from a").unwrap(), "from b");
        let mine = a.meet("end", "").unwrap_err().to_string();
        assert!(mine.contains("'middle'") && mine.contains("'end'"), "{mine}");
        assert!(other.join().unwrap().contains("'end'"));
    }
}
