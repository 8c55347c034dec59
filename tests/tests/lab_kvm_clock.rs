//! A Linux guest's own clock across a move, against its host's: source and target are on one host, so one clock judges both.

use std::time::{Duration, Instant};

use vmferry_rig::{Console, MicroVmGuest};
use vmferry_tests::command::{receive, send};
use vmferry_workload::Plan;

const RAM_BYTES: u64 = 160 << 20;
const PLAIN: [&str; 1] = ["--insecure-plaintext"];
/// A digest of all memory on both sides makes the blackout long, and the state old.
const WORDS: [&str; 6] =
    ["--insecure-plaintext", "--downtime-limit", "20s", "--on-no-converge", "force", "--verify"];
/// The guest tells milliseconds, the test asks over an emulated serial line, and a state's last way is emulated too.
const LAG_MAX: Duration = Duration::from_millis(150);

#[expect(clippy::disallowed_methods, reason = "a test measures a real machine")]
fn now() -> Instant {
    Instant::now()
}

/// The host's clock less the guest's: at least and at most, by the answers that took the least time.
fn offset(console: &mut Console, began: Instant) -> (Duration, Duration) {
    let mut bounds = (Duration::ZERO, Duration::MAX);
    for _ in 0..40 {
        let asked = began.elapsed();
        let uptime = Duration::from_millis(console.status().expect("the guest answers").uptime_ms);
        let answered = began.elapsed();
        // It was read between the two, and cut to a whole millisecond.
        bounds.0 = bounds.0.max((asked + ZERO).saturating_sub(uptime + Duration::from_millis(1)));
        bounds.1 = bounds.1.min((answered + ZERO).saturating_sub(uptime));
    }
    bounds
}

/// The guest was up for a while when the test began: what is compared must not be negative.
const ZERO: Duration = Duration::from_secs(3600);

#[test]
fn a_guests_clock_goes_on_through_a_move_by_the_time_that_passed() {
    let plan: Plan = "pages=256,set=64,pattern=zipf-hot,rate=50,zero=100".parse().expect("a plan");
    let recipe = MicroVmGuest::new(RAM_BYTES, plan).expect("the lab has a guest kernel").without_beat_port();
    let mut source = recipe.boot("clock-a").unwrap_or_else(|error| panic!("no boot: {error}"));
    let mut target = recipe.await_incoming("clock-b").unwrap_or_else(|error| panic!("no start: {error}"));
    let began = now();
    let before = offset(source.console(), began);
    let (receiving, address) = receive(&target.spec(), &PLAIN, "");
    let sent = send(&source.spec(), &address, &WORDS, "").done();
    let received = receiving.done();
    let notes = &sent.report["notes"];
    assert_eq!((sent.code(), received.code()), (0, 0), "{}\n{}\n{notes}", sent.stderr, received.stderr);
    let report = target.console().verify().unwrap_or_else(|error| panic!("{error}: {}", target.log()));
    assert!(report.is_clean(), "{report}");
    let after = offset(target.console(), began);
    let blackout = sent.report["blackout_ms"].as_f64().unwrap_or_default();
    let (least, most) = (after.0.saturating_sub(before.1), after.1.saturating_sub(before.0));
    println!("lab: {} {notes}", sent.report["ram"]);
    println!(
        "\nlab: {blackout:.0} ms away; the guest's clock came {} to {} ms too late",
        least.as_millis(),
        most.as_millis()
    );
    assert!(after.1 >= before.0, "its clock jumped ahead: {before:?}, then {after:?}");
    assert!(least <= LAG_MAX, "its clock lags by {least:?} at least");
}
