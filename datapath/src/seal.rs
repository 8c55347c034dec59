//! Sealing and opening records: one key, one counter, one direction.
//!
//! ```text
//!   key ──► Sealer{counter 0,1,2…} ── record ──► Opener{counter 0,1,2…} ◄── the same key
//! ```
//!
//! The nonce is the counter, and the counter is private to the sealer that consumed the key: it only goes up, the
//! key is gone from the caller's hands, and neither can be cloned. What must never happen, a nonce used twice
//! under one key, cannot be written down:
//!
//! ```compile_fail
//! use vmferry_datapath::{LaneKey, seal::Sealer, Cipher, Provider};
//! let key = LaneKey::from_bytes([7; 32]);
//! let first = Sealer::new(Cipher::Aes256Gcm(Provider::AwsLc), Some(key));
//! let second = Sealer::new(Cipher::Aes256Gcm(Provider::AwsLc), Some(key)); // moved: does not compile
//! ```
//!
//! The opener expects exactly the next counter, so a replayed, dropped or reordered record is refused before its
//! tag is even looked at. A plain lane is not an `if` in the loop: it is a provider that seals nothing.

use std::fmt;

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, IntoBytes};
use zeroize::Zeroizing;

use crate::error::DataError;
use crate::frame::{FrameFault, Framed, HEADER_BYTES, Record, RecordHeader, TAG_BYTES};
use crate::guest_ram::GuestRam;
use crate::page::{ChunkIndex, PAGE_BYTES};

pub mod aes_gcm;
pub mod aws;
pub mod choose;
pub mod plain;

pub use choose::fastest_provider;

/// The key of one lane and direction. It is erased when dropped, and can be neither copied nor printed.
pub struct LaneKey(Zeroizing<[u8; 32]>);

impl LaneKey {
    /// Takes the key's bytes, from the TLS exporter.
    pub fn from_bytes(bytes: [u8; 32]) -> LaneKey {
        LaneKey(Zeroizing::new(bytes))
    }

    /// The bytes.
    pub(crate) fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Who computes AES-256-GCM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Provider {
    /// The RustCrypto crate.
    AesGcm,
    /// AWS-LC.
    AwsLc,
}

/// How records are sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cipher {
    /// Not at all.
    Plain,
    /// AES-256-GCM.
    Aes256Gcm(Provider),
}

impl fmt::Display for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Provider::AesGcm => "aes-gcm",
            Provider::AwsLc => "aws-lc-rs",
        })
    }
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cipher::Plain => f.write_str("none"),
            Cipher::Aes256Gcm(provider) => write!(f, "aes-256-gcm ({provider})"),
        }
    }
}

/// Where the body of a record comes from.
#[derive(Clone, Copy)]
pub enum Source<'ram> {
    /// It lies in the record already, behind the header.
    InPlace,
    /// These pages of a chunk, read once, while the guest may write them.
    Guest {
        /// The guest's memory.
        ram: &'ram GuestRam,
        /// The chunk.
        chunk: ChunkIndex,
        /// The pages, all valid.
        pages: u64,
    },
}

/// A nonce: four zero bytes and the counter, little-endian.
pub type Nonce = [u8; 12];

/// One record in its buffer, as a provider needs it.
pub struct Parts<'record> {
    /// Authenticated, not sealed.
    pub header: &'record [u8],
    /// Sealed or opened in place.
    pub body: &'record mut [u8],
    /// The tag; empty when plain.
    pub tag: &'record mut [u8],
}

/// What a provider does: it computes, and keeps no counter. `false` is a refusal.
pub trait Aead: Send {
    /// Bytes of the tag.
    fn tag_bytes(&self) -> usize {
        TAG_BYTES
    }
    /// Seals the body and writes the tag. A guest source is read exactly once.
    fn seal(&mut self, nonce: &Nonce, parts: Parts<'_>, source: Source<'_>) -> bool;
    /// Opens the body in place. On a refusal its content is worthless and must not be used.
    fn open(&mut self, nonce: &Nonce, parts: Parts<'_>) -> bool;
}

/// Copies a source into a record's body: `false` when it is not exactly as long.
pub(crate) fn fill(body: &mut [u8], source: Source<'_>) -> bool {
    match source {
        Source::InPlace => true,
        Source::Guest { ram, chunk, pages } => {
            body.len() == pages.count_ones() as usize * PAGE_BYTES
                && ram.gather(chunk, pages, body) == body.len()
        }
    }
}

/// Seals the records of one lane and direction.
pub struct Sealer {
    counter: u64,
    tag_bytes: usize,
    aead: Box<dyn Aead>,
}

/// Opens the records of one lane and direction.
pub struct Opener {
    counter: u64,
    tag_bytes: usize,
    aead: Box<dyn Aead>,
}

/// The provider for a cipher. A key without a cipher, or the other way round, is our bug and never a plain lane.
fn aead(cipher: Cipher, key: Option<LaneKey>) -> Result<Box<dyn Aead>, DataError> {
    match (cipher, key) {
        (Cipher::Plain, None) => Ok(Box::new(plain::Plain)),
        (Cipher::Aes256Gcm(Provider::AesGcm), Some(key)) => Ok(Box::new(aes_gcm::RustCrypto::new(&key))),
        (Cipher::Aes256Gcm(Provider::AwsLc), Some(key)) => Ok(Box::new(aws::AwsLc::new(&key)?)),
        (Cipher::Plain, Some(_)) => Err(DataError::Bug("a plain lane was given a key")),
        (Cipher::Aes256Gcm(_), None) => Err(DataError::Bug("a sealed lane was given no key")),
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_le_bytes());
    nonce
}

impl Sealer {
    /// Consumes the key; `None` exactly for a plain lane.
    pub fn new(cipher: Cipher, key: Option<LaneKey>) -> Result<Sealer, DataError> {
        let aead = aead(cipher, key)?;
        Ok(Sealer { counter: 0, tag_bytes: aead.tag_bytes(), aead })
    }

    /// Bytes of the tag.
    pub fn tag_bytes(&self) -> usize {
        self.tag_bytes
    }

    /// Records sealed so far.
    pub fn records(&self) -> u64 {
        self.counter
    }

    /// Writes the sealed record to the start of `buffer` and gives its length.
    pub fn seal(
        &mut self,
        record: &Record,
        source: Source<'_>,
        buffer: &mut [u8],
    ) -> Result<usize, DataError> {
        let len = HEADER_BYTES + record.body_len() + self.tag_bytes;
        let whole = buffer.get_mut(..len).ok_or(DataError::Bug("a record did not fit its buffer"))?;
        let header = RecordHeader { counter: U64::new(self.counter), ..record.header() };
        whole[..HEADER_BYTES].copy_from_slice(header.as_bytes());
        let nonce = nonce(self.counter);
        // The counter moves on before the key is used: whatever happens next, this nonce is spent.
        self.counter = self.counter.checked_add(1).ok_or(DataError::Bug("a lane's counter ran out"))?;
        if self.aead.seal(&nonce, parts(whole, record.body_len()), source) {
            Ok(len)
        } else {
            Err(DataError::Bug("the cipher refused to seal a record"))
        }
    }
}

impl Opener {
    /// Consumes the key; `None` exactly for a plain lane.
    pub fn new(cipher: Cipher, key: Option<LaneKey>) -> Result<Opener, DataError> {
        let aead = aead(cipher, key)?;
        Ok(Opener { counter: 0, tag_bytes: aead.tag_bytes(), aead })
    }

    /// Bytes of the tag.
    pub fn tag_bytes(&self) -> usize {
        self.tag_bytes
    }

    /// Records opened so far.
    pub fn records(&self) -> u64 {
        self.counter
    }

    /// Opens the record that `framed` found at the start of `arrived`, in place, and gives its body. The header is
    /// read again from the bytes that the tag covers, so what is acted on is what was authenticated.
    pub fn open<'a>(&mut self, framed: &Framed, arrived: &'a mut [u8]) -> Result<&'a mut [u8], FrameFault> {
        if framed.counter != self.counter {
            return Err(FrameFault::OutOfOrder { expected: self.counter, got: framed.counter });
        }
        let whole = arrived.get_mut(..framed.len).ok_or(FrameFault::BadField("length"))?;
        let header = RecordHeader::ref_from_prefix(whole).map_err(|_| FrameFault::BadField("length"))?.0;
        let body_len = framed.record.body_len();
        if header.check()? != framed.record || HEADER_BYTES + body_len + self.tag_bytes != framed.len {
            return Err(FrameFault::BadField("length"));
        }
        let nonce = nonce(self.counter);
        if !self.aead.open(&nonce, parts(whole, body_len)) {
            return Err(FrameFault::Forged(self.counter));
        }
        self.counter += 1;
        Ok(&mut whole[HEADER_BYTES..HEADER_BYTES + body_len])
    }
}

/// Splits a record of exactly header, body and tag.
fn parts(whole: &mut [u8], body_len: usize) -> Parts<'_> {
    let (header, rest) = whole.split_at_mut(HEADER_BYTES);
    let (body, tag) = rest.split_at_mut(body_len);
    Parts { header, body, tag }
}

#[cfg(test)]
mod tests;
