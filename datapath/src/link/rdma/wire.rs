//! What two ends of an RDMA link tell each other beside the bytes: immediates and cards.
//!
//! ```text
//!   WRITE_WITH_IMM  0 ‖ length      so many bytes lie in your ring, behind the last ones
//!   WRITE_WITH_IMM  1 ‖ taken       I took so many out of mine, in all, modulo 2^31
//!   SEND            card, 32 bytes  here is my ring; I want region n; here is region n; I give region n back
//! ```
//!
//! All of it came from the peer, and is checked before it is believed. What must never happen: a number of the peer's
//! that moves us past the end of our own ring.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::frame::FrameFault;

/// Bytes of a [`Card`].
pub(super) const CARD_BYTES: usize = 32;
const MAGIC: [u8; 4] = *b"vmfR";
const CREDIT_BIT: u32 = 1 << 31;
const LOW_BITS: u32 = CREDIT_BIT - 1;
/// No honest ring is larger.
const RING_BYTES_MAX: u64 = 1 << 30;

/// The 32 bits that arrive with a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Immediate {
    /// So many bytes were written behind the last ones.
    Bytes(u32),
    /// The peer took so many bytes out of its ring, in all, modulo 2^31.
    Taken(u32),
}

impl Immediate {
    /// As it travels. Lengths are below 2^31, because a ring is.
    pub(super) fn to_wire(self) -> u32 {
        match self {
            Immediate::Bytes(len) => len & LOW_BITS,
            Immediate::Taken(total) => total & LOW_BITS | CREDIT_BIT,
        }
    }

    /// As it came.
    pub(super) fn from_wire(wire: u32) -> Immediate {
        if wire & CREDIT_BIT == 0 { Immediate::Bytes(wire) } else { Immediate::Taken(wire & LOW_BITS) }
    }
}

/// The low bits of a running total, as a credit carries them.
pub(super) fn low_bits(total: u64) -> u32 {
    u32::try_from(total & u64::from(LOW_BITS)).unwrap_or(0)
}

/// The running total that a credit means: at least `before`, at most `most`.
pub(super) fn total_of(low: u32, before: u64, most: u64) -> Result<u64, FrameFault> {
    let step = u64::from(low.wrapping_sub(low_bits(before)) & LOW_BITS);
    match before.checked_add(step).filter(|total| *total <= most) {
        Some(total) => Ok(total),
        None => Err(FrameFault::BadCredit),
    }
}

/// A window of memory that the peer may write: its address there, its key, its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) address: u64,
    pub(super) key: u32,
    pub(super) len: u64,
}

/// A small message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Note {
    /// The sender of this note takes bytes in here, and lets the other one hold so many of its guest's regions.
    Ring(Window, u32),
    /// The sender of this note will write pages of that region: where is it?
    Want(u32),
    /// There it is.
    Region(u32, Window),
    /// Each write of the sender of this note to that region has completed, and it asks again before the next one.
    GiveBack(u32),
}

/// A note as it lies on the wire.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Card {
    magic: [u8; 4],
    kind: u8,
    zero: [u8; 3],
    region: U32,
    key: U32,
    address: U64,
    len: U64,
}

const _: () = assert!(size_of::<Card>() == CARD_BYTES);
const RING: u8 = 1;
const WANT: u8 = 2;
const REGION: u8 = 3;
const GIVE_BACK: u8 = 4;

impl Note {
    /// Its bytes.
    pub(super) fn card(self) -> Card {
        let nowhere = Window { address: 0, key: 0, len: 0 };
        let (kind, region, window) = match self {
            Note::Ring(window, regions) => (RING, regions, window),
            Note::Want(region) => (WANT, region, nowhere),
            Note::Region(region, window) => (REGION, region, window),
            Note::GiveBack(region) => (GIVE_BACK, region, nowhere),
        };
        let (region, key) = (U32::new(region), U32::new(window.key));
        let (address, len) = (U64::new(window.address), U64::new(window.len));
        Card { magic: MAGIC, kind, zero: [0; 3], region, key, address, len }
    }

    /// Reads a note that the peer sent.
    pub(super) fn parse(bytes: &[u8]) -> Result<Note, FrameFault> {
        let card = Card::read_from_bytes(bytes).map_err(|_| FrameFault::BadCard)?;
        let window = Window { address: card.address.get(), key: card.key.get(), len: card.len.get() };
        let note = match card.kind {
            RING => Note::Ring(window, card.region.get()),
            WANT => Note::Want(card.region.get()),
            REGION => Note::Region(card.region.get(), window),
            GIVE_BACK => Note::GiveBack(card.region.get()),
            _ => return Err(FrameFault::BadCard),
        };
        let fits = window.address.checked_add(window.len).is_some();
        let ring_fits = !matches!(note, Note::Ring(ring, _) if ring.len == 0 || ring.len > RING_BYTES_MAX);
        // There is one way to say a thing: what the kind does not use is zero.
        let canonical = note.card().as_bytes() == bytes;
        if fits && ring_fits && canonical { Ok(note) } else { Err(FrameFault::BadCard) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Window = Window { address: 0x7f00_0000_1000, key: 77, len: 65536 };

    #[test]
    fn notes_survive_the_wire_and_no_byte_of_a_card_is_free() {
        let notes = [Note::Ring(WINDOW, 3), Note::Want(9), Note::Region(9, WINDOW), Note::GiveBack(9)];
        for note in notes {
            let card = note.card();
            assert_eq!(Note::parse(card.as_bytes()), Ok(note));
            for bit in 0..CARD_BYTES * 8 {
                let mut bytes = card.as_bytes().to_vec();
                bytes[bit / 8] ^= 1 << (bit % 8);
                assert_ne!(Note::parse(&bytes), Ok(note), "bit {bit} of {note:?} means nothing");
            }
        }
        assert_eq!(Note::parse(&[0; 31]), Err(FrameFault::BadCard));
        let endless = Note::Ring(Window { address: u64::MAX, ..WINDOW }, 0);
        assert_eq!(Note::parse(endless.card().as_bytes()), Err(FrameFault::BadCard));
        let empty = Note::Ring(Window { len: 0, ..WINDOW }, 0);
        assert_eq!(Note::parse(empty.card().as_bytes()), Err(FrameFault::BadCard));
    }

    #[test]
    fn immediates_survive_the_wire() {
        for immediate in [Immediate::Bytes(1), Immediate::Bytes(1 << 30), Immediate::Taken(0)] {
            assert_eq!(Immediate::from_wire(immediate.to_wire()), immediate);
        }
    }

    #[test]
    fn credit_never_goes_back_or_beyond_what_was_sent() {
        assert_eq!(total_of(low_bits(700), 500, 900), Ok(700));
        assert_eq!(total_of(low_bits(500), 500, 900), Ok(500));
        assert_eq!(total_of(low_bits(901), 500, 900), Err(FrameFault::BadCredit));
        assert_eq!(total_of(low_bits(499), 500, 900), Err(FrameFault::BadCredit));
        let around = (1_u64 << 31) - 10;
        assert_eq!(total_of(low_bits(around + 30), around, around + 100), Ok(around + 30));
    }
}
