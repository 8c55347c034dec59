//! Where a peer listens, and what its lanes travel over: `tcp://HOST:PORT`, `rdma://HOST:PORT`, and QEMU's spelling of
//! both, without the slashes.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use crate::failure::Failure;

/// The first port of libvirt's migration range, used where the URI names none.
pub const DEFAULT_PORT: u16 = 49152;

/// What lanes travel over. The control channel is on TCP in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP connections.
    Tcp,
    /// Queue pairs of an RDMA card that has the host's address.
    Rdma,
}

impl Transport {
    const ALL: [Transport; 2] = [Transport::Tcp, Transport::Rdma];

    const fn word(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Rdma => "rdma",
        }
    }

    /// The rest of an address that begins with this one's word.
    fn strip(self, text: &str) -> Option<&str> {
        let rest = text.strip_prefix(self.word())?.strip_prefix(':')?;
        Some(rest.strip_prefix("//").unwrap_or(rest))
    }
}

/// A host and a port, as the operator wrote them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// What lanes travel over.
    pub transport: Transport,
    /// Host name or address without brackets: also the name that the peer's certificate must carry.
    pub host: String,
    /// TCP port of the control channel; lanes over RDMA use the same number in the connection manager's own space.
    pub port: u16,
}

impl Endpoint {
    /// Resolves to the first address.
    pub fn resolve(&self) -> Result<SocketAddr, Failure> {
        (self.host.as_str(), self.port)
            .to_socket_addrs()
            .ok()
            .and_then(|mut addresses| addresses.next())
            .ok_or_else(|| {
                Failure::Unavailable(format!(
                    "the host name {:?} has no address: check its spelling and DNS",
                    self.host
                ))
            })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = self.transport.word();
        if self.host.contains(':') {
            write!(f, "{word}://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{word}://{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found =
            Transport::ALL.into_iter().find_map(|transport| Some((transport, transport.strip(text)?)));
        let (transport, rest) = found.ok_or_else(|| {
            format!("{text:?} is not an address that vmferry can use: write tcp://HOST:PORT or rdma://HOST:PORT, such as tcp://192.0.2.7:{DEFAULT_PORT}")
        })?;
        let (host, port) = match rest.strip_prefix('[') {
            Some(bracketed) => {
                let (host, after) = bracketed.split_once(']').ok_or_else(|| {
                    format!("{text:?} opens a bracket and never closes it: write tcp://[ADDRESS]:PORT")
                })?;
                (host, after.strip_prefix(':'))
            }
            None => match rest.rsplit_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (rest, None),
            },
        };
        if host.is_empty() || host.contains('/') {
            return Err(format!("{text:?} names no host: write {}://HOST:PORT", transport.word()));
        }
        let port = match port {
            None | Some("") => DEFAULT_PORT,
            Some(port) => {
                port.parse().map_err(|_| format!("{port:?} is not a port: use a number from 0 to 65535"))?
            }
        };
        Ok(Self { transport, host: host.to_owned(), port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_and_ipv6_are_read() {
        for (text, transport, host, port) in [
            ("tcp://127.0.0.1:7700", Transport::Tcp, "127.0.0.1", 7700),
            ("tcp:host.example:1", Transport::Tcp, "host.example", 1),
            ("tcp://[::1]:7700", Transport::Tcp, "::1", 7700),
            ("tcp://host", Transport::Tcp, "host", DEFAULT_PORT),
            ("rdma://192.0.2.7:7700", Transport::Rdma, "192.0.2.7", 7700),
            ("rdma:host.example:1", Transport::Rdma, "host.example", 1),
            ("rdma:[::1]", Transport::Rdma, "::1", DEFAULT_PORT),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.transport, transport, "{text}");
            assert_eq!((endpoint.host.as_str(), endpoint.port), (host, port), "{text}");
        }
        assert_eq!("rdma:h:7".parse::<Endpoint>().unwrap().to_string(), "rdma://h:7");
        assert_eq!("tcp://[::1]:7700".parse::<Endpoint>().unwrap().to_string(), "tcp://[::1]:7700");
    }

    #[test]
    fn a_wrong_address_says_what_to_write() {
        for text in
            ["127.0.0.1:7700", "exec:rm", "tcp://", "tcp://h:99999", "tcp://[::1", "rdma://", "rdmah:1"]
        {
            let sentence = text.parse::<Endpoint>().unwrap_err();
            assert!(sentence.contains("write") || sentence.contains("use"), "{text}: {sentence}");
        }
    }
}
