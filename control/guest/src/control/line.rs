//! One end of a control socket: one JSON object a line, some followed by raw bytes.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest line; a longer one ends the connection.
const LINE_BYTES_MAX: u64 = 16 << 10;

/// One end of the socket.
#[derive(Debug)]
pub(crate) struct Line {
    reader: BufReader<UnixStream>,
}

impl Line {
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self { reader: BufReader::new(stream) }
    }

    pub(crate) fn send(&mut self, message: &impl Serialize) -> std::io::Result<()> {
        let mut text = serde_json::to_vec(message)?;
        text.push(b'\n');
        self.reader.get_mut().write_all(&text)
    }

    pub(crate) fn send_bytes(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.reader.get_mut().write_all(bytes)
    }

    /// The next message; `None` when the other side is gone.
    pub(crate) fn receive<T: DeserializeOwned>(&mut self) -> std::io::Result<Option<T>> {
        let mut text = String::new();
        if self.reader.by_ref().take(LINE_BYTES_MAX).read_line(&mut text)? == 0 {
            return Ok(None);
        }
        serde_json::from_str(&text).map(Some).map_err(std::io::Error::from)
    }

    /// `len` raw bytes, refused above `max` before anything is allocated.
    pub(crate) fn receive_bytes(&mut self, len: u64, max: u64) -> std::io::Result<Vec<u8>> {
        if len > max {
            let why = format!("{len} bytes are announced where at most {max} make sense");
            return Err(std::io::Error::new(std::io::ErrorKind::InvalidData, why));
        }
        let mut bytes = Vec::new();
        self.reader.by_ref().take(len).read_to_end(&mut bytes)?;
        if bytes.len() as u64 != len {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(bytes)
    }
}
