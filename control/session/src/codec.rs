//! Messages on the wire: a little-endian `u32` length, then that many bytes of JSON.
//!
//! The length is capped before anything is read for it, the buffer never grows past one message and one push, and
//! trailing bytes inside a message are an error. After its first error a decoder stays broken: a stream that lost
//! its frame cannot find it again. What must never happen: a panic or an allocation on a number that the peer sent.

use thiserror::Error;

use crate::message::Message;

/// The longest message, in bytes, its length field not counted.
pub const MESSAGE_BYTES_MAX: usize = 256 * 1024;
/// Bytes that [`Decoder`] holds at most: one message, and what one read brought along.
pub const BUFFER_BYTES_MAX: usize = 2 * MESSAGE_BYTES_MAX;
const LENGTH_BYTES: usize = 4;

/// Why bytes are no message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CodecError {
    /// The length field is past the cap.
    #[error("a control message of {bytes} bytes was announced; the cap is {MESSAGE_BYTES_MAX}")]
    TooLong {
        /// As announced or encoded.
        bytes: u64,
    },
    /// The bytes are no message.
    #[error("a control message could not be read: {0}")]
    Malformed(String),
    /// A list or a text inside is longer than its cap.
    #[error("{0} in a control message is longer than its cap")]
    OverCap(&'static str),
    /// More was pushed than the caller took out.
    #[error("more than {BUFFER_BYTES_MAX} bytes of control messages wait to be taken")]
    Overrun,
}

/// One message as bytes for the wire.
pub fn encode(message: &Message) -> Result<Vec<u8>, CodecError> {
    message.check_caps().map_err(|over| CodecError::OverCap(over.0))?;
    let mut bytes = vec![0; LENGTH_BYTES];
    serde_json::to_writer(&mut bytes, message).map_err(|e| CodecError::Malformed(e.to_string()))?;
    let body = bytes.len() - LENGTH_BYTES;
    let length = u32::try_from(body).ok().filter(|_| body <= MESSAGE_BYTES_MAX);
    let length = length.ok_or(CodecError::TooLong { bytes: u64::try_from(body).unwrap_or(u64::MAX) })?;
    bytes[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// Turns a stream of bytes, cut anywhere, back into messages.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    taken: usize,
    broken: Option<CodecError>,
}

impl Decoder {
    /// Adds what was read; then call [`Decoder::next_message`] until it gives `None` or an error.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.broken.is_some() {
            return;
        }
        self.buffer.drain(..self.taken);
        self.taken = 0;
        if self.buffer.len() + bytes.len() > BUFFER_BYTES_MAX {
            self.break_with(CodecError::Overrun);
            return;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one.
    pub fn next_message(&mut self) -> Result<Option<Message>, CodecError> {
        if let Some(error) = &self.broken {
            return Err(error.clone());
        }
        self.take().inspect_err(|error| self.break_with(error.clone()))
    }

    fn take(&mut self) -> Result<Option<Message>, CodecError> {
        let waiting = self.buffer.get(self.taken..).unwrap_or_default();
        let Some((length, rest)) = waiting.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let announced = u32::from_le_bytes(*length);
        let length = usize::try_from(announced).unwrap_or(usize::MAX);
        if length > MESSAGE_BYTES_MAX {
            return Err(CodecError::TooLong { bytes: announced.into() });
        }
        let Some(body) = rest.get(..length) else { return Ok(None) };
        let message: Message =
            serde_json::from_slice(body).map_err(|e| CodecError::Malformed(e.to_string()))?;
        message.check_caps().map_err(|over| CodecError::OverCap(over.0))?;
        self.taken += LENGTH_BYTES + length;
        Ok(Some(message))
    }

    fn break_with(&mut self, error: CodecError) {
        self.broken = Some(error);
        self.buffer = Vec::new();
        self.taken = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_cut_anywhere_gives_the_same_messages() {
        let mut stream = encode(&Message::Ping(7)).unwrap();
        stream.extend(encode(&Message::Commit).unwrap());
        for cut in 0..=stream.len() {
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                decoder.push(part);
                seen.extend(std::iter::from_fn(|| decoder.next_message().unwrap()));
            }
            assert_eq!(seen, [Message::Ping(7), Message::Commit], "cut at {cut}");
        }
    }

    #[test]
    fn a_length_past_the_cap_is_refused_before_its_body() {
        let mut decoder = Decoder::default();
        decoder.push(&u32::MAX.to_le_bytes());
        assert_eq!(decoder.next_message(), Err(CodecError::TooLong { bytes: u32::MAX.into() }));
        decoder.push(&encode(&Message::Commit).unwrap());
        assert!(decoder.next_message().is_err(), "a broken decoder stays broken");
    }

    #[test]
    fn trailing_bytes_and_unknown_fields_are_refused() {
        for body in [
            r#"{"type":"commit"} x"#,
            r#"{"type":"commit","more":1}"#,
            r#"{"type":"no-such"}"#,
            r#"{"type":"ask","body":{"attempt":"00"}}"#,
            "",
        ] {
            let mut bytes = u32::try_from(body.len()).unwrap().to_le_bytes().to_vec();
            bytes.extend_from_slice(body.as_bytes());
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            assert!(matches!(decoder.next_message(), Err(CodecError::Malformed(_))), "{body}");
        }
    }

    #[test]
    fn pushing_without_taking_is_bounded() {
        let mut decoder = Decoder::default();
        let pings = encode(&Message::Ping(1)).unwrap().repeat(1000);
        for _ in 0..100 {
            decoder.push(&pings);
        }
        assert!(decoder.buffer.len() <= BUFFER_BYTES_MAX);
        assert_eq!(decoder.next_message(), Err(CodecError::Overrun));
    }
}
