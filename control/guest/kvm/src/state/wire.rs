//! Records to bytes and back: little-endian words, KVM's structures as they are, and counted bytes.
//!
//! The reader is the only way in: it never allocates by a number that was read before that number met its limit.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::KvmError;

#[derive(Default)]
pub(super) struct Writer(Vec<u8>);

impl Writer {
    pub(super) fn word(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn word64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    pub(super) fn count(&mut self, count: usize) {
        self.word(u32::try_from(count).unwrap_or(u32::MAX));
    }

    pub(super) fn record(&mut self, record: &(impl IntoBytes + Immutable)) {
        self.0.extend_from_slice(record.as_bytes());
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

pub(super) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader(bytes)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], KvmError> {
        let (taken, rest) = self
            .0
            .split_at_checked(len)
            .ok_or_else(|| KvmError::state("the micro-VM's state ends early: it is damaged"))?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn word(&mut self) -> Result<u32, KvmError> {
        Ok(u32::from_le_bytes(self.take(4)?.try_into().unwrap_or_default()))
    }

    pub(super) fn word64(&mut self) -> Result<u64, KvmError> {
        Ok(u64::from_le_bytes(self.take(8)?.try_into().unwrap_or_default()))
    }

    /// A count between `min` and `max`.
    pub(super) fn count(&mut self, min: usize, max: usize, what: &str) -> Result<usize, KvmError> {
        let count = self.word()? as usize;
        if (min..=max).contains(&count) {
            return Ok(count);
        }
        Err(KvmError::state(format!(
            "the micro-VM's state speaks of {count} {what}, {min} to {max} can be: it is damaged"
        )))
    }

    pub(super) fn record<T: FromBytes>(&mut self) -> Result<T, KvmError> {
        let bytes = self.take(size_of::<T>())?;
        T::read_from_bytes(bytes).map_err(|_| KvmError::state("the micro-VM's state is damaged"))
    }

    pub(super) fn bytes(&mut self, max: usize, what: &str) -> Result<&'a [u8], KvmError> {
        let len = self.count(0, max, what)?;
        self.take(len)
    }

    pub(super) fn end(self) -> Result<(), KvmError> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(KvmError::state("the micro-VM's state is longer than it says: it is damaged"))
    }
}
