//! A target, event by event: how old the VMM's state is when it is loaded, and whom it stays for after its end.

#![expect(clippy::unwrap_used, reason = "a test: a panic is its failure")]

#[path = "shared/facts.rs"]
mod facts;

use std::time::Duration;

use facts::guest;
use vmferry_session::*;

/// Of the newest version on both sides: an older one tells no age.
fn offer() -> Offer {
    Offer { versions: versions_for(&guest()), ..facts::offer() }
}

fn terms() -> TargetTerms {
    TargetTerms { versions: VERSIONS.to_vec(), ..facts::terms() }
}

const fn second(number: u64) -> Duration {
    Duration::from_secs(number)
}

/// A target that was told to load, and what it was told. The lanes are awaited from 10 s on, Final comes at 13 s, the last
/// page at 14 s.
fn loading(told: Option<u64>) -> (TargetSession, VacantToken, Duration) {
    let limits = Limits::for_move(None, 1 << 20, false);
    let mut session = TargetSession::listen(VacantToken::claim(), terms(), limits, second(0));
    let totals = FinalTotals { lanes: vec![], state_bytes: 1, digest: None, state_age_us: told };
    session.handle(TargetEvent::Message(Message::Offer(Box::new(offer()))), second(9));
    session.handle(TargetEvent::Prepared, second(10));
    session.handle(TargetEvent::LanesAccepted, second(11));
    session.handle(TargetEvent::Message(Message::Final(totals)), second(13));
    let complete = TargetEvent::RamComplete { state_bytes: 1, digest: None, complete_us: 0 };
    let actions = session.handle(complete, second(14));
    let load =
        |action| if let TargetAction::LoadState(guest, age) = action { Some((guest, age)) } else { None };
    let (guest, age) = actions.into_iter().find_map(load).unwrap();
    (session, guest, age)
}

#[test]
fn the_state_is_as_old_as_both_sides_know_and_no_older_than_the_lanes() {
    let age_at_load = |told| loading(told).2;
    assert_eq!(age_at_load(Some(250_000)), Duration::from_millis(1250));
    assert_eq!(age_at_load(None), second(1), "an older source tells nothing");
    assert_eq!(age_at_load(Some(u64::MAX)), second(4), "a peer that lies");
}

/// A target that has said Ready, then `ends`, and threw away what it had.
fn discarded(ends: TargetEvent) -> TargetSession {
    let (mut session, guest, _) = loading(None);
    let loaded =
        TargetEvent::StateLoaded { guest: guest.loaded(), load_us: 0, devices: DeviceTimes::default() };
    session.handle(loaded, second(15));
    session.handle(ends, second(16));
    session.handle(TargetEvent::Discarded, second(17));
    session
}

#[test]
fn a_source_that_called_the_move_off_has_nothing_left_to_ask() {
    let abort = || Message::Abort(AbortReason::new(AbortKind::Cancelled, "cancelled"));
    let over = |session: &TargetSession| matches!(session.outcome(), Some(TargetOutcome::NeverRan { .. }));
    assert!(over(&discarded(TargetEvent::Message(abort()))));
    // Called off here, the source may be in doubt: it is waited for, until it says that it knows.
    let mut session = discarded(TargetEvent::Cancel);
    assert!(!over(&session));
    session.handle(TargetEvent::Message(abort()), second(18));
    assert!(over(&session));
}
