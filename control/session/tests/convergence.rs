//! Convergence and prediction against simulated guests, whose truth is known.
//!
//! A simulated guest writes uniformly over a working set plus a hot set that it rewrites all the time; its host has
//! a rate and noise. The laws: forecasts are ordered and finite for any report whatsoever, moves end, the blackout
//! that was promised is kept, and nine of ten blackouts fall inside the predicted interval.

#![expect(clippy::unwrap_used, reason = "a test: a panic is its failure")]

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use vmferry_datapath::{ByteLen, PageCount};
use vmferry_session::*;

/// splitmix64, and normal deviates from it.
struct Dice(u64);

impl Dice {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (f64::from(u32::try_from((z ^ (z >> 31)) >> 32).unwrap()) + 0.5) / 4_294_967_296.0
    }

    fn normal(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// A time around `ms` whose logarithm varies by `spread`.
    fn time(&mut self, ms: f64, spread: f64) -> f64 {
        ms * (spread * self.normal()).exp()
    }
}

/// What a guest and its host are really like.
#[derive(Clone, Copy)]
struct Truth {
    pages: f64,
    hot: f64,
    working_set: f64,
    writes_per_ms: f64,
    pages_per_ms: f64,
    state_ms: f64,
    spread: f64,
}

const CALM: Truth = Truth {
    pages: 262_144.0,
    hot: 300.0,
    working_set: 40_000.0,
    writes_per_ms: 20.0,
    pages_per_ms: 250.0,
    state_ms: 10.0,
    spread: 0.25,
};

impl Truth {
    /// Distinct pages written in `ms`, hot ones left out.
    fn cold(&self, ms: f64, slowed: f64) -> f64 {
        self.working_set * (1.0 - (-self.writes_per_ms * slowed * ms / self.working_set).exp())
    }
}

fn pages(count: f64) -> PageCount {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a simulated count")]
    PageCount(count.max(0.0) as u64)
}

fn time(ms: f64) -> Duration {
    Duration::from_secs_f64(ms / 1e3)
}

/// One simulated move: rounds until the decision, then the blackout that really comes.
struct Sim {
    truth: Truth,
    dice: Dice,
    slowed: f64,
}

struct Moved {
    rounds: u32,
    end: Next,
    record: MoveRecord,
}

impl Sim {
    fn new(truth: Truth, seed: u64) -> Self {
        Self { truth, dice: Dice(seed), slowed: 1.0 }
    }

    fn run(&mut self, plan: ConvergePlan, history: &History) -> Moved {
        let mut converge = Converge::new(plan, Predictor::new(Priors::QEMU, history));
        let (mut since, mut held) = (0.0, 0.0);
        for round in 1.. {
            let report = self.round(round, since, &mut held);
            since = (report.scan + report.sending).as_secs_f64() * 1e3;
            let decision = converge.round_done(&report);
            match decision.next {
                Next::Round => assert!(round < 2000, "a move must end"),
                Next::Throttle { percent } => self.slowed = 1.0 - f64::from(percent) / 100.0,
                end @ (Next::Switchover | Next::GiveUp(_)) => {
                    let record = self.blackout(decision.forecast, since, held);
                    return Moved { rounds: round, end, record };
                }
            }
        }
        unreachable!()
    }

    fn round(&mut self, round: u32, since: f64, held: &mut f64) -> RoundReport {
        let truth = self.truth;
        let scan = self.dice.time(1.0, 0.2);
        let (dirty, sent) = if round == 1 {
            (truth.pages, truth.pages)
        } else {
            let cold = self.dice.time(truth.cold(since, self.slowed), 0.1).min(truth.working_set);
            let again = cold * cold / truth.working_set;
            // What was held back and not written again is sent, with what is new.
            let sent = cold - again + (*held - truth.hot - again).max(0.0);
            *held = truth.hot + again;
            (truth.hot + cold, sent)
        };
        let sending = 0.4 + sent / self.dice.time(truth.pages_per_ms, 0.1);
        RoundReport {
            round,
            since_last_scan: time(since),
            scan: time(scan),
            dirty: pages(dirty),
            sent: pages(sent),
            held: pages(*held),
            wire: ByteLen(pages(sent).0 * 4100),
            sending: time(sending),
            ..RoundReport::default()
        }
    }

    fn blackout(&mut self, forecast: Forecast, since: f64, held: f64) -> MoveRecord {
        let truth = self.truth;
        let left = held + self.dice.time(truth.cold(since, self.slowed), 0.1);
        let sending = 0.4 + left / self.dice.time(truth.pages_per_ms, 0.1);
        let spread = truth.spread;
        let measured_ms = BTreeMap::from([
            (Term::Stop, self.dice.time(4.0, spread)),
            (Term::Scan, self.dice.time(1.0, 0.2)),
            (Term::Pages, sending),
            (Term::Save, self.dice.time(truth.state_ms, spread)),
            (Term::Close, self.dice.time(1.5, spread)),
            (Term::Load, self.dice.time(truth.state_ms, spread)),
            (Term::Handover, self.dice.time(1.0, spread)),
            (Term::Run, self.dice.time(2.0, spread)),
        ]);
        // Something that no term knows of, on top.
        let blackout_ms = measured_ms.values().sum::<f64>() + self.dice.time(2.0, 0.5);
        MoveRecord { forecast, measured_ms, devices: Vec::new(), blackout_ms }
    }
}

fn plan(limit_ms: u64, on_no_converge: OnNoConverge) -> ConvergePlan {
    ConvergePlan { downtime_limit: Duration::from_millis(limit_ms), on_no_converge }
}

/// Moves in a row that learn from each other: how many of the last `counted` were inside?
fn coverage(truth: Truth, seed: u64, moves: usize, counted: usize) -> f64 {
    let mut history = History::default();
    let mut inside = 0;
    for number in 0..moves {
        let seed = seed.wrapping_mul(1_000_003).wrapping_add(u64::try_from(number).unwrap());
        let record = Sim::new(truth, seed).run(plan(300, OnNoConverge::Force), &history).record;
        if number >= moves - counted && record.forecast.total.contains(record.blackout_ms) {
            inside += 1;
        }
        history.push(record);
    }
    f64::from(inside) / f64::from(u32::try_from(counted).unwrap())
}

#[test]
fn nine_of_ten_blackouts_fall_inside_the_predicted_interval() {
    let busy = Truth { writes_per_ms: 150.0, hot: 5_000.0, ..CALM };
    let jittery = Truth { spread: 0.6, ..CALM };
    let steady = Truth { spread: 0.05, ..CALM };
    for (name, truth) in [("calm", CALM), ("busy", busy), ("jittery", jittery), ("steady", steady)] {
        let shares: Vec<f64> = (1..=4).map(|seed| coverage(truth, seed, 120, 100)).collect();
        let mean = shares.iter().sum::<f64>() / 4.0;
        println!("{name}: {shares:?}, mean {mean:.3}");
        assert!((0.85..=0.95).contains(&mean), "{name}: {shares:?}");
    }
}

#[test]
fn the_first_forecast_of_all_is_wide_enough() {
    let inside = (0..200).filter(|&seed| {
        let record = Sim::new(CALM, seed).run(plan(300, OnNoConverge::Abort), &History::default()).record;
        record.forecast.total.contains(record.blackout_ms)
    });
    assert!(inside.count() >= 170);
}

#[test]
fn experience_narrows_the_interval() {
    let mut history = History::default();
    let width = |record: &MoveRecord| record.forecast.total.p95_ms / record.forecast.total.p05_ms;
    let first = Sim::new(CALM, 1).run(plan(300, OnNoConverge::Abort), &history).record;
    for seed in 0..60 {
        history.push(Sim::new(CALM, seed).run(plan(300, OnNoConverge::Abort), &history).record);
    }
    let last = Sim::new(CALM, 99).run(plan(300, OnNoConverge::Abort), &history).record;
    assert!(width(&last) < 0.8 * width(&first), "{:?} then {:?}", first.forecast.total, last.forecast.total);
}

#[test]
fn a_calm_guest_switches_over_in_a_few_rounds() {
    let moved = Sim::new(CALM, 3).run(plan(300, OnNoConverge::Abort), &History::default());
    assert_eq!(moved.end, Next::Switchover);
    assert!(moved.rounds <= 5, "{} rounds", moved.rounds);
}

#[test]
fn an_idle_guest_needs_two_rounds() {
    let idle = Truth { hot: 5.0, writes_per_ms: 0.01, ..CALM };
    let moved = Sim::new(idle, 3).run(plan(300, OnNoConverge::Abort), &History::default());
    assert_eq!((moved.end, moved.rounds), (Next::Switchover, 2));
}

const FIERCE: Truth = Truth { working_set: 150_000.0, writes_per_ms: 2_000.0, ..CALM };

#[test]
fn a_fierce_guest_is_given_up_with_reason_and_remedy() {
    for seed in 0..6 {
        let moved = Sim::new(FIERCE, seed).run(plan(100, OnNoConverge::Abort), &History::default());
        let Next::GiveUp(why) = moved.end else { panic!("{:?}", moved.end) };
        for word in
            ["cannot fit 100 ms", "dirties", "carry", "hot", "--downtime-limit", "--on-no-converge throttle"]
        {
            assert!(why.contains(word), "{word:?} is missing: {why}");
        }
        assert!(moved.rounds < 20, "{} rounds", moved.rounds);
    }
}

#[test]
fn a_fierce_guest_converges_when_it_is_slowed_down() {
    let moved = Sim::new(FIERCE, 5).run(plan(200, OnNoConverge::Throttle), &History::default());
    assert_eq!(moved.end, Next::Switchover);
}

#[test]
fn a_fierce_guest_is_forced_near_its_best() {
    let moved = Sim::new(FIERCE, 5).run(plan(100, OnNoConverge::Force), &History::default());
    assert_eq!(moved.end, Next::Switchover);
    assert!(moved.rounds < 40);
}

#[test]
fn a_limit_below_the_device_state_is_out_of_reach_at_once() {
    let moved = Sim::new(CALM, 5).run(plan(5, OnNoConverge::Throttle), &History::default());
    let Next::GiveUp(why) = moved.end else { panic!("{:?}", moved.end) };
    assert!(why.contains("device state") && moved.rounds == 2, "{} rounds: {why}", moved.rounds);
}

#[test]
fn the_promised_limit_is_kept() {
    let late = (0..200).filter(|&seed| {
        let moved = Sim::new(CALM, seed).run(plan(120, OnNoConverge::Abort), &History::default());
        moved.end == Next::Switchover && moved.record.blackout_ms > 120.0
    });
    assert!(late.count() <= 10, "an upper bound of 95 % may be missed by 1 in 20");
}

/// A guest of 512 pages that hold data, all of them held back after the rounds.
fn forecast_of_a_small_guest(flush_ms: u64, first_ms: u64, later: [(u64, u64); 3]) -> Forecast {
    let mut predictor = Predictor::new(Priors::QEMU, &History::default());
    let round = |round, sent, ms, empty_flush| RoundReport {
        round,
        since_last_scan: Duration::from_millis(if round == 1 { 0 } else { 300 }),
        sent: PageCount(sent),
        zero: PageCount(if round == 1 { sent - 512 } else { 0 }),
        held: PageCount(if round == 1 { 0 } else { 512 }),
        sending: Duration::from_millis(ms),
        empty_flush: Duration::from_millis(empty_flush),
        ..RoundReport::default()
    };
    predictor.observe(&round(1, 2048, first_ms, flush_ms));
    for (number, (sent, ms)) in (2..).zip(later) {
        predictor.observe(&round(number, sent, ms, 0));
    }
    predictor.forecast()
}

#[test]
fn a_small_guest_on_a_slow_link_is_promised_no_short_blackout() {
    // 256 pages a second; the later rounds are a few pages, as those of a guest that writes all of its pages always.
    let forecast = forecast_of_a_small_guest(1, 2000, [(16, 62), (8, 31), (16, 62)]);
    assert!(forecast.total.contains(2040.0), "{:?}", forecast.total);
    assert!(forecast.total.p50_ms > 1000.0, "{:?}", forecast.total);
}

#[test]
fn rounds_that_a_far_link_makes_long_say_nothing_of_its_rate() {
    // 100 ms there and back, and 2500 pages a second.
    let forecast = forecast_of_a_small_guest(100, 305, [(100, 140), (70, 128), (100, 140)]);
    assert!(forecast.total.contains(345.0), "{:?}", forecast.total);
    assert!(forecast.total.p50_ms < 1000.0, "{:?}", forecast.total);
}

fn any_report() -> impl Strategy<Value = RoundReport> {
    let pages = prop_oneof![Just(0_u64), 0..1_000_000_u64, Just(u64::MAX >> 12)];
    let ns = prop_oneof![Just(0_u64), 0..10_000_000_000_u64, Just(u64::MAX)];
    let pages5 = [pages.clone(), pages.clone(), pages.clone(), pages.clone(), pages];
    ((1..200_u32), pages5, [ns.clone(), ns.clone(), ns]).prop_map(|(round, p, ns)| RoundReport {
        round,
        since_last_scan: Duration::from_nanos(ns[0]),
        scan: Duration::from_nanos(ns[1]),
        dirty: PageCount(p[0]),
        sent: PageCount(p[1]),
        zero: PageCount(p[2]),
        held: PageCount(p[3]),
        pinned: PageCount(p[4]),
        wire: ByteLen(p[1]),
        sending: Duration::from_nanos(ns[2]),
        empty_flush: Duration::from_nanos(ns[1]),
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_forecast_is_ordered_and_finite_whatever_is_reported(reports in prop::collection::vec(any_report(), 1..8)) {
        let mut converge = Converge::new(plan(300, OnNoConverge::Throttle), Predictor::new(Priors::QEMU, &History::default()));
        for report in reports {
            let forecast = converge.round_done(&report).forecast;
            for interval in forecast.terms.values().chain([&forecast.total, &forecast.raw, &forecast.floor]) {
                prop_assert!(interval.p05_ms.is_finite() && interval.p95_ms.is_finite(), "{interval:?}");
                prop_assert!(0.0 <= interval.p05_ms && interval.p05_ms <= interval.p50_ms && interval.p50_ms <= interval.p95_ms);
            }
            prop_assert!(forecast.floor.p95_ms <= forecast.total.p95_ms);
        }
    }

    #[test]
    fn more_held_pages_never_shorten_the_forecast(held in 0..100_000_u64, more in 1..100_000_u64) {
        let forecast = |held| {
            let mut predictor = Predictor::new(Priors::QEMU, &History::default());
            let round = |round, sent, held| RoundReport {
                round,
                since_last_scan: Duration::from_millis(500),
                sent: PageCount(sent),
                held: PageCount(held),
                sending: Duration::from_millis(400),
                ..RoundReport::default()
            };
            predictor.observe(&round(1, 200_000, 0));
            predictor.observe(&round(2, 5_000, held));
            predictor.forecast().total
        };
        let (few, many) = (forecast(held), forecast(held + more));
        // A sum of floats in another order: their last digits are no forecast.
        let no_less = |few: f64, many: f64| many >= few * (1.0 - 1e-12);
        prop_assert!(no_less(few.p50_ms, many.p50_ms) && no_less(few.p95_ms, many.p95_ms), "{few:?} {many:?}");
    }
}
