//! The device state on its way: eight bytes of ours, then QEMU's migration stream as it comes.
//!
//! ```text
//!   "VMFQ" | version 1 | flags (bit 0: the guest was running) | 0 | 0 | QEMU's stream …
//! ```
//!
//! QEMU saves a guest that we paused as `paused`, and one that its owner had paused as well; the flag tells them
//! apart on the target.

use std::io::{self, Read, Write};

use vmferry_datapath::ByteLen;

const MAGIC: [u8; 4] = *b"VMFQ";
const VERSION: u8 = 1;
const WAS_RUNNING: u8 = 1;
/// What is read at once.
const PIECE_BYTES: usize = 128 << 10;

/// What stands in front of QEMU's stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Preface {
    /// The guest ran until we paused it, so it runs on the target.
    pub(crate) was_running: bool,
}

impl Preface {
    pub(crate) fn to_bytes(self) -> [u8; 8] {
        let [a, b, c, d] = MAGIC;
        [a, b, c, d, VERSION, if self.was_running { WAS_RUNNING } else { 0 }, 0, 0]
    }

    /// Refuses everything that `to_bytes` does not write.
    pub(crate) fn from_bytes(bytes: [u8; 8]) -> Option<Preface> {
        [true, false].map(|was_running| Preface { was_running }).into_iter().find(|it| it.to_bytes() == bytes)
    }
}

/// Which end of a relay failed.
#[derive(Debug)]
pub(crate) enum RelayFault {
    /// The source of bytes.
    Read(io::Error),
    /// Where they go.
    Write(io::Error),
}

/// Copies to the end of `from`; how much it was.
pub(crate) fn relay(from: &mut dyn Read, into: &mut dyn Write) -> Result<ByteLen, RelayFault> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut total = 0_u64;
    loop {
        let count = match from.read(&mut piece) {
            Ok(0) => return Ok(ByteLen(total)),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(RelayFault::Read(error)),
        };
        into.write_all(&piece[..count]).map_err(RelayFault::Write)?;
        total += count as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_preface_reads_back_and_nothing_else_does() {
        for was_running in [true, false] {
            let preface = Preface { was_running };
            assert_eq!(Preface::from_bytes(preface.to_bytes()), Some(preface));
            for at in 0..8 {
                let mut bytes = preface.to_bytes();
                bytes[at] ^= 0x80;
                assert_eq!(Preface::from_bytes(bytes), None, "byte {at}");
            }
        }
    }
}
