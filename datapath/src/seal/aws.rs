//! AES-256-GCM by AWS-LC, straight from guest memory: each byte is read once, by the cipher itself.
//!
//! The safe API wants a `&[u8]`, which a running guest's memory never is, so the calls are made by hand. Sealing
//! streams the runs of pages through one `EVP_CIPHER_CTX`; its key schedule is computed once and each record only
//! sets the nonce. Opening works on private memory, in place.
#![expect(unsafe_code, reason = "AWS-LC's functions take raw pointers, and so can read guest memory")]

use std::ptr::{NonNull, null, null_mut};

use aws_lc_sys::{
    EVP_AEAD_CTX, EVP_AEAD_CTX_free, EVP_AEAD_CTX_new, EVP_AEAD_CTX_open_gather, EVP_CIPHER_CTX,
    EVP_CIPHER_CTX_ctrl, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_CTRL_AEAD_GET_TAG, EVP_EncryptFinal_ex,
    EVP_EncryptInit_ex, EVP_EncryptUpdate, EVP_aead_aes_256_gcm, EVP_aes_256_gcm,
};

use super::{Aead, LaneKey, Nonce, Parts, Source};
use crate::error::DataError;
use crate::frame::TAG_BYTES;
use crate::guest_ram::runs;

const OUT_OF_MEMORY: DataError = DataError::HostRefused {
    service: "allocate a cipher",
    fix: "free some memory",
    errno: rustix::io::Errno::NOMEM,
};

/// A sealing and an opening context over one key.
pub struct AwsLc {
    sealing: NonNull<EVP_CIPHER_CTX>,
    opening: NonNull<EVP_AEAD_CTX>,
}

// SAFETY: both contexts are plain memory without thread affinity, owned by this value alone, and used only
// through `&mut self`.
unsafe impl Send for AwsLc {}

impl AwsLc {
    /// Expands the key.
    pub fn new(key: &LaneKey) -> Result<AwsLc, DataError> {
        let key = key.bytes();
        // SAFETY: no arguments; gives a static table.
        let aead = unsafe { EVP_aead_aes_256_gcm() };
        // SAFETY: the key is valid for its length, and is copied.
        let opening = unsafe { EVP_AEAD_CTX_new(aead, key.as_ptr(), key.len(), TAG_BYTES) };
        let opening = NonNull::new(opening).ok_or(OUT_OF_MEMORY)?;
        // SAFETY: no arguments.
        let sealing = NonNull::new(unsafe { EVP_CIPHER_CTX_new() });
        let Some(sealing) = sealing else {
            // SAFETY: made above, used nowhere else.
            unsafe { EVP_AEAD_CTX_free(opening.as_ptr()) };
            return Err(OUT_OF_MEMORY);
        };
        // From here on `Drop` frees both.
        let contexts = AwsLc { sealing, opening };
        // SAFETY: no arguments; gives a static table.
        let cipher = unsafe { EVP_aes_256_gcm() };
        // SAFETY: a fresh context, a static cipher, no engine, a key of 32 bytes as the cipher wants, no nonce yet.
        let ok = unsafe { EVP_EncryptInit_ex(sealing.as_ptr(), cipher, null_mut(), key.as_ptr(), null()) };
        if ok == 1 { Ok(contexts) } else { Err(OUT_OF_MEMORY) }
    }

    /// Seals `len` bytes from `from` to `to`; a null `to` authenticates them only.
    fn update(&mut self, from: *const u8, len: usize, to: *mut u8) -> bool {
        let Ok(len) = i32::try_from(len) else { return false };
        let mut written = 0;
        // SAFETY: callers pass `from` readable and `to` (when not null) writable for `len` bytes; AWS-LC reads each
        // input byte once and never reads it through a reference. The context is ours alone.
        let ok = unsafe { EVP_EncryptUpdate(self.sealing.as_ptr(), to, &raw mut written, from, len) };
        ok == 1 && (written == len || to.is_null())
    }

    fn update_body(&mut self, body: &mut [u8], source: Source<'_>) -> bool {
        let Source::Guest { ram, chunk, pages } = source else {
            return body.is_empty() || self.update(body.as_ptr(), body.len(), body.as_mut_ptr());
        };
        let mut rest = body;
        for (first, count) in runs(pages) {
            let Some(range) = ram.pages(chunk, first, count) else { return false };
            let Some((now, later)) = rest.split_at_mut_checked(range.len()) else { return false };
            rest = later;
            if !self.update(range.as_ptr(), now.len(), now.as_mut_ptr()) {
                return false;
            }
        }
        rest.is_empty()
    }
}

impl Aead for AwsLc {
    fn seal(&mut self, nonce: &Nonce, parts: Parts<'_>, source: Source<'_>) -> bool {
        let context = self.sealing.as_ptr();
        // SAFETY: the context holds cipher and key; the nonce has the 12 bytes that GCM expects by default.
        let begun = unsafe { EVP_EncryptInit_ex(context, null(), null_mut(), null(), nonce.as_ptr()) };
        if begun != 1
            || parts.tag.len() != TAG_BYTES
            || !self.update(parts.header.as_ptr(), parts.header.len(), null_mut())
            || !self.update_body(parts.body, source)
        {
            return false;
        }
        let (mut nothing, mut written) = ([0_u8; TAG_BYTES], 0);
        // SAFETY: GCM's last step writes nothing, and `nothing` could hold a block.
        let ended = unsafe { EVP_EncryptFinal_ex(context, nothing.as_mut_ptr(), &raw mut written) };
        let tag = parts.tag.as_mut_ptr().cast();
        // SAFETY: the tag has 16 bytes, checked above, and the argument says 16.
        let told = unsafe { EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, 16, tag) };
        ended == 1 && told == 1
    }

    fn open(&mut self, nonce: &Nonce, parts: Parts<'_>) -> bool {
        let body = parts.body.as_mut_ptr();
        // SAFETY: every pointer is valid for the length beside it; in and out are the same private buffer, which
        // the function allows.
        let ok = unsafe {
            EVP_AEAD_CTX_open_gather(
                self.opening.as_ptr(),
                body,
                nonce.as_ptr(),
                nonce.len(),
                body,
                parts.body.len(),
                parts.tag.as_ptr(),
                parts.tag.len(),
                parts.header.as_ptr(),
                parts.header.len(),
            )
        };
        ok == 1
    }
}

impl Drop for AwsLc {
    fn drop(&mut self) {
        // SAFETY: made in `new`, freed only here; AWS-LC erases the key schedule.
        unsafe { EVP_CIPHER_CTX_free(self.sealing.as_ptr()) };
        // SAFETY: as above.
        unsafe { EVP_AEAD_CTX_free(self.opening.as_ptr()) };
    }
}

const _: () = assert!(TAG_BYTES == 16);
