//! What a lane carries: records of one fixed header, an optional body and a tag.
//!
//! ```text
//!   | header, 64 bytes, little-endian | body, 0 to 256 KiB | tag, 16 bytes (absent when plain) |
//!     authenticated with the body       sealed in place
//! ```
//!
//! Everything here came from the peer, and the peer is hostile. The parser is a pure function over a slice: it
//! allocates nothing, follows no length that it did not check first, and refuses every field that its kind does
//! not use. What must never happen: a length of the peer's that moves us past [`BODY_BYTES_MAX`].

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

mod fault;

pub use fault::FrameFault;

use crate::page::{CHUNK_BYTES, ChunkIndex, PAGE_BYTES};

/// Bytes of a record's header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of a sealed record's tag.
pub const TAG_BYTES: usize = 16;
/// The longest body of a record.
pub const BODY_BYTES_MAX: usize = CHUNK_BYTES;
/// The longest record.
pub const RECORD_BYTES_MAX: usize = HEADER_BYTES + BODY_BYTES_MAX + TAG_BYTES;
/// The first four bytes of every record.
pub const MAGIC: [u8; 4] = *b"vmfy";
/// The version of this format.
pub const VERSION: u8 = 1;

const FLAG_COMPRESSED: u16 = 1;

/// The header as it lies on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RecordHeader {
    /// [`MAGIC`].
    pub magic: [u8; 4],
    /// [`VERSION`].
    pub version: u8,
    /// A [`Kind`].
    pub kind: u8,
    /// Bit 0: the body is compressed. The others are zero.
    pub flags: U16,
    /// The record's place on its lane and direction, from 0: also the nonce it was sealed with.
    pub counter: U64,
    /// Chunk: its number. Zero run: the number of its first chunk. Credit: wire bytes taken in. State: its stream,
    /// 0 for the VMM's own state; a peer of protocol version 1 knows no other.
    pub chunk: U64,
    /// Chunk: the pages that this record tells about.
    pub present: U64,
    /// Chunk: those of them whose bytes are in the body; the others are zero.
    pub data: U64,
    /// The length of the body on the wire, tag not counted.
    pub body_len: U32,
    /// The length of the body before compression.
    pub plain_len: U32,
    /// Zero run: how many chunks of this lane. Credit: records taken in.
    pub amount: U64,
    /// Zero.
    pub reserved: U64,
}

const _: () = assert!(size_of::<RecordHeader>() == HEADER_BYTES);

/// What a record is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Pages of one chunk.
    Chunk = 1,
    /// Chunks that are zero all over.
    ZeroRun = 2,
    /// Bytes of a state stream; an empty one ends it.
    State = 3,
    /// Asks for a credit at once.
    Sync = 4,
    /// Nothing follows on this lane.
    End = 5,
    /// The other direction: what the receiver took in.
    Credit = 6,
    /// Pages of one chunk that were written past the records, straight into the guest.
    Placed = 7,
}

/// A record whose header holds together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// Pages of one chunk.
    Chunk(ChunkRecord),
    /// `count` chunks that are zero all over: `first`, and every lanes-th chunk after it.
    ZeroRun {
        /// The first chunk.
        first: ChunkIndex,
        /// How many chunks, at least one.
        count: u64,
    },
    /// Bytes of a state stream: 0 is the VMM's own state, the others are devices'.
    State {
        /// The stream; it travels on the lane of this number modulo the lanes.
        stream: u16,
        /// How many, 1 to [`BODY_BYTES_MAX`].
        len: u32,
    },
    /// A state stream is complete.
    StateEnd {
        /// The stream.
        stream: u16,
    },
    /// Asks for a credit at once.
    Sync,
    /// Nothing follows on this lane.
    End,
    /// What the receiver took in since the start.
    Credit(Credit),
    /// Pages of one chunk that lie in the guest already: agreed on beforehand, or refused.
    Placed {
        /// The chunk.
        chunk: ChunkIndex,
        /// The pages that the record tells about.
        present: u64,
        /// Those that were written, at least one; the others are zero.
        data: u64,
    },
}

/// Pages of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRecord {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// The pages that the record tells about, at least one.
    pub present: u64,
    /// Those whose bytes are in the body.
    pub data: u64,
    /// The body's length on the wire.
    pub body_len: u32,
    /// Whether the body is compressed.
    pub compressed: bool,
}

/// What a receiver took in since the start of its lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// Records.
    pub records: u64,
    /// Bytes on the wire.
    pub bytes: u64,
}

impl Kind {
    fn from_wire(kind: u8) -> Option<Kind> {
        [Kind::Chunk, Kind::ZeroRun, Kind::State, Kind::Sync, Kind::End, Kind::Credit, Kind::Placed]
            .into_iter()
            .find(|known| *known as u8 == kind)
    }
}

impl Record {
    /// Its kind.
    pub const fn kind(&self) -> Kind {
        match self {
            Record::Chunk(_) => Kind::Chunk,
            Record::ZeroRun { .. } => Kind::ZeroRun,
            Record::State { .. } | Record::StateEnd { .. } => Kind::State,
            Record::Sync => Kind::Sync,
            Record::End => Kind::End,
            Record::Credit(_) => Kind::Credit,
            Record::Placed { .. } => Kind::Placed,
        }
    }

    /// The header of this record. The counter is filled in by the sealer, which alone knows it.
    pub fn header(&self) -> RecordHeader {
        let mut header = RecordHeader {
            magic: MAGIC,
            version: VERSION,
            kind: self.kind() as u8,
            flags: U16::ZERO,
            counter: U64::ZERO,
            chunk: U64::ZERO,
            present: U64::ZERO,
            data: U64::ZERO,
            body_len: U32::ZERO,
            plain_len: U32::ZERO,
            amount: U64::ZERO,
            reserved: U64::ZERO,
        };
        match *self {
            Record::Chunk(chunk) => {
                header.flags = U16::new(if chunk.compressed { FLAG_COMPRESSED } else { 0 });
                header.chunk = U64::new(chunk.chunk.0);
                header.present = U64::new(chunk.present);
                header.data = U64::new(chunk.data);
                header.body_len = U32::new(chunk.body_len);
                header.plain_len = U32::new(chunk.plain_len());
            }
            Record::ZeroRun { first, count } => {
                header.chunk = U64::new(first.0);
                header.amount = U64::new(count);
            }
            Record::State { stream, len } => {
                header.chunk = U64::new(u64::from(stream));
                header.body_len = U32::new(len);
                header.plain_len = U32::new(len);
            }
            Record::Credit(credit) => {
                header.chunk = U64::new(credit.bytes);
                header.amount = U64::new(credit.records);
            }
            Record::Placed { chunk, present, data } => {
                header.chunk = U64::new(chunk.0);
                (header.present, header.data) = (U64::new(present), U64::new(data));
            }
            Record::StateEnd { stream } => header.chunk = U64::new(u64::from(stream)),
            Record::Sync | Record::End => {}
        }
        header
    }

    /// The length of the body on the wire.
    pub const fn body_len(&self) -> usize {
        match self {
            Record::Chunk(chunk) => chunk.body_len as usize,
            Record::State { len, .. } => *len as usize,
            Record::ZeroRun { .. }
            | Record::StateEnd { .. }
            | Record::Sync
            | Record::End
            | Record::Credit(_)
            | Record::Placed { .. } => 0,
        }
    }

    /// Bytes that travelled beside the record.
    pub(crate) fn placed_bytes(&self) -> u64 {
        match self {
            Record::Placed { data, .. } => u64::from(data.count_ones()) * 4096,
            Record::Chunk(_)
            | Record::ZeroRun { .. }
            | Record::State { .. }
            | Record::StateEnd { .. }
            | Record::Sync
            | Record::End
            | Record::Credit(_) => 0,
        }
    }
}

impl ChunkRecord {
    /// The length of the body before compression.
    pub const fn plain_len(&self) -> u32 {
        self.data.count_ones() * 4096
    }
}

const _: () = assert!(PAGE_BYTES == 4096);

impl RecordHeader {
    /// Reads a header that the peer sent: every field is checked, and none that is not used may be set.
    pub fn check(&self) -> Result<Record, FrameFault> {
        if self.magic != MAGIC {
            return Err(FrameFault::BadMagic);
        }
        if self.version != VERSION {
            return Err(FrameFault::BadVersion(self.version));
        }
        let kind = Kind::from_wire(self.kind).ok_or(FrameFault::BadKind(self.kind))?;
        if self.body_len.get() as usize > BODY_BYTES_MAX {
            return Err(FrameFault::TooLong(self.body_len.get()));
        }
        let record = match kind {
            Kind::Chunk => Record::Chunk(self.check_chunk()?),
            Kind::ZeroRun if self.amount == U64::ZERO => return Err(FrameFault::BadField("amount")),
            Kind::ZeroRun => {
                Record::ZeroRun { first: ChunkIndex(self.chunk.get()), count: self.amount.get() }
            }
            Kind::State if self.body_len == U32::ZERO => Record::StateEnd { stream: self.check_stream()? },
            Kind::State => Record::State { stream: self.check_stream()?, len: self.body_len.get() },
            Kind::Sync => Record::Sync,
            Kind::End => Record::End,
            Kind::Placed => self.check_placed()?,
            Kind::Credit => Record::Credit(Credit { records: self.amount.get(), bytes: self.chunk.get() }),
        };
        // Whatever the record does not use must be as we would have sent it: there is one way to say a thing.
        let canonical = RecordHeader { counter: self.counter, ..record.header() };
        if canonical == *self { Ok(record) } else { Err(FrameFault::BadField("unused part")) }
    }

    fn check_stream(&self) -> Result<u16, FrameFault> {
        u16::try_from(self.chunk.get()).map_err(|_| FrameFault::BadField("stream"))
    }

    fn check_placed(&self) -> Result<Record, FrameFault> {
        let (present, data) = (self.present.get(), self.data.get());
        if data == 0 || data & !present != 0 {
            return Err(FrameFault::BadField("page mask"));
        }
        Ok(Record::Placed { chunk: ChunkIndex(self.chunk.get()), present, data })
    }

    fn check_chunk(&self) -> Result<ChunkRecord, FrameFault> {
        let (present, data, body_len) = (self.present.get(), self.data.get(), self.body_len.get());
        let compressed = self.flags.get() == FLAG_COMPRESSED;
        let record = ChunkRecord { chunk: ChunkIndex(self.chunk.get()), present, data, body_len, compressed };
        if present == 0 || data & !present != 0 {
            return Err(FrameFault::BadField("page mask"));
        }
        let right = if compressed {
            body_len > 0 && body_len < record.plain_len()
        } else {
            body_len == record.plain_len()
        };
        if right { Ok(record) } else { Err(FrameFault::BadField("body length")) }
    }
}

/// A record at the start of what has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Framed {
    /// What it is.
    pub record: Record,
    /// Its place on the lane.
    pub counter: u64,
    /// Its length on the wire: header, body and tag.
    pub len: usize,
}

/// How many bytes the first record in what has arrived is short of, at least one: what a receiver may sleep for.
/// A header that is not there yet, or that would be refused, is short of one.
pub fn missing(arrived: &[u8], tag_bytes: usize) -> usize {
    let header = RecordHeader::ref_from_prefix(arrived).ok().and_then(|(header, _)| header.check().ok());
    let whole = header.map_or(0, |record| HEADER_BYTES + record.body_len() + tag_bytes);
    whole.saturating_sub(arrived.len()).max(1)
}

/// Finds the first record in what has arrived: `None` while it is not complete. The header is checked as soon as
/// it is there, so a bad one is refused without waiting for its body.
pub fn first_record(arrived: &[u8], tag_bytes: usize) -> Result<Option<Framed>, FrameFault> {
    let Ok((header, rest)) = RecordHeader::ref_from_prefix(arrived) else { return Ok(None) };
    let record = header.check()?;
    let tail = record.body_len() + tag_bytes;
    if rest.len() < tail {
        return Ok(None);
    }
    Ok(Some(Framed { record, counter: header.counter.get(), len: HEADER_BYTES + tail }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> [Record; 11] {
        let chunk = ChunkRecord {
            chunk: ChunkIndex(7),
            present: 0b111,
            data: 0b101,
            body_len: 8192,
            compressed: false,
        };
        [
            Record::Chunk(chunk),
            Record::Chunk(ChunkRecord { body_len: 77, compressed: true, ..chunk }),
            Record::ZeroRun { first: ChunkIndex(9), count: 4 },
            Record::State { stream: 0, len: 300 },
            Record::StateEnd { stream: 0 },
            Record::State { stream: 3, len: 300 },
            Record::StateEnd { stream: 3 },
            Record::Sync,
            Record::End,
            Record::Credit(Credit { records: 3, bytes: 4096 }),
            Record::Placed { chunk: ChunkIndex(7), present: 0b111, data: 0b101 },
        ]
    }

    #[test]
    fn every_record_survives_the_wire() {
        for record in records() {
            assert_eq!(record.header().check(), Ok(record));
        }
    }

    #[test]
    fn golden_bytes_of_version_1() {
        let header = RecordHeader { counter: U64::new(5), ..records()[0].header() };
        let fields: [&[u8]; 11] = [
            b"vmfy",
            &[1, 1],
            &[0, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0],
            &[7, 0, 0, 0, 0, 0, 0, 0],
            &[7, 0, 0, 0, 0, 0, 0, 0],
            &[5, 0, 0, 0, 0, 0, 0, 0],
            &[0, 32, 0, 0],
            &[0, 32, 0, 0],
            &[0; 8],
            &[0; 8],
        ];
        assert_eq!(header.as_bytes(), fields.concat());
    }

    #[test]
    fn the_vmms_state_has_the_bytes_of_version_1() {
        let fields: [&[u8]; 7] =
            [b"vmfy", &[1, 3], &[0; 10], &[0; 24], &[44, 1, 0, 0], &[44, 1, 0, 0], &[0; 16]];
        assert_eq!(Record::State { stream: 0, len: 300 }.header().as_bytes(), fields.concat());
        let fields: [&[u8]; 3] = [b"vmfy", &[1, 3], &[0; 58]];
        assert_eq!(Record::StateEnd { stream: 0 }.header().as_bytes(), fields.concat());
    }

    #[test]
    fn no_byte_of_a_header_is_free() {
        // Whatever single bit is flipped, the header is refused, or means something else.
        for record in records() {
            let honest = record.header();
            for bit in (0..HEADER_BYTES * 8).filter(|bit| !(64..128).contains(bit)) {
                let mut bytes = [0; HEADER_BYTES];
                bytes.copy_from_slice(honest.as_bytes());
                bytes[bit / 8] ^= 1 << (bit % 8);
                let changed = RecordHeader::read_from_bytes(&bytes).unwrap();
                assert_ne!(changed.check(), Ok(record), "bit {bit} of {record:?} means nothing");
            }
        }
    }

    #[test]
    fn a_record_is_found_only_when_it_is_whole() {
        let mut wire = records()[3].header().as_bytes().to_vec();
        wire.extend([9; 316]);
        for len in 0..wire.len() {
            assert_eq!(first_record(&wire[..len], 16), Ok(None));
            let short = missing(&wire[..len], 16);
            assert_eq!(short, if len < 64 { 1 } else { wire.len() - len }, "at {len}");
        }
        assert_eq!(first_record(&wire, 16).map(|found| found.map(|framed| framed.len)), Ok(Some(380)));
        let long = RecordHeader { body_len: U32::new(u32::MAX), ..records()[3].header() };
        assert_eq!(first_record(long.as_bytes(), 16), Err(FrameFault::TooLong(u32::MAX)));
        assert_eq!(missing(long.as_bytes(), 16), 1);
    }
}
