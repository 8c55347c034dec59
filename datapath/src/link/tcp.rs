//! A link over TCP.
use super::Link;

/// A link over a connected TCP stream.
pub struct TcpLink {
    _stream: std::net::TcpStream,
}

impl TcpLink {
    /// Takes over a connected stream.
    pub fn new(stream: std::net::TcpStream) -> TcpLink {
        TcpLink { _stream: stream }
    }
}

impl Link for TcpLink {}
