//! What passed-through devices do to the prediction, to the decision when to switch over, and to negotiation.

#![expect(clippy::unwrap_used, reason = "a test: a panic is its failure")]

#[path = "shared/facts.rs"]
mod facts;

use std::collections::BTreeMap;
use std::time::Duration;

use vmferry_datapath::{ByteLen, PageCount, RamBlock, RamLayout};
use vmferry_session::*;

const MIB: u64 = 1 << 20;
const LIMIT: Duration = Duration::from_millis(300);

fn converge() -> Converge {
    let plan = ConvergePlan { downtime_limit: LIMIT, on_no_converge: OnNoConverge::Abort };
    Converge::new(plan, Predictor::new(Priors::PROCESS, &History::default()))
}

/// A round of an idle guest over a link of 100 pages a millisecond.
fn round(round: u32, pinned: ByteLen) -> RoundReport {
    let sent = if round == 1 { 100_000 } else { 2_000 };
    RoundReport {
        round,
        since_last_scan: Duration::from_millis(100),
        scan: Duration::from_micros(300),
        sent: PageCount(sent),
        dirty: PageCount(sent),
        pinned: PageCount(pinned.0 / 4096),
        sending: Duration::from_millis(sent / 100),
        ..RoundReport::default()
    }
}

fn device(name: &str, expected: u64, pinned: u64) -> DeviceReport {
    DeviceReport {
        name: name.into(),
        pre_copies: true,
        expected: ByteLen(expected),
        at_most: ByteLen(expected + expected / 20),
        pinned: ByteLen(pinned),
        has_stream: true,
    }
}

#[test]
fn what_a_device_pins_is_in_the_forecast_and_named_with_its_price() {
    let mut converge = converge();
    let devices = [device("eth1", 1000, 512 * MIB)];
    let mut last = None;
    for number in 1..8 {
        converge.devices_seen(&devices);
        last = Some(converge.round_done(&round(number, ByteLen(512 * MIB))));
    }
    let Decision { next, forecast } = last.unwrap();
    // 131072 pages at 100 a millisecond.
    let pinned = forecast.devices[0].pinned;
    assert!(pinned.contains(1310.0) && pinned.p50_ms > 1000.0, "{pinned:?}");
    assert!(forecast.total.p50_ms > 1000.0, "{:?}", forecast.total);
    let said = forecast.devices[0].sentences();
    assert!(said[0].starts_with("eth1 pins 512 MiB: adds "), "{said:?}");
    let Next::GiveUp(why) = next else { panic!("{next:?}") };
    assert!(why.contains("eth1 pins 512 MiB: adds"), "{why}");
}

#[test]
fn a_device_is_pre_copied_for_as_long_as_that_makes_it_smaller_and_not_longer() {
    let mut converge = converge();
    let mut left = 1024 * MIB;
    for number in 1..40 {
        converge.devices_seen(&[device("gpu0", left, 0)]);
        let next = converge.round_done(&round(number, ByteLen(0))).next;
        assert_eq!(next, Next::Round, "round {number}, {left} bytes left");
        left -= left / 100;
    }
    let stuck = (40..50).find_map(|number| {
        converge.devices_seen(&[device("gpu0", left, 0)]);
        match converge.round_done(&round(number, ByteLen(0))).next {
            Next::GiveUp(why) => Some(why),
            Next::Round | Next::Switchover | Next::Throttle { .. } => None,
        }
    });
    let why = stuck.unwrap();
    assert!(why.contains("gpu0 has ") && why.contains("of state left: adds"), "{why}");
}

#[test]
fn a_device_that_is_small_enough_is_no_hindrance_and_has_a_term() {
    let mut converge = converge();
    let decisions = (1..30).map(|number| {
        converge.devices_seen(&[device("a", MIB, 0), device("b", 2 * MIB, 0)]);
        converge.round_done(&round(number, ByteLen(0)))
    });
    let last = decisions.into_iter().find(|decision| decision.next != Next::Round).unwrap();
    assert_eq!(last.next, Next::Switchover);
    let devices = last.forecast.terms[&Term::Devices];
    // 3 MiB are 768 pages, 7.7 ms; and a load.
    assert!(devices.contains(9.0), "{devices:?}");
}

#[test]
fn a_load_that_was_seen_is_expected_again() {
    let record = MoveRecord {
        forecast: Forecast::default(),
        measured_ms: BTreeMap::new(),
        devices: vec![DeviceRecord { name: "gpu0".into(), load_ms: 80.0, ..DeviceRecord::default() }],
        blackout_ms: 0.0,
    };
    let mut history = History::default();
    (0..20).for_each(|_| history.push(record.clone()));
    let mut predictor = Predictor::new(Priors::PROCESS, &history);
    predictor.observe_devices(&[device("gpu0", 0, 0), device("other", 0, 0)]);
    let devices = predictor.forecast().devices;
    assert!((50.0..120.0).contains(&devices[0].state.p50_ms), "{:?}", devices[0]);
    assert!(devices[1].state.p50_ms < 20.0, "{:?}", devices[1]);
}

fn guest(devices: &[&str]) -> GuestFacts {
    let block = RamBlock { name: "m0".into(), len: ByteLen(MIB), page_bytes: 4096 };
    let identity = |name: &&str| DeviceIdentity { name: (*name).into(), model: "mtty-2".into() };
    let facts = device_facts(&devices.iter().map(identity).collect::<Vec<_>>());
    let layout = RamLayout::new(vec![block]).unwrap();
    GuestFacts { kind: "kvm".into(), name: "a".into(), facts, layout }
}

fn offer(guest: GuestFacts, versions: Vec<u16>) -> Offer {
    Offer { versions, guest, ..facts::offer() }
}

fn terms(guest: GuestFacts, versions: Vec<u16>) -> TargetTerms {
    TargetTerms { versions, guest, ..facts::terms() }
}

/// As a peer of version 1 states it: it knows nothing of devices.
fn old_guest() -> GuestFacts {
    GuestFacts { facts: BTreeMap::new(), ..guest(&[]) }
}

#[test]
fn without_devices_an_old_peer_is_as_good_as_a_new_one_on_either_side() {
    let plain = guest(&[]);
    let to_old = negotiate(&offer(plain.clone(), versions_for(&plain)), &terms(old_guest(), vec![1]));
    assert_eq!(to_old.unwrap().version, 1);
    let from_old = negotiate(&offer(old_guest(), vec![1]), &terms(plain.clone(), VERSIONS.to_vec()));
    assert_eq!(from_old.unwrap().version, 1);
    let both_new = negotiate(&offer(plain.clone(), versions_for(&plain)), &terms(plain, VERSIONS.to_vec()));
    assert_eq!(both_new.unwrap().version, VERSION);
}

#[test]
fn with_devices_an_old_peer_is_refused_in_a_sentence_that_says_what_to_do() {
    let devices = guest(&["eth1"]);
    assert_eq!(versions_for(&devices), VERSIONS[1..]);
    let to_old = negotiate(&offer(devices.clone(), versions_for(&devices)), &terms(old_guest(), vec![1]));
    let why = to_old.unwrap_err();
    assert!(why.sentence().contains("install the same vmferry on both hosts"), "{why}");
    let from_old = negotiate(&offer(old_guest(), vec![1]), &terms(devices, VERSIONS.to_vec()));
    let why = from_old.unwrap_err();
    assert!(why.sentence().contains("device `eth1`"), "{why}");
}
