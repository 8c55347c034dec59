//! A Linux guest with two processors moves between two lab hosts while both work, and back, by the programs that an
//! operator runs: there with KVM's dirty bitmap, back with its rings.

use std::time::Duration;

use vmferry_guest::kvm::{MicroVmControl, MicroVmPhase};
use vmferry_rig::lab::{Host, Place};
use vmferry_rig::{MicroVmGuest, RunningMicroVm};
use vmferry_tests::command::{Running, send};
use vmferry_workload::Plan;

/// Debian's generic kernel wants it.
const RAM_BYTES: u64 = 160 << 20;
const PAGES: u64 = 1024;
const PLAINTEXT: &str = "--insecure-plaintext";

/// The same guest on both hosts; `dirty` is how its next move finds what it writes.
fn recipe(dirty: &str) -> MicroVmGuest {
    let plan = format!("pages={PAGES},set=256,pattern=zipf-hot,rate=200,zero=100");
    let plan: Plan = plan.parse().expect("a plan");
    let guest = MicroVmGuest::new(RAM_BYTES, plan).expect("the lab has a guest kernel");
    guest.words(&["--dirty", dirty, "--cpus", "2"]).without_beat_port()
}

/// Sends the guest to the other host; what it had written before is told there.
fn leave(place: &Place, guest: &mut RunningMicroVm, dirty: &str) {
    let before = guest.console().status().expect("the guest answers");
    assert!(before.writing && before.writes > 0, "{before:?}");
    assert_both_work(guest);
    let address = place.meet("receiving", "").expect("the target host");
    let words = [PLAINTEXT, "--downtime-limit", "5s", "--verify"];
    let done = send(&guest.spec(), &address, &words, "").done();
    assert_eq!(done.code(), 0, "{}", done.stderr);
    let blackout = done.report["blackout_ms"].as_f64().unwrap_or_default();
    println!("lab: moved by {dirty}: away {blackout:.0} ms, {} rounds", done.report["ram"]["rounds"]);
    let verdict = place.meet("moved", &before.writes.to_string()).expect("the target host");
    assert_eq!(verdict, "verified");
    assert!(ends_soon(guest), "the source's micro-VM was not retired");
}

fn ends_soon(guest: &mut RunningMicroVm) -> bool {
    (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        !guest.is_alive()
    })
}

/// Both processors take their turns, each is woken by its own timer and by the other, and no page of theirs is wrong.
fn assert_both_work(guest: &mut RunningMicroVm) {
    let first = guest.console().cpus().expect("the guest answers");
    assert_eq!((first.online.as_str(), first.wrong), ("0-1", 0), "{first:?}");
    let grown = |before: &[u64], now: &[u64]| {
        now.len() == 2 && before.iter().zip(now).all(|(before, now)| now > &(before + 3))
    };
    let mut now = first.clone();
    for _ in 0..200 {
        std::thread::sleep(Duration::from_millis(50));
        now = guest.console().cpus().expect("the guest answers");
        let all = [(&first.turns, &now.turns), (&first.timer, &now.timer), (&first.between, &now.between)];
        if now.wrong == 0 && all.iter().all(|(before, now)| grown(before, now)) {
            println!("lab: both processors work: {now:?}");
            return;
        }
    }
    panic!("a processor stands still: {first:?}, and later {now:?}");
}

/// Takes the guest in, and lets it prove itself.
fn arrive(place: &Place, name: &str, dirty: &str) -> RunningMicroVm {
    let mut guest = recipe(dirty).await_incoming(name).unwrap_or_else(|error| panic!("no start: {error}"));
    let (listen, spec) = (format!("tcp://{}:0", place.address), guest.spec());
    let mut receiving =
        Running::start(&["receive", "--listen", &listen, "--guest", &spec, "--json", PLAINTEXT], "");
    let line = receiving.wait_line("waiting for a guest on");
    place.meet("receiving", line.split(' ').next_back().unwrap_or_default()).expect("the source host");
    let done = receiving.done();
    assert_eq!(done.code(), 0, "{}", done.stderr);
    let phase = MicroVmControl::connect(name).expect("it runs").status().expect("it answers").phase;
    assert_eq!(phase, MicroVmPhase::Running);
    // The guest's own proof: every page has the version that its registers say, it works on, and its clock does.
    let report = guest.console().verify().unwrap_or_else(|error| panic!("{error}: {}", guest.log()));
    assert!(report.is_clean() && report.pages == PAGES, "{report}");
    let first = guest.console().status().expect("it answers");
    let gap = guest.console().gap().expect("it answers");
    println!("lab: {report}; {} ms away by its own clock", gap.gap_us / 1000);
    let on = (0..100).map(|_| {
        std::thread::sleep(Duration::from_millis(50));
        guest.console().status().expect("it answers")
    });
    let goes_on = on.into_iter().find(|now| now.writes > first.writes && now.beats > first.beats);
    assert!(goes_on.is_some_and(|now| now.uptime_ms > first.uptime_ms), "it stands still since {first:?}");
    assert_both_work(&mut guest);
    let before = place.meet("moved", "verified").expect("the source host").parse::<u64>().expect("a number");
    assert!(first.writes >= before, "{} writes here, {before} before the move", first.writes);
    guest
}

#[test]
fn a_linux_guest_with_two_processors_moves_there_by_its_bitmap_and_back_by_its_rings() {
    let place = Place::find().expect("the lab");
    match place.host {
        Host::A => {
            let mut guest = recipe("bitmap").boot("there").unwrap_or_else(|error| panic!("no boot: {error}"));
            leave(&place, &mut guest, "bitmap");
            arrive(&place, "back", "ring");
        }
        Host::B => {
            let mut guest = arrive(&place, "there", "ring");
            leave(&place, &mut guest, "ring");
        }
    }
}
