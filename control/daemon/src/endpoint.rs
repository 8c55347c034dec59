//! Where a peer listens: `tcp://HOST:PORT`, and QEMU's spelling `tcp:HOST:PORT`.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use crate::failure::Failure;

/// The first port of libvirt's migration range, used where the URI names none.
pub const DEFAULT_PORT: u16 = 49152;

/// A host and a port, as the operator wrote them. `rdma://` is refused until the RDMA link exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// Host name or address without brackets: also the name that the peer's certificate must carry.
    pub host: String,
    /// TCP port.
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
        if self.host.contains(':') {
            write!(f, "tcp://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "tcp://{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = text.strip_prefix("tcp://").or_else(|| text.strip_prefix("tcp:")).ok_or_else(|| {
            format!("{text:?} is not an address that vmferry can use: write tcp://HOST:PORT, such as tcp://192.0.2.7:{DEFAULT_PORT}")
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
            return Err(format!("{text:?} names no host: write tcp://HOST:PORT"));
        }
        let port = match port {
            None | Some("") => DEFAULT_PORT,
            Some(port) => {
                port.parse().map_err(|_| format!("{port:?} is not a port: use a number from 0 to 65535"))?
            }
        };
        Ok(Self { host: host.to_owned(), port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_spellings_and_ipv6_are_read() {
        for (text, host, port) in [
            ("tcp://127.0.0.1:7700", "127.0.0.1", 7700),
            ("tcp:host.example:1", "host.example", 1),
            ("tcp://[::1]:7700", "::1", 7700),
            ("tcp://host", "host", DEFAULT_PORT),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!((endpoint.host.as_str(), endpoint.port), (host, port), "{text}");
        }
        assert_eq!("tcp://[::1]:7700".parse::<Endpoint>().unwrap().to_string(), "tcp://[::1]:7700");
    }

    #[test]
    fn a_wrong_address_says_what_to_write() {
        for text in ["127.0.0.1:7700", "exec:rm", "tcp://", "tcp://h:99999", "tcp://[::1", "rdma://h:1"] {
            let sentence = text.parse::<Endpoint>().unwrap_err();
            assert!(sentence.contains("write") || sentence.contains("use"), "{text}: {sentence}");
        }
    }
}
