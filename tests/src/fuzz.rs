//! Fuzz bodies for the control side: what must hold for any bytes at all that a peer sends. Those of the lanes are
//! in `vmferry_datapath::fuzz`, beside their parser.
//!
//! `cargo fuzz` needs a nightly toolchain and this project builds with a stable one, so there is no `fuzz/` folder of
//! libFuzzer targets. Instead each body is a plain function over bytes, and `tests/fuzz.rs` feeds it: seeded random
//! bytes, and mutations of a corpus that is made by the real encoders. A body panics where a law is broken; whoever
//! has a nightly toolchain can call the same functions from `fuzz_target!`.
//!
//! What must never happen: a panic or an allocation on a number that the peer sent.

use vmferry::door::LaneHello;
use vmferry_session::{
    AbortReason, BUFFER_BYTES_MAX, Decoder, LANES_MAX, MESSAGE_BYTES_MAX, Message, Offer, TargetTerms,
    encode, negotiate,
};

use crate::world::Dice;

/// The control channel's decoder: whatever arrives, cut at any place, it ends in messages, in silence or in one
/// error, it says the same however the bytes were cut, and what it accepts can be written and read again.
pub fn control_bytes(bytes: &[u8]) {
    let whole = decode(bytes.chunks(bytes.len().clamp(1, BUFFER_BYTES_MAX)));
    let in_bits = decode(bytes.chunks(7));
    assert_eq!(whole, in_bits, "the same bytes, cut differently, say something else");
    for message in &whole.0 {
        let again = encode(message)
            .unwrap_or_else(|error| panic!("{message:?} was read and cannot be written: {error}"));
        assert!(again.len() <= MESSAGE_BYTES_MAX + 4);
        assert_eq!(decode([&again[..]].into_iter()).0, std::slice::from_ref(message));
        check_sentences(message);
    }
}

/// Everything that was decoded, and whether it ended in an error.
fn decode<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Message>, bool) {
    let (mut decoder, mut messages) = (Decoder::default(), Vec::new());
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.next_message() {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break,
                Err(_) => return (messages, true),
            }
        }
    }
    (messages, false)
}

/// No control character of a peer reaches a terminal.
fn check_sentences(message: &Message) {
    let (Message::Refuse(reason) | Message::Abort(reason) | Message::NeverRan { reason, .. }) = message
    else {
        return;
    };
    assert!(!reason.to_string().chars().any(char::is_control));
    assert!(reason.sentence().len() <= AbortReason::SENTENCE_BYTES_MAX);
}

/// Negotiation over an offer that a peer made up: a refusal in a sentence, or an agreement that the offer allows.
pub fn negotiation(offer: &Offer, terms: &TargetTerms) {
    match negotiate(offer, terms) {
        Err(reason) => assert!(!reason.sentence().is_empty()),
        Ok(agreement) => {
            vmferry_session::check_answer(offer, &agreement)
                .unwrap_or_else(|error| panic!("an agreement that the source would not take: {error}"));
            assert!((1..=LANES_MAX).contains(&agreement.lanes));
            assert_eq!(offer.guest.layout, terms.guest.layout);
        }
    }
}

/// The door's first look at a lane connection: what it takes for a greeting, it would have said in the same bytes.
pub fn lane_greeting(bytes: &[u8]) {
    let Some(first) = bytes.first_chunk() else { return };
    if let Some(hello) = LaneHello::parse(first) {
        assert_eq!(hello.to_bytes(), *first, "two greetings say the same thing");
    }
}

/// Damages bytes as the dice will have it: flips, cuts, repeats, inserts, and the numbers that break parsers.
pub fn mutate(bytes: &mut Vec<u8>, dice: &mut Dice) {
    const NUMBERS: [u64; 8] = [0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFF_FFFF, u32::MAX as u64, u64::MAX];
    for _ in 0..=dice.below(4) {
        let at = dice.index(bytes.len());
        match dice.below(7) {
            _ if bytes.is_empty() => bytes.push(byte(dice)),
            0 => bytes[at] ^= 1 << dice.below(8),
            1 => bytes[at] = byte(dice),
            2 => bytes.truncate(at),
            3 => bytes.insert(at, byte(dice)),
            4 => {
                bytes.remove(at);
            }
            5 => {
                let piece: Vec<u8> = bytes[at..].iter().take(dice.index(64)).copied().collect();
                bytes.splice(at..at, piece);
            }
            _ => {
                let number = NUMBERS[dice.index(NUMBERS.len())].to_le_bytes();
                let width = [1, 2, 4, 8][dice.index(4)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number[..width]);
            }
        }
    }
}

/// Bytes of no meaning.
pub fn noise(dice: &mut Dice, len_max: u64) -> Vec<u8> {
    (0..dice.below(len_max)).map(|_| byte(dice)).collect()
}

fn byte(dice: &mut Dice) -> u8 {
    u8::try_from(dice.below(256)).unwrap_or(0)
}
