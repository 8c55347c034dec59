//! AES-256-GCM by the `aes-gcm` crate: safe Rust, one copy into the hot buffer, then in place.

use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit};

use super::{Aead, LaneKey, Nonce, Parts, Source, fill};

/// The key schedule.
pub struct RustCrypto(Aes256Gcm);

impl RustCrypto {
    /// Expands the key.
    pub fn new(key: &LaneKey) -> RustCrypto {
        RustCrypto(Aes256Gcm::new(key.bytes().into()))
    }
}

impl Aead for RustCrypto {
    fn seal(&mut self, nonce: &Nonce, parts: Parts<'_>, source: Source<'_>) -> bool {
        if !fill(parts.body, source) {
            return false;
        }
        let Ok(tag) = self.0.encrypt_inout_detached(nonce.into(), parts.header, parts.body.into()) else {
            return false;
        };
        parts.tag.copy_from_slice(&tag);
        true
    }

    fn open(&mut self, nonce: &Nonce, parts: Parts<'_>) -> bool {
        let Ok(tag) = (&*parts.tag).try_into() else { return false };
        self.0.decrypt_inout_detached(nonce.into(), parts.header, parts.body.into(), tag).is_ok()
    }
}
