//! The parsers over a corpus and over seeded noise.

use vmferry_datapath::frame::HEADER_BYTES;
use vmferry_datapath::fuzz;

const ROUNDS: u64 = 20_000;

#[test]
fn the_seeds_are_what_an_honest_host_sends() {
    for piece in [1, 63, 64, 65, 5000, usize::MAX] {
        assert_eq!(
            fuzz::plain_stream(&fuzz::seed_stream(false), piece),
            fuzz::SEED_RECORDS,
            "in pieces of {piece}"
        );
    }
    assert_eq!(fuzz::sealed_stream(&fuzz::seed_stream(true)), fuzz::SEED_RECORDS);
}

#[test]
fn mutated_headers_say_one_thing_or_nothing() {
    let seed = fuzz::seed_stream(false);
    for round in 0..ROUNDS * 5 {
        let mut state = round;
        let at = usize::try_from(round).unwrap() % 9 * HEADER_BYTES;
        fuzz::header(&fuzz::mutate(&seed[at.min(seed.len() - HEADER_BYTES)..], &mut state));
    }
}

#[test]
fn mutated_streams_are_refused_and_never_reach_too_far() {
    let seed = fuzz::seed_stream(false);
    for round in 0..ROUNDS {
        let mut state = round << 32;
        let bytes = fuzz::mutate(&seed, &mut state);
        let piece = 1 + usize::try_from(state % 9000).unwrap();
        // In one piece or in many, the same records are found.
        assert_eq!(
            fuzz::plain_stream(&bytes, piece),
            fuzz::plain_stream(&bytes, usize::MAX),
            "round {round}"
        );
    }
}

#[test]
fn a_mutated_sealed_stream_opens_only_what_is_unchanged() {
    let seed = fuzz::seed_stream(true);
    for round in 0..ROUNDS / 4 {
        let mut state = round << 16;
        let bytes = fuzz::mutate(&seed, &mut state);
        let same = bytes.iter().zip(&seed).take_while(|(a, b)| a == b).count();
        let opened = fuzz::sealed_stream(&bytes);
        assert_eq!(opened, fuzz::sealed_stream(&seed[..same]), "a changed record opened in round {round}");
    }
}

#[test]
fn noise_is_no_credit() {
    // From the second record on: the first, a zero run, is one changed byte away from a credit.
    let seed = fuzz::seed_stream(false).split_off(HEADER_BYTES);
    let mut state = 77;
    for _ in 0..ROUNDS {
        let bytes = fuzz::mutate(&seed, &mut state);
        assert_eq!(fuzz::credit(&bytes), None, "a chunk became a credit");
    }
}
