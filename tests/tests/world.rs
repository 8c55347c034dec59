//! Stories of the simulated world: every fault ends with exactly one runnable guest with complete memory, or with a
//! name for the doubt.
//!
//! A failing seed prints itself; `VMFERRY_SEEDS=first..last` plays others.

use std::collections::BTreeMap;
use std::time::Duration;

use vmferry_session::{SessionError, SourceOutcome, TargetOutcome};
use vmferry_tests::world::{Cut, End, Ending, Runner, Story, Trouble, World};

fn play(story: Story) -> Ending {
    let told = format!("{story:?}");
    World::new(story).run().unwrap_or_else(|law| panic!("{law}\nin {told}"))
}

/// How many stories ended how.
fn tally(endings: impl IntoIterator<Item = Ending>) -> BTreeMap<String, u32> {
    let mut counts = BTreeMap::new();
    for ending in endings {
        let name = match ending.runner {
            Runner::Nobody(_) => "Nobody, named".into(),
            runner @ (Runner::Source | Runner::Target) => format!("{runner:?}"),
        };
        *counts.entry(name).or_insert(0) += 1;
    }
    counts
}

fn seeds() -> std::ops::Range<u64> {
    let range = std::env::var("VMFERRY_SEEDS").ok();
    let parsed = range
        .as_deref()
        .and_then(|r| r.split_once(".."))
        .and_then(|(a, b)| Some(a.parse().ok()?..b.parse().ok()?));
    parsed.unwrap_or(0..8_000)
}

#[test]
fn when_nothing_goes_wrong_the_guest_moves() {
    for seed in 0..200 {
        let ending = play(Story { verify: seed % 2 == 0, ..Story::calm(seed) });
        if let Some(SourceOutcome::RunsHere { cause }) = &ending.source {
            assert!(matches!(cause, SessionError::NotConverging(_)), "seed {seed}: {cause}");
            continue;
        }
        assert_eq!(
            (ending.runner, ending.target),
            (Runner::Target, Some(TargetOutcome::RunsHere)),
            "seed {seed}"
        );
    }
}

#[test]
fn whatever_goes_wrong_one_guest_runs_or_the_doubt_is_named() {
    let endings: Vec<Ending> = seeds().map(|seed| play(Story::wild(seed))).collect();
    let throttled = endings.iter().filter(|ending| ending.throttled).count();
    let counts = tally(endings);
    println!("{counts:?}, {throttled} of them slowed down");
    // A world in which one of the ends never happens proves nothing about it.
    assert!(
        counts.len() == 3 && counts.values().all(|&count| count > 5) && throttled > 5,
        "{counts:?}, {throttled}"
    );
}

/// A trouble at every single event of a move that would have worked.
fn at_every_event(trouble: Trouble) -> BTreeMap<String, u32> {
    let stories = (0..6).flat_map(|seed| {
        let events = play(Story::calm(seed)).events;
        (1..=events).map(move |at| Story::calm(seed).with(at, trouble))
    });
    let counts = tally(stories.map(play));
    println!("{trouble:?}: {counts:?}");
    counts
}

#[test]
fn the_source_may_be_killed_at_any_event() {
    let counts = at_every_event(Trouble::KillSource);
    assert!(counts["Source"] > 50 && counts["Target"] > 50);
}

#[test]
fn the_target_may_be_killed_at_any_event() {
    let counts = at_every_event(Trouble::KillTarget);
    assert!(counts["Source"] > 50 && counts["Target"] > 5);
}

#[test]
fn the_guardian_may_be_killed_at_any_event_and_the_move_is_called_off() {
    let counts = at_every_event(Trouble::KillGuardian);
    assert!(!counts.contains_key("Nobody, named"), "{counts:?}");
}

#[test]
fn the_control_connection_may_be_cut_at_any_event() {
    for cut in [Cut::Both, Cut::SourceDeaf, Cut::TargetDeaf] {
        let counts = at_every_event(Trouble::CutControl(cut));
        assert!(
            !counts.contains_key("Nobody, named"),
            "a cut alone is asked about until it is known: {counts:?}"
        );
    }
}

#[test]
fn the_lanes_may_be_cut_at_any_event() {
    let counts = at_every_event(Trouble::CutLanes);
    assert!(!counts.contains_key("Nobody, named"), "{counts:?}");
}

#[test]
fn ctrl_c_before_commit_leaves_the_guest_where_it_was() {
    for seed in 0..300 {
        let calm = play(Story::calm(seed));
        let at = calm.time * u32::try_from(seed % 10).unwrap_or(0) / 40;
        let ending = play(Story { cancels: vec![(at, End::Source)], ..Story::calm(seed) });
        let cancelled =
            matches!(ending.source, Some(SourceOutcome::RunsHere { cause: SessionError::Cancelled }));
        assert!(!cancelled || ending.runner == Runner::Source, "seed {seed}");
        assert!(!matches!(ending.runner, Runner::Nobody(_)), "seed {seed}: {ending:?}");
    }
}

#[test]
fn a_timeout_ends_a_move_that_takes_too_long() {
    let story = Story { timeout: Some(Duration::from_millis(5)), ..Story::calm(1) };
    let ending = play(story);
    assert_eq!(ending.runner, Runner::Source);
    assert!(matches!(ending.source, Some(SourceOutcome::RunsHere { cause: SessionError::TimedOut { .. } })));
}

#[test]
fn a_new_receiver_at_the_old_address_proves_nothing() {
    // The target dies at any event and a stranger takes its place: it answers Unknown, never NeverRan.
    for seed in 0..4 {
        for at in 1..=play(Story::calm(seed)).events {
            let story = Story::calm(seed).with(at, Trouble::KillTarget).with(at + 2, Trouble::RestartTarget);
            play(story);
        }
    }
}

#[test]
fn cut_and_kill_together_at_any_two_events() {
    for seed in 0..2 {
        let events = play(Story::calm(seed)).events;
        for at in 1..=events {
            for later in [1, 3, 7] {
                let cut = Story::calm(seed).with(at, Trouble::CutControl(Cut::SourceDeaf));
                play(cut.clone().with(at + later, Trouble::KillTarget));
                play(cut.with(at + later, Trouble::KillSource));
            }
        }
    }
}
