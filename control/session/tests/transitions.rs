//! The transition tables of both machines, every state against every event, and the diagrams made from them.
//!
//! `UPDATE_TABLES=1 cargo test -p vmferry-session --test transitions` writes the files beside this one anew; the
//! README shows the `.mmd` ones. A change of protocol is a change of these files, and reviewed as such.

#![expect(clippy::unwrap_used, reason = "a test: a panic is its failure")]

#[path = "shared/facts.rs"]
mod facts;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use facts::{ATTEMPT, offer, terms};
use vmferry_session::source::SourceState;
use vmferry_session::target::TargetState;
use vmferry_session::*;

const EARLY: Duration = Duration::ZERO;
const LATE: Duration = Duration::from_secs(3600);
const STRANGER: AttemptId = AttemptId::from_bytes([9; 16]);

fn limits() -> Limits {
    Limits { whole: Some(Duration::from_secs(600)), ..Limits::DEFAULT }
}

fn agreement() -> Agreement {
    negotiate(&offer(), &terms()).unwrap()
}

fn totals() -> FinalTotals {
    FinalTotals { lanes: vec![], state_bytes: 1, digest: None, state_age_us: None }
}

fn reason() -> AbortReason {
    AbortReason::new(AbortKind::Cancelled, "cancelled")
}

fn wrong() -> SessionError {
    SessionError::HostRefused("no".into())
}

fn messages() -> Vec<(&'static str, Message)> {
    vec![
        ("Offer", Message::Offer(Box::new(offer()))),
        ("Answer", Message::Answer(agreement())),
        ("Refuse", Message::Refuse(reason())),
        ("Final", Message::Final(totals())),
        ("Ready", Message::Ready(TargetTimes::default())),
        ("Commit", Message::Commit),
        ("Running", Message::Running(TargetTimes::default())),
        ("NeverRan", Message::NeverRan { attempt: ATTEMPT, reason: reason() }),
        ("NeverRan of a stranger", Message::NeverRan { attempt: STRANGER, reason: reason() }),
        ("Unknown", Message::Unknown { attempt: ATTEMPT }),
        ("Ask", Message::Ask { attempt: ATTEMPT }),
        ("Ask of a stranger", Message::Ask { attempt: STRANGER }),
        ("Heard", Message::Heard),
        ("Abort", Message::Abort(reason())),
        ("Ping", Message::Ping(1)),
        ("Pong", Message::Pong(1)),
    ]
}

fn paused() -> PausedToken {
    RunningToken::claim().pause()
}

fn source_events() -> Vec<(String, SourceEvent, Duration)> {
    use SourceEvent as E;
    let mut events: Vec<_> =
        messages().into_iter().map(|(name, m)| (format!("«{name}»"), E::Message(m), EARLY)).collect();
    let mut add = |name: &str, event, now| events.push((name.to_owned(), event, now));
    add("ControlLost", E::ControlLost("lost".into()), EARLY);
    add("PeerBroke", E::PeerBroke("nonsense".into()), EARLY);
    add("Cancel", E::Cancel, EARLY);
    add("Tick", E::Tick, EARLY);
    add("Tick, too late", E::Tick, LATE);
    add("LanesOpened", E::LanesOpened, EARLY);
    add("Attached", E::Attached, EARLY);
    add("RoundDone: Round", E::RoundDone(Next::Round), EARLY);
    add("RoundDone: Throttle", E::RoundDone(Next::Throttle { percent: 20 }), EARLY);
    add("RoundDone: Switchover", E::RoundDone(Next::Switchover), EARLY);
    add("RoundDone: GiveUp", E::RoundDone(Next::GiveUp("no".into())), EARLY);
    add("ThrottleFailed", E::ThrottleFailed(wrong()), EARLY);
    add("Paused", E::Paused(paused()), EARLY);
    add("PauseFailed", E::PauseFailed(paused(), wrong()), EARLY);
    add("LastSent", E::LastSent, EARLY);
    add("StateSaved", E::StateSaved, EARLY);
    add("LanesFinished", E::LanesFinished(totals()), EARLY);
    add("SealRecorded", E::SealRecorded, EARLY);
    add("Reconnected", E::Reconnected, EARLY);
    add("Resumed", E::Resumed(RunningToken::claim()), EARLY);
    add("ResumeFailed", E::ResumeFailed(paused(), wrong()), EARLY);
    add("Retired", E::Retired, EARLY);
    add("RetireFailed", E::RetireFailed(wrong()), EARLY);
    for work in [
        Work::OpenLanes,
        Work::Attach,
        Work::CopyRound,
        Work::SendLast,
        Work::SaveState,
        Work::FinishLanes,
        Work::RecordSeal,
        Work::Reconnect,
    ] {
        add(&format!("{work:?} failed"), E::WorkFailed(work, wrong()), EARLY);
    }
    events
}

/// Events that lead from the beginning into each state.
fn source_paths() -> Vec<(&'static str, Vec<SourceEvent>)> {
    use SourceEvent as E;
    let answer = || vec![E::Message(Message::Answer(agreement()))];
    let copying = || [answer(), vec![E::LanesOpened, E::Attached]].into_iter().flatten().collect::<Vec<_>>();
    let then = |path: Vec<E>, more: Vec<E>| path.into_iter().chain(more).collect::<Vec<_>>();
    let pausing = || {
        then(copying(), vec![E::RoundDone(Next::Throttle { percent: 20 }), E::RoundDone(Next::Switchover)])
    };
    let last = || then(pausing(), vec![E::Paused(paused())]);
    let closing = || then(last(), vec![E::LastSent, E::StateSaved]);
    let awaiting = || then(closing(), vec![E::LanesFinished(totals())]);
    let sealing = || then(awaiting(), vec![E::Message(Message::Ready(TargetTimes::default()))]);
    let doubt = || then(sealing(), vec![E::SealRecorded]);
    vec![
        ("Negotiating", vec![]),
        ("Preparing", answer()),
        ("Preparing, lanes open", then(answer(), vec![E::LanesOpened])),
        ("Copying", copying()),
        ("Pausing", pausing()),
        ("SendingLast", last()),
        ("SendingLast, state saved", then(last(), vec![E::StateSaved])),
        ("Closing", closing()),
        ("AwaitingReady", awaiting()),
        ("Sealing", sealing()),
        ("InDoubt", doubt()),
        ("InDoubt, dialling", then(doubt(), vec![E::ControlLost("lost".into())])),
        ("Retiring", then(doubt(), vec![E::Message(Message::Running(TargetTimes::default()))])),
        ("Unwinding", then(copying(), vec![E::Cancel])),
        ("Unwinding, pausing", then(pausing(), vec![E::Cancel])),
        ("Resuming", then(awaiting(), vec![E::Cancel])),
        ("Resuming, waiting", then(awaiting(), vec![E::Cancel, E::ResumeFailed(paused(), wrong())])),
        ("Ended", then(copying(), vec![E::RoundDone(Next::GiveUp("no".into()))])),
    ]
}

fn source_state(path: Vec<SourceEvent>) -> SourceState {
    let (mut state, _) = SourceState::begin(RunningToken::claim(), offer(), limits(), EARLY);
    for event in path {
        state = state.step(event, EARLY).0;
    }
    state
}

fn target_events() -> Vec<(String, TargetEvent, Duration)> {
    use TargetEvent as E;
    let mut events: Vec<_> =
        messages().into_iter().map(|(name, m)| (format!("«{name}»"), E::Message(m), EARLY)).collect();
    let mut add = |name: &str, event, now| events.push((name.to_owned(), event, now));
    add("ControlLost", E::ControlLost("lost".into()), EARLY);
    add("PeerBroke", E::PeerBroke("nonsense".into()), EARLY);
    add("Cancel", E::Cancel, EARLY);
    add("Tick", E::Tick, EARLY);
    add("Tick, too late", E::Tick, LATE);
    add("Prepared", E::Prepared, EARLY);
    add("LanesAccepted", E::LanesAccepted, EARLY);
    add("LanesFailed", E::LanesFailed(wrong()), EARLY);
    add("RamComplete", E::RamComplete { state_bytes: 1, digest: None, complete_us: 0 }, EARLY);
    add("RamComplete, state short", E::RamComplete { state_bytes: 0, digest: None, complete_us: 0 }, EARLY);
    add(
        "StateLoaded",
        E::StateLoaded { guest: VacantToken::claim().loaded(), load_us: 0, devices: DeviceTimes::default() },
        EARLY,
    );
    add("Ran", E::Ran { run_us: 0 }, EARLY);
    add("RunFailed: did not run", E::RunFailed(RunFailure::DidNotRun(wrong())), EARLY);
    add("RunFailed: unsure", E::RunFailed(RunFailure::Unsure(wrong())), EARLY);
    add("Discarded", E::Discarded, EARLY);
    for work in [TargetWork::Prepare, TargetWork::AcceptLanes, TargetWork::AwaitLanes, TargetWork::LoadState]
    {
        add(&format!("{work:?} failed"), E::WorkFailed(work, wrong()), EARLY);
    }
    events
}

fn target_paths() -> Vec<(&'static str, Vec<TargetEvent>)> {
    use TargetEvent as E;
    let then = |path: Vec<E>, more: Vec<E>| path.into_iter().chain(more).collect::<Vec<_>>();
    let preparing = || vec![E::Message(Message::Offer(Box::new(offer())))];
    let opening = || then(preparing(), vec![E::Prepared]);
    let receiving = || then(opening(), vec![E::LanesAccepted]);
    let completing = || then(receiving(), vec![E::Message(Message::Final(totals()))]);
    let loading =
        || then(completing(), vec![E::RamComplete { state_bytes: 1, digest: None, complete_us: 0 }]);
    let ready = || {
        then(
            loading(),
            vec![E::StateLoaded {
                guest: VacantToken::claim().loaded(),
                load_us: 0,
                devices: DeviceTimes::default(),
            }],
        )
    };
    let starting = || then(ready(), vec![E::Message(Message::Commit)]);
    vec![
        ("Listening", vec![]),
        ("Preparing", preparing()),
        ("Receiving, lanes opening", opening()),
        ("Receiving", receiving()),
        ("Completing", completing()),
        ("Loading", loading()),
        ("Ready", ready()),
        ("Starting", starting()),
        ("Ran", then(starting(), vec![E::Ran { run_us: 0 }])),
        ("Unwinding", then(loading(), vec![E::Cancel])),
        ("Discarding", then(ready(), vec![E::Cancel])),
        ("Discarding, nobody asks", then(receiving(), vec![E::Cancel])),
        ("Refused", then(ready(), vec![E::Cancel, E::Discarded])),
        ("Lost", then(starting(), vec![E::RunFailed(RunFailure::Unsure(wrong()))])),
        ("Ended", then(receiving(), vec![E::Cancel, E::Discarded])),
    ]
}

fn target_state(path: Vec<TargetEvent>) -> TargetState {
    let mut state = TargetState::listen(VacantToken::claim(), terms(), limits());
    for event in path {
        state = state.step(event, EARLY).0;
    }
    state
}

/// The variant's name, as `Debug` begins.
fn variant(debug: &str) -> String {
    debug.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default().to_owned()
}

/// An action in a word or two.
fn brief(debug: &str) -> String {
    let inner = |prefix: &str| debug.strip_prefix(prefix).map(variant);
    match (inner("Send("), inner("Finish(")) {
        (Some(message), _) => format!("Send {message}"),
        (_, Some(outcome)) => format!("Finish {outcome}"),
        _ => debug
            .trim_end_matches(')')
            .split('(')
            .next()
            .unwrap_or_default()
            .replace(" { ", " ")
            .replace(" }", ""),
    }
}

/// What one state does: for each outcome, the events that lead to it, in order of first appearance.
struct Row {
    state: &'static str,
    outcomes: Vec<(String, Vec<String>, Vec<String>)>,
}

impl Row {
    fn add(&mut self, event: String, next: String, actions: Vec<String>) {
        match self.outcomes.iter_mut().find(|(n, a, _)| *n == next && *a == actions) {
            Some((_, _, events)) => events.push(event),
            None => self.outcomes.push((next, actions, vec![event])),
        }
    }
}

fn source_rows() -> Vec<Row> {
    let row = |index: usize, state: &'static str| {
        let mut row = Row { state, outcomes: vec![] };
        for (name, event, now) in source_events() {
            let path = source_paths().remove(index).1;
            let (next, actions) = source_state(path).step(event, now);
            let actions = actions.iter().map(|a| brief(&format!("{a:?}"))).collect();
            row.add(name, variant(&format!("{next:?}")), actions);
        }
        row
    };
    source_paths().iter().enumerate().map(|(index, (state, _))| row(index, state)).collect()
}

fn target_rows() -> Vec<Row> {
    let row = |index: usize, state: &'static str| {
        let mut row = Row { state, outcomes: vec![] };
        for (name, event, now) in target_events() {
            let path = target_paths().remove(index).1;
            let (next, actions) = target_state(path).step(event, now);
            let actions = actions.iter().map(|a| brief(&format!("{a:?}"))).collect();
            row.add(name, variant(&format!("{next:?}")), actions);
        }
        row
    };
    target_paths().iter().enumerate().map(|(index, (state, _))| row(index, state)).collect()
}

fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    for row in rows {
        writeln!(text, "{}", row.state).unwrap();
        for (next, actions, events) in &row.outcomes {
            let base = row.state.split(',').next().unwrap();
            let next = if next == base { "stays" } else { next };
            let does = if actions.is_empty() { String::new() } else { format!(" ! {}", actions.join(", ")) };
            writeln!(text, "    → {next}{does}\n          {}", events.join(" | ")).unwrap();
        }
        text.push('\n');
    }
    text
}

/// Mermaid, one edge per pair of states; an edge of many events is the common way out.
fn diagram(rows: &[Row]) -> String {
    let mut edges: BTreeMap<(usize, String), (String, Vec<String>)> = BTreeMap::new();
    for (order, row) in rows.iter().enumerate() {
        let from = row.state.split(',').next().unwrap();
        for (next, _, events) in row.outcomes.iter().filter(|(next, ..)| next != from) {
            let first = rows.iter().position(|r| r.state.split(',').next().unwrap() == from).unwrap_or(order);
            let edge = edges.entry((first, next.clone())).or_insert((from.to_owned(), vec![]));
            edge.1.extend(events.iter().filter(|e| !edge.1.contains(e)).cloned().collect::<Vec<_>>());
        }
    }
    let mut text = String::from("stateDiagram-v2\n    direction LR\n");
    writeln!(text, "    [*] --> {}", rows[0].state).unwrap();
    for ((_, next), (from, events)) in &edges {
        let label =
            if events.len() > 4 { "any failure".to_owned() } else { events.join(", ").replace(": ", " ") };
        writeln!(text, "    {from} --> {next}: {label}").unwrap();
    }
    text.push_str("    Ended --> [*]\n");
    text
}

fn check(file: &str, seen: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/transitions").join(file);
    if std::env::var_os("UPDATE_TABLES").is_some() {
        std::fs::write(&path, seen).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = kept.lines().zip(seen.lines()).position(|(a, b)| a != b);
    assert!(
        kept == seen,
        "{file} differs from line {differs:?}; look, then run with UPDATE_TABLES=1:\n{seen}"
    );
}

#[test]
fn the_source_does_what_its_table_says() {
    let rows = source_rows();
    check("source.txt", &table(&rows));
    check("source.mmd", &diagram(&rows));
}

#[test]
fn the_target_does_what_its_table_says() {
    let rows = target_rows();
    check("target.txt", &table(&rows));
    check("target.mmd", &diagram(&rows));
}

#[test]
fn every_path_leads_where_its_name_says() {
    for (name, path) in source_paths() {
        assert_eq!(variant(&format!("{:?}", source_state(path))), name.split(',').next().unwrap());
    }
    for (name, path) in target_paths() {
        assert_eq!(variant(&format!("{:?}", target_state(path))), name.split(',').next().unwrap());
    }
}

/// Invariant 1, read off the table: nothing but the target's word gets a sealed guest back.
#[test]
fn a_sealed_guest_comes_back_only_by_the_targets_proof() {
    for row in source_rows().iter().filter(|row| row.state.starts_with("InDoubt")) {
        for (_, actions, events) in
            row.outcomes.iter().filter(|(_, actions, _)| actions.contains(&"Resume".into()))
        {
            assert_eq!(events, &["«NeverRan»"], "{}: {actions:?}", row.state);
        }
    }
}

/// Invariant 1, the other side: only a Commit or an Ask runs the guest, and only once.
#[test]
fn a_target_runs_its_guest_only_when_told_to() {
    for row in target_rows() {
        for (_, _, events) in row.outcomes.iter().filter(|(_, actions, _)| actions.contains(&"Run".into())) {
            assert_eq!((row.state, events.join(" ")), ("Ready", "«Commit» «Ask»".to_owned()));
        }
    }
}

/// A number from a seed (splitmix64).
fn dice(state: &mut u64, bound: usize) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    usize::try_from((z ^ (z >> 31)) % u64::try_from(bound).unwrap()).unwrap()
}

/// Any events at all, in any order, also such as no honest driver posts: no panic, nothing after the end, and a
/// sealed guest is resumed by nothing but the target's proof.
#[test]
fn no_sequence_of_events_confuses_the_source() {
    for seed in 0..400 {
        let mut luck = seed;
        let start = dice(&mut luck, source_paths().len());
        let mut state = source_state(source_paths().remove(start).1);
        let mut sealed = false;
        for _ in 0..80 {
            let mut events = source_events();
            let (name, event, now) = events.swap_remove(dice(&mut luck, events.len()));
            let was_over = state.outcome().is_some();
            sealed |= matches!(state, SourceState::InDoubt(_));
            let (next, actions) = state.step(event, now);
            assert!(!was_over || actions.is_empty(), "seed {seed}: {name} after the end: {actions:?}");
            let resumes = actions.iter().any(|action| matches!(action, SourceAction::Resume(_)));
            assert!(
                !(sealed && resumes) || name == "«NeverRan»",
                "seed {seed}: {name} resumed a sealed guest"
            );
            sealed &= !resumes && !matches!(next, SourceState::Ended(_));
            state = next;
        }
    }
}

/// The same for the target: it runs its guest at most once, and never says NeverRan after that.
#[test]
fn no_sequence_of_events_confuses_the_target() {
    for seed in 0..400 {
        let mut luck = seed;
        let start = dice(&mut luck, target_paths().len());
        let mut state = target_state(target_paths().remove(start).1);
        let mut runs = u32::from(matches!(state, TargetState::Starting(_)));
        let mut surely_not = false;
        for _ in 0..80 {
            let mut events = target_events();
            let (name, event, now) = events.swap_remove(dice(&mut luck, events.len()));
            let was_over = state.outcome().is_some();
            surely_not |= name == "RunFailed: did not run" && matches!(state, TargetState::Starting(_));
            let (next, actions) = state.step(event, now);
            assert!(!was_over || actions.is_empty(), "seed {seed}: {name} after the end: {actions:?}");
            for action in &actions {
                runs += u32::from(matches!(action, TargetAction::Run(_)));
                let denies = matches!(action, TargetAction::Send(Message::NeverRan { .. }));
                assert!(!denies || runs == 0 || surely_not, "seed {seed}: {name} made it deny what it ran");
            }
            assert!(runs <= 1, "seed {seed}: {name} ran the guest again");
            state = next;
        }
    }
}
