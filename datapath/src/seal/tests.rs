//! The contract of every provider, and the two AES-GCM providers checked against each other.

use proptest::prelude::*;

use super::*;
use crate::frame::{BODY_BYTES_MAX, ChunkRecord, RECORD_BYTES_MAX, first_record};
use crate::testing::{filled_ram, noise};

const CIPHERS: [Cipher; 3] =
    [Cipher::Plain, Cipher::Aes256Gcm(Provider::AesGcm), Cipher::Aes256Gcm(Provider::AwsLc)];
const SEALED: [Cipher; 2] = [Cipher::Aes256Gcm(Provider::AesGcm), Cipher::Aes256Gcm(Provider::AwsLc)];

fn key(cipher: Cipher, byte: u8) -> Option<LaneKey> {
    (cipher != Cipher::Plain).then(|| LaneKey::from_bytes([byte; 32]))
}

fn sealer(cipher: Cipher) -> Sealer {
    Sealer::new(cipher, key(cipher, 3)).unwrap()
}

fn opener(cipher: Cipher) -> Opener {
    Opener::new(cipher, key(cipher, 3)).unwrap()
}

/// A sealed STATE record of this body.
fn state(sealer: &mut Sealer, body: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0; RECORD_BYTES_MAX];
    buffer[HEADER_BYTES..HEADER_BYTES + body.len()].copy_from_slice(body);
    let record = Record::State { stream: 0, len: u32::try_from(body.len()).unwrap() };
    let len = sealer.seal(&record, Source::InPlace, &mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

fn open(opener: &mut Opener, mut wire: Vec<u8>) -> Result<Vec<u8>, FrameFault> {
    let framed = first_record(&wire, opener.tag_bytes())?.ok_or(FrameFault::BadField("length"))?;
    opener.open(&framed, &mut wire).map(|body| body.to_vec())
}

#[test]
fn providers_agree_byte_for_byte_and_open_each_other() {
    for len in [1, 15, 16, 17, 4096, 65_536, BODY_BYTES_MAX] {
        let body = noise(7, len);
        let mut sealers = SEALED.map(sealer);
        for round in 0..3 {
            let wires = [0, 1].map(|n| state(&mut sealers[n], &body));
            assert!(wires[0] == wires[1], "providers differ at {len} bytes in round {round}");
        }
        for (from, to) in [(0, 1), (1, 0)] {
            let wire = state(&mut sealer(SEALED[from]), &body);
            assert!(open(&mut opener(SEALED[to]), wire).unwrap() == body);
        }
    }
}

#[test]
fn known_answer_of_the_wire() {
    // The same in every version: header, AES-256-GCM under key 03.., nonce 0, body "vmferry".
    let wire = state(&mut sealer(SEALED[1]), b"vmferry");
    let hash = blake3::hash(&wire).to_hex();
    assert_eq!(&hash[..16], GOLDEN_SEALED, "the sealed wire format changed: bump frame::VERSION");
}

const GOLDEN_SEALED: &str = "2f45b1f98de37cc7";

#[test]
fn guest_memory_seals_like_its_copy() {
    let ram = filled_ram(3, 64 + 5);
    for cipher in CIPHERS {
        for (chunk, pages) in [(0, u64::MAX), (0, 1), (0, 0xf0f0_0000_1111_8001), (1, 0b10101)] {
            let (chunk, len) = (ChunkIndex(chunk), pages.count_ones() * 4096);
            let record = Record::Chunk(ChunkRecord {
                chunk,
                present: pages,
                data: pages,
                body_len: len,
                compressed: false,
            });
            let mut direct = vec![0; RECORD_BYTES_MAX];
            let source = Source::Guest { ram: &ram, chunk, pages };
            let wire = sealer(cipher).seal(&record, source, &mut direct).unwrap();
            let mut copied = vec![0; RECORD_BYTES_MAX];
            assert_eq!(ram.gather(chunk, pages, &mut copied[HEADER_BYTES..]), len as usize);
            sealer(cipher).seal(&record, Source::InPlace, &mut copied).unwrap();
            assert!(direct == copied, "{cipher} differs on pages {pages:#x}");
            direct.truncate(wire);
            let mut pages_back = vec![0; len as usize];
            ram.gather(chunk, pages, &mut pages_back);
            assert!(open(&mut opener(cipher), direct).unwrap() == pages_back);
        }
    }
}

#[test]
fn a_source_of_the_wrong_length_is_refused() {
    let ram = filled_ram(3, 8);
    for cipher in CIPHERS {
        let record = Record::State { stream: 0, len: 8192 };
        for pages in [0b1, 0b111, 1 << 20] {
            let source = Source::Guest { ram: &ram, chunk: ChunkIndex(0), pages };
            let refused = sealer(cipher).seal(&record, source, &mut vec![0; RECORD_BYTES_MAX]);
            assert!(refused.is_err(), "{cipher} sealed {pages:#b}");
        }
    }
}

#[test]
fn replay_reorder_and_loss_are_refused_on_every_cipher() {
    for cipher in CIPHERS {
        let mut sealer = sealer(cipher);
        let wires: Vec<_> = (0..3).map(|n| state(&mut sealer, &[n; 100])).collect();
        let mut replayed = opener(cipher);
        open(&mut replayed, wires[0].clone()).unwrap();
        assert_eq!(
            open(&mut replayed, wires[0].clone()),
            Err(FrameFault::OutOfOrder { expected: 1, got: 0 })
        );
        assert_eq!(
            open(&mut replayed, wires[2].clone()),
            Err(FrameFault::OutOfOrder { expected: 1, got: 2 })
        );
        assert_eq!(
            open(&mut replayed, wires[1].clone()).unwrap(),
            [1; 100],
            "a refusal must not move the counter"
        );
    }
}

#[test]
fn a_renumbered_replay_is_forged() {
    for cipher in SEALED {
        let (mut sealer, mut opener) = (sealer(cipher), opener(cipher));
        let first = state(&mut sealer, &[1; 64]);
        open(&mut opener, first.clone()).unwrap();
        let mut again = first;
        again[8..16].copy_from_slice(&1_u64.to_le_bytes());
        assert_eq!(open(&mut opener, again), Err(FrameFault::Forged(1)));
    }
}

#[test]
fn another_key_and_a_missing_one_are_refused() {
    for cipher in SEALED {
        let wire = state(&mut sealer(cipher), &[1; 64]);
        let mut other = Opener::new(cipher, key(cipher, 4)).unwrap();
        assert_eq!(open(&mut other, wire), Err(FrameFault::Forged(0)));
        assert!(Sealer::new(cipher, None).is_err(), "a sealed lane without a key");
    }
    assert!(
        Sealer::new(Cipher::Plain, Some(LaneKey::from_bytes([1; 32]))).is_err(),
        "a plain lane with a key"
    );
}

#[test]
fn the_choice_measures_both() {
    let (best, rates) = fastest_provider();
    let rate = |p| rates.iter().find(|(provider, _)| *provider == p).unwrap().1;
    assert!(rate(Provider::AesGcm) > 0.0 && rate(Provider::AwsLc) > 0.0);
    assert!(rates.iter().all(|(_, other)| rate(best) >= *other));
}

proptest! {
    #[test]
    fn any_flipped_bit_is_refused(bit in 0_usize..(64 + 200 + 16) * 8, provider in 0_usize..2) {
        let mut wire = state(&mut sealer(SEALED[provider]), &noise(9, 200));
        wire[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(open(&mut opener(SEALED[provider]), wire).is_err());
    }
}
