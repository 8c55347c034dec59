//! Fuzz bodies for everything that a peer can reach, as plain functions over bytes.
//!
//! There is no fuzzer behind them: tests run them over a corpus and over seeded noise, and any fuzzer can. Each
//! returns when the bytes are used up and panics when a law is broken; they never fail on bad bytes, because
//! refusing those is the law.

use zerocopy::{FromBytes, IntoBytes};

use crate::frame::{
    BODY_BYTES_MAX, ChunkRecord, Credit, Framed, HEADER_BYTES, Record, RecordHeader, first_record,
};
use crate::page::ChunkIndex;
use crate::seal::{Cipher, LaneKey, Opener, Provider, Sealer, Source};

/// One header: whatever the bytes are, a header that is accepted says one thing, and says it in one way.
pub fn header(bytes: &[u8]) {
    let Ok((header, _)) = RecordHeader::ref_from_prefix(bytes) else { return };
    let Ok(record) = header.check() else { return };
    assert!(record.body_len() <= BODY_BYTES_MAX, "a body longer than any honest one was accepted");
    let again = RecordHeader { counter: header.counter, ..record.header() };
    assert_eq!(again.as_bytes(), header.as_bytes(), "two headers say the same thing");
    if let Record::Chunk(chunk) = record {
        assert!(chunk.present != 0 && chunk.data & !chunk.present == 0, "a page mask contradicts itself");
        assert!(chunk.body_len <= chunk.plain_len(), "a body grew");
    }
}

/// A whole stream on a plain lane, delivered in pieces: each record is found where the last one ended, in the same
/// place however the pieces fall. Gives how many records were opened.
pub fn plain_stream(bytes: &[u8], piece: usize) -> usize {
    let Ok(mut opener) = Opener::new(Cipher::Plain, None) else { return 0 };
    let mut stream = bytes.to_vec();
    let (mut at, mut arrived, mut records) = (0, 0, 0);
    while arrived < stream.len() {
        arrived = stream.len().min(arrived + piece.max(1));
        while let Ok(Some(framed)) = first_record(&stream[at..arrived], opener.tag_bytes()) {
            assert!(
                framed.len >= HEADER_BYTES && framed.len <= arrived - at,
                "a record reaches past what arrived"
            );
            let Ok(body) = opener.open(&framed, &mut stream[at..arrived]) else { return records };
            assert_eq!(body.len(), framed.record.body_len());
            at += framed.len;
            records += 1;
        }
    }
    records
}

/// A stream on a sealed lane: nothing that was not sealed with the key may ever open. Gives how many records did.
pub fn sealed_stream(bytes: &[u8]) -> usize {
    let key = LaneKey::from_bytes(FUZZ_KEY);
    let Ok(mut opener) = Opener::new(Cipher::Aes256Gcm(Provider::AwsLc), Some(key)) else { return 0 };
    let (mut stream, mut at, mut records) = (bytes.to_vec(), 0, 0);
    while let Ok(Some(framed)) = first_record(&stream[at..], opener.tag_bytes()) {
        if opener.open(&framed, &mut stream[at..]).is_err() {
            return records;
        }
        at += framed.len;
        records += 1;
    }
    records
}

/// A credit as the sender reads it: only a credit record is one.
pub fn credit(bytes: &[u8]) -> Option<Credit> {
    match first_record(bytes, 0) {
        Ok(Some(Framed { record: Record::Credit(credit), .. })) => Some(credit),
        Ok(_) | Err(_) => None,
    }
}

const FUZZ_KEY: [u8; 32] = [0x42; 32];

/// An honest stream with a record of each kind, as a seed: plain, or sealed with the key of [`sealed_stream`].
pub fn seed_stream(sealed: bool) -> Vec<u8> {
    let (cipher, key) = match sealed {
        true => (Cipher::Aes256Gcm(Provider::AwsLc), Some(LaneKey::from_bytes(FUZZ_KEY))),
        false => (Cipher::Plain, None),
    };
    let chunk =
        ChunkRecord { chunk: ChunkIndex(3), present: 0b111, data: 0b101, body_len: 8192, compressed: false };
    let records = [
        Record::ZeroRun { first: ChunkIndex(0), count: 2 },
        Record::Chunk(chunk),
        Record::Chunk(ChunkRecord { body_len: 100, compressed: true, ..chunk }),
        Record::State { stream: 2, len: 300 },
        Record::StateEnd { stream: 0 },
        Record::Placed { chunk: ChunkIndex(4), present: 0b11, data: 0b1 },
        Record::Sync,
        Record::Credit(Credit { records: 5, bytes: 4000 }),
        Record::End,
    ];
    let mut stream = Vec::new();
    let Ok(mut sealer) = Sealer::new(cipher, key) else { return stream };
    let mut buffer = vec![0x33; crate::frame::RECORD_BYTES_MAX];
    for record in records {
        if let Ok(len) = sealer.seal(&record, Source::InPlace, &mut buffer) {
            stream.extend_from_slice(&buffer[..len]);
        }
    }
    stream
}

/// How many records [`seed_stream`] has.
pub const SEED_RECORDS: usize = 9;

/// Changes `seed` as a fuzzer would: a few bytes flipped, cut, doubled or overwritten, all following from `state`.
pub fn mutate(seed: &[u8], state: &mut u64) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=step(state, 4) {
        if bytes.is_empty() {
            return bytes;
        }
        let at = step(state, bytes.len());
        let end = (at + 1 + step(state, 200)).min(bytes.len());
        match step(state, 5) {
            0 => bytes[at] ^= 1 << step(state, 8),
            1 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][step(state, 5)],
            2 => drop(bytes.drain(at..end)),
            3 => bytes.extend_from_within(at..end),
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// A number below `limit`, by SplitMix64.
fn step(state: &mut u64, limit: usize) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    usize::try_from((z ^ (z >> 31)) % limit.max(1) as u64).unwrap_or(0)
}
