//! The handover protocol, model-checked: every interleaving of messages, answers, timeouts, losses, cuts and deaths.
//!
//! The machines are the real ones. Their tokens cannot be copied, so a state of the model is the path that leads to
//! it, played again from the beginning; two paths that end in the same world (by its `Debug` text) are one state.
//! Deadlines may pass at any moment, in any order: no law here rests on two clocks agreeing. What else goes wrong is
//! counted, [`FAULTS`] in one story.

#![expect(clippy::unwrap_used, reason = "a test: a panic is its failure")]

use std::collections::VecDeque;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use stateright::{Checker, Model, Property};
use vmferry_datapath::{ByteLen, RamBlock, RamLayout};
use vmferry_session::source::SourceState;
use vmferry_session::target::TargetState;
use vmferry_session::*;

/// Faults in one story.
const FAULTS: u8 = 5;
/// Reconnections of a source in doubt.
const DIALS: u32 = 2;
const LATE: Duration = Duration::from_secs(100_000);
const ATTEMPT: AttemptId = AttemptId::from_bytes([7; 16]);

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Act {
    /// The source's job at this place in its list is done.
    SourceDone(usize),
    /// It failed; `true`: what it told the VMM or the guardian happened all the same.
    SourceFails(usize, bool),
    TargetDone(usize),
    TargetFails(usize, bool),
    /// The VMM refused, and surely did not run the guest.
    TargetDidNotRun(usize),
    /// The lanes broke before everything was there.
    LanesLost(usize),
    /// The next item of a connection arrives.
    ToTarget(usize),
    ToSource(usize),
    LoseToTarget(usize),
    LoseToSource(usize),
    /// The connection breaks; what was on its way to these ends is lost.
    Cut {
        connection: usize,
        to_source: bool,
        to_target: bool,
    },
    CutLanes,
    SourceTick,
    SourceTickLate,
    TargetTickLate,
    CancelSource,
    CancelTarget,
    /// `kill -9`; `true`: what it had told the VMM or the guardian happens all the same.
    KillSource(bool),
    KillTarget(bool),
    GuardianNotices,
    /// A receiver that knows nothing takes the dead one's address.
    StrangerListens,
}

/// A job in the background.
#[derive(Debug)]
enum SourceJob {
    Pause(PausedToken),
    SendLast,
    SaveState,
    FinishLanes,
    RecordSeal,
    Dial,
    Resume(PausedToken),
    Retire(SealedToken),
    Other(Work),
}

#[derive(Debug)]
enum TargetJob {
    AwaitLanes,
    Load(VacantToken),
    Run(RunLicence),
    Discard,
    Other(TargetWork),
}

#[derive(Debug)]
enum Item {
    Message(Message),
    Closed,
}

/// One control connection. An end that has read `Closed`, or closed it itself, does not hold it any more.
#[derive(Debug, Default)]
struct Connection {
    to_target: VecDeque<Item>,
    to_source: VecDeque<Item>,
    cut: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Guardian {
    Watching,
    Sealed,
    Dismissed,
    SaysInDoubt,
}

/// What the lanes carried by now.
#[derive(Debug, Default)]
struct Lanes {
    last: bool,
    state: bool,
    end: bool,
    cut: bool,
}

/// The whole world.
#[derive(Debug)]
struct System {
    source: Option<SourceState>,
    source_jobs: Vec<SourceJob>,
    source_line: Option<usize>,
    interrupted: bool,
    guardian: Guardian,
    runs_here: bool,
    retired: bool,
    source_outcome: Option<SourceOutcome>,
    target: Option<TargetState>,
    target_jobs: Vec<TargetJob>,
    target_line: Option<usize>,
    stranger: bool,
    whole: bool,
    loaded: bool,
    runs_there: bool,
    discarded: bool,
    target_outcome: Option<TargetOutcome>,
    connections: Vec<Connection>,
    lanes: Lanes,
    faults: u8,
    broken: Option<&'static str>,
}

fn guest() -> GuestFacts {
    let block = RamBlock { name: "ram".into(), len: ByteLen(1 << 20), page_bytes: 4096 };
    let layout = RamLayout::new(vec![block]).unwrap();
    GuestFacts { kind: "fake".into(), name: String::new(), facts: std::collections::BTreeMap::new(), layout }
}

fn offer() -> Offer {
    Offer {
        attempt: ATTEMPT,
        versions: vec![VERSION],
        ciphers: vec![CipherSuite::Aes256Gcm],
        compressions: vec![],
        lanes: 1,
        verify: false,
        guest: guest(),
    }
}

fn terms() -> TargetTerms {
    let offer = offer();
    TargetTerms {
        versions: offer.versions,
        ciphers: offer.ciphers,
        compressions: vec![],
        lanes_max: 1,
        guest: guest(),
    }
}

fn refused() -> SessionError {
    SessionError::HostRefused(String::new())
}

impl System {
    /// Both sides agreed, the lanes stand, the source decided to switch over.
    fn new() -> Self {
        let (source, _) = SourceState::begin(RunningToken::claim(), offer(), Limits::DEFAULT, Duration::ZERO);
        let target = TargetState::listen(VacantToken::claim(), terms(), Limits::DEFAULT);
        let mut system = Self {
            source: Some(source),
            source_jobs: vec![],
            source_line: Some(0),
            interrupted: false,
            guardian: Guardian::Watching,
            runs_here: true,
            retired: false,
            source_outcome: None,
            target: Some(target),
            target_jobs: vec![],
            target_line: Some(0),
            stranger: false,
            whole: false,
            loaded: false,
            runs_there: false,
            discarded: false,
            target_outcome: None,
            connections: vec![Connection::default()],
            lanes: Lanes::default(),
            faults: FAULTS,
            broken: None,
        };
        system.tell_target(TargetEvent::Message(Message::Offer(Box::new(offer()))), Duration::ZERO);
        for event in [TargetEvent::Prepared, TargetEvent::LanesAccepted] {
            system.tell_target(event, Duration::ZERO);
        }
        system.connections[0].to_source.clear();
        let agreement = negotiate(&offer(), &terms()).unwrap();
        let agreed = SourceEvent::Message(Message::Answer(agreement));
        let ready = [
            agreed,
            SourceEvent::LanesOpened,
            SourceEvent::Attached,
            SourceEvent::RoundDone(Next::Switchover),
        ];
        for event in ready {
            system.tell_source(event, Duration::ZERO);
        }
        system.target_jobs.clear();
        system.source_jobs.retain(|job| matches!(job, SourceJob::Pause(_)));
        system
    }

    fn tell_source(&mut self, event: SourceEvent, now: Duration) {
        let mut inbox = VecDeque::from([event]);
        while let Some(event) = inbox.pop_front() {
            let Some(state) = self.source.take() else { return };
            let (state, actions) = state.step(event, now);
            self.source = Some(state);
            for action in actions {
                self.source_acts(action, &mut inbox);
            }
        }
    }

    fn source_acts(&mut self, action: SourceAction, inbox: &mut VecDeque<SourceEvent>) {
        match action {
            SourceAction::Send(message) => match self.source_line {
                Some(line) => self.send_to_target(line, message),
                None => inbox.push_back(SourceEvent::ControlLost(String::new())),
            },
            SourceAction::OpenLanes(_) => self.source_jobs.push(SourceJob::Other(Work::OpenLanes)),
            SourceAction::Attach => self.source_jobs.push(SourceJob::Other(Work::Attach)),
            SourceAction::CopyRound { .. } => self.source_jobs.push(SourceJob::Other(Work::CopyRound)),
            SourceAction::Pause(token) => self.source_jobs.push(SourceJob::Pause(token.pause())),
            SourceAction::SendLast => self.source_jobs.push(SourceJob::SendLast),
            SourceAction::SaveState => self.source_jobs.push(SourceJob::SaveState),
            SourceAction::FinishLanes => self.source_jobs.push(SourceJob::FinishLanes),
            SourceAction::RecordSeal => self.source_jobs.push(SourceJob::RecordSeal),
            SourceAction::ReconnectAndAsk { .. } => self.source_jobs.push(SourceJob::Dial),
            SourceAction::Resume(token) => self.source_jobs.push(SourceJob::Resume(token)),
            SourceAction::Retire(token) => self.source_jobs.push(SourceJob::Retire(token)),
            SourceAction::Interrupt => self.interrupted = true,
            SourceAction::ClearSeal => self.guardian = Guardian::Watching,
            SourceAction::CloseLanes => self.lanes.cut |= !self.lanes.end,
            SourceAction::SetThrottle { .. } | SourceAction::Detach => {}
            SourceAction::Finish(outcome) => {
                self.guardian = Guardian::Dismissed;
                self.source_outcome = Some(outcome);
                self.end_source();
            }
        }
    }

    fn end_source(&mut self) {
        if let Some(line) = self.source_line.take() {
            self.connections[line].to_target.push_back(Item::Closed);
        }
        self.source_jobs.clear();
    }

    fn send_to_target(&mut self, line: usize, message: Message) {
        let connection = &mut self.connections[line];
        if !connection.cut {
            connection.to_target.push_back(Item::Message(message));
        }
    }

    fn tell_target(&mut self, event: TargetEvent, now: Duration) {
        let mut inbox = VecDeque::from([event]);
        while let Some(event) = inbox.pop_front() {
            let Some(state) = self.target.take() else { return };
            let (state, actions) = state.step(event, now);
            self.target = Some(state);
            for action in actions {
                self.target_acts(action, &mut inbox);
            }
        }
    }

    fn target_acts(&mut self, action: TargetAction, inbox: &mut VecDeque<TargetEvent>) {
        match action {
            TargetAction::Send(message) => match self.target_line {
                Some(line) if !self.connections[line].cut => {
                    self.connections[line].to_source.push_back(Item::Message(message));
                }
                Some(_) => {}
                None => inbox.push_back(TargetEvent::ControlLost(String::new())),
            },
            TargetAction::Prepare(_) => self.target_jobs.push(TargetJob::Other(TargetWork::Prepare)),
            TargetAction::AcceptLanes(_) => self.target_jobs.push(TargetJob::Other(TargetWork::AcceptLanes)),
            TargetAction::AwaitLanes(_) => self.target_jobs.push(TargetJob::AwaitLanes),
            TargetAction::LoadState(token) => self.target_jobs.push(TargetJob::Load(token)),
            TargetAction::Run(licence) => self.target_jobs.push(TargetJob::Run(licence)),
            TargetAction::Discard => self.target_jobs.push(TargetJob::Discard),
            TargetAction::Interrupt => {}
            TargetAction::Finish(outcome) => {
                self.target_outcome = Some(outcome);
                self.end_target();
            }
        }
    }

    fn end_target(&mut self) {
        self.target_line = None;
        self.target_jobs.clear();
        for connection in &mut self.connections {
            connection.to_target.clear();
            connection.to_source.push_back(Item::Closed);
            connection.cut = true;
        }
    }

    fn source_lives(&self) -> bool {
        self.source.as_ref().is_some_and(|state| state.outcome().is_none())
    }

    fn target_lives(&self) -> bool {
        self.target.as_ref().is_some_and(|state| state.outcome().is_none())
    }

    fn run_here(&mut self) {
        if self.retired {
            self.broken = Some("a retired guest was resumed");
        }
        self.runs_here = true;
    }

    fn run_there(&mut self) {
        if self.discarded {
            self.broken = Some("a discarded guest was run");
        }
        self.runs_there = true;
    }

    fn source_job(&mut self, place: usize, fails: Option<bool>) {
        let job = self.source_jobs.remove(place);
        let happens = fails.unwrap_or(true);
        let event = match job {
            SourceJob::Pause(token) => {
                self.runs_here &= !happens;
                if fails.is_some() {
                    SourceEvent::PauseFailed(token, refused())
                } else {
                    SourceEvent::Paused(token)
                }
            }
            SourceJob::Resume(token) => {
                if happens {
                    self.run_here();
                }
                if fails.is_some() {
                    SourceEvent::ResumeFailed(token, refused())
                } else {
                    SourceEvent::Resumed(token.resume())
                }
            }
            SourceJob::Retire(token) => {
                token.retire();
                self.retired |= happens;
                if fails.is_some() { SourceEvent::RetireFailed(refused()) } else { SourceEvent::Retired }
            }
            SourceJob::RecordSeal => {
                if happens {
                    self.guardian = Guardian::Sealed;
                }
                answer(fails, Work::RecordSeal, SourceEvent::SealRecorded)
            }
            SourceJob::Dial => self.dial(fails),
            SourceJob::Other(work) => SourceEvent::WorkFailed(work, refused()),
            SourceJob::SendLast | SourceJob::SaveState | SourceJob::FinishLanes => {
                self.move_last(&job, fails)
            }
        };
        self.tell_source(event, Duration::ZERO);
    }

    fn move_last(&mut self, job: &SourceJob, fails: Option<bool>) -> SourceEvent {
        let fails = fails.or_else(|| (self.lanes.cut || self.interrupted).then_some(false));
        let (work, done) = match job {
            SourceJob::SendLast => (Work::SendLast, SourceEvent::LastSent),
            SourceJob::SaveState => (Work::SaveState, SourceEvent::StateSaved),
            _ => {
                let totals = FinalTotals { lanes: vec![], state_bytes: 1, digest: None };
                (Work::FinishLanes, SourceEvent::LanesFinished(totals))
            }
        };
        if fails.is_none() {
            match work {
                Work::SendLast => self.lanes.last = true,
                Work::SaveState => self.lanes.state = true,
                _ => self.lanes.end = true,
            }
        }
        answer(fails, work, done)
    }

    fn dial(&mut self, fails: Option<bool>) -> SourceEvent {
        if fails.is_some() || !self.target_lives() || self.interrupted {
            return SourceEvent::WorkFailed(Work::Reconnect, refused());
        }
        if let Some(old) = self.source_line.take() {
            self.connections[old].to_target.push_back(Item::Closed);
        }
        self.source_line = Some(self.connections.len());
        let ask = Item::Message(Message::Ask { attempt: ATTEMPT });
        self.connections.push(Connection { to_target: VecDeque::from([ask]), ..Connection::default() });
        SourceEvent::Reconnected
    }

    fn target_job(&mut self, place: usize, fails: Option<bool>) {
        let job = self.target_jobs.remove(place);
        let event = match (job, fails) {
            (TargetJob::AwaitLanes, None) => {
                self.whole = self.lanes.last && self.lanes.state;
                TargetEvent::RamComplete { state_bytes: 1, digest: None, complete_us: 0 }
            }
            (TargetJob::AwaitLanes, Some(_)) => TargetEvent::WorkFailed(TargetWork::AwaitLanes, refused()),
            (TargetJob::Load(token), None) => {
                self.loaded = true;
                TargetEvent::StateLoaded { guest: token.loaded(), load_us: 0 }
            }
            (TargetJob::Load(_), Some(_)) => TargetEvent::WorkFailed(TargetWork::LoadState, refused()),
            (TargetJob::Run(licence), fails) => {
                licence.spend();
                if fails.unwrap_or(true) {
                    self.run_there();
                }
                match fails {
                    None => TargetEvent::Ran { run_us: 0 },
                    Some(_) => TargetEvent::RunFailed(RunFailure::Unsure(refused())),
                }
            }
            (TargetJob::Discard, _) => {
                self.discarded = true;
                TargetEvent::Discarded
            }
            (TargetJob::Other(work), _) => TargetEvent::WorkFailed(work, refused()),
        };
        self.tell_target(event, Duration::ZERO);
    }

    fn to_target(&mut self, line: usize) {
        let Some(item) = self.connections[line].to_target.pop_front() else { return };
        if !self.target_lives() {
            return;
        }
        match item {
            Item::Message(message) => {
                let attempt = self.target.as_ref().and_then(TargetState::attempt);
                let asks = matches!(&message, Message::Ask { attempt: about } if Some(*about) == attempt);
                if asks || attempt.is_none() {
                    self.target_line = Some(line);
                }
                // Also from an old connection: the contract forbids it, and it must do no harm.
                self.tell_target(TargetEvent::Message(message), Duration::ZERO);
            }
            Item::Closed if self.target_line == Some(line) => {
                self.target_line = None;
                self.tell_target(TargetEvent::ControlLost(String::new()), Duration::ZERO);
            }
            Item::Closed => {}
        }
    }

    fn to_source(&mut self, line: usize) {
        let Some(item) = self.connections[line].to_source.pop_front() else { return };
        if self.source_line != Some(line) {
            return;
        }
        match item {
            Item::Message(message) => self.tell_source(SourceEvent::Message(message), Duration::ZERO),
            Item::Closed => {
                self.source_line = None;
                self.tell_source(SourceEvent::ControlLost(String::new()), Duration::ZERO);
            }
        }
    }

    fn cut(&mut self, line: usize, to_source: bool, to_target: bool) {
        let connection = &mut self.connections[line];
        connection.cut = true;
        if to_source {
            connection.to_source.clear();
        }
        if to_target {
            connection.to_target.clear();
        }
        connection.to_source.push_back(Item::Closed);
        connection.to_target.push_back(Item::Closed);
    }

    fn kill_source(&mut self, happens: bool) {
        for job in std::mem::take(&mut self.source_jobs).into_iter().filter(|_| happens) {
            match job {
                SourceJob::Pause(_) => self.runs_here = false,
                SourceJob::Resume(_) => self.run_here(),
                SourceJob::Retire(_) => self.retired = true,
                SourceJob::RecordSeal => self.guardian = Guardian::Sealed,
                SourceJob::SendLast
                | SourceJob::SaveState
                | SourceJob::FinishLanes
                | SourceJob::Dial
                | SourceJob::Other(_) => {}
            }
        }
        self.source = None;
        self.lanes.cut |= !self.lanes.end;
        self.end_source();
    }

    fn kill_target(&mut self, happens: bool) {
        for job in std::mem::take(&mut self.target_jobs).into_iter().filter(|_| happens) {
            match job {
                TargetJob::Run(_) => self.run_there(),
                TargetJob::Discard => self.discarded = true,
                TargetJob::AwaitLanes | TargetJob::Load(_) | TargetJob::Other(_) => {}
            }
        }
        self.target = None;
        self.lanes.cut = true;
        self.end_target();
    }

    fn apply(&mut self, act: Act) {
        match act {
            Act::SourceDone(place) => self.source_job(place, None),
            Act::SourceFails(place, happens) => self.source_job(place, Some(happens)),
            Act::TargetDone(place) => self.target_job(place, None),
            Act::TargetFails(place, happens) => self.target_job(place, Some(happens)),
            Act::LanesLost(place) => self.target_job(place, Some(false)),
            Act::TargetDidNotRun(place) => {
                self.target_jobs.remove(place);
                self.tell_target(TargetEvent::RunFailed(RunFailure::DidNotRun(refused())), Duration::ZERO);
            }
            Act::ToTarget(line) => self.to_target(line),
            Act::ToSource(line) => self.to_source(line),
            Act::LoseToTarget(line) => drop(self.connections[line].to_target.pop_front()),
            Act::LoseToSource(line) => drop(self.connections[line].to_source.pop_front()),
            Act::Cut { connection, to_source, to_target } => self.cut(connection, to_source, to_target),
            Act::CutLanes => self.lanes.cut = true,
            Act::SourceTick => {
                let now = self.source.as_ref().and_then(SourceState::deadline).unwrap_or_default();
                self.tell_source(SourceEvent::Tick, now);
            }
            Act::SourceTickLate => self.tell_source(SourceEvent::Tick, LATE),
            Act::TargetTickLate => self.tell_target(TargetEvent::Tick, LATE),
            Act::CancelSource => self.tell_source(SourceEvent::Cancel, Duration::ZERO),
            Act::CancelTarget => self.tell_target(TargetEvent::Cancel, Duration::ZERO),
            Act::KillSource(happens) => self.kill_source(happens),
            Act::KillTarget(happens) => self.kill_target(happens),
            Act::GuardianNotices => self.guardian_notices(),
            Act::StrangerListens => {
                self.stranger = true;
                self.target = Some(TargetState::listen(VacantToken::claim(), terms(), Limits::DEFAULT));
            }
        }
        if is_fault(act) {
            self.faults -= 1;
        }
    }

    fn guardian_notices(&mut self) {
        if self.guardian == Guardian::Watching {
            self.run_here();
            self.guardian = Guardian::Dismissed;
        } else {
            self.guardian = Guardian::SaysInDoubt;
        }
    }

    /// What happens by itself sooner or later.
    fn due(&self) -> Vec<Act> {
        let mut acts = vec![];
        acts.extend((0..self.source_jobs.len()).map(Act::SourceDone));
        for (place, job) in self.target_jobs.iter().enumerate() {
            match job {
                TargetJob::AwaitLanes if self.lanes.end => acts.push(Act::TargetDone(place)),
                TargetJob::AwaitLanes if self.lanes.cut => acts.push(Act::LanesLost(place)),
                TargetJob::AwaitLanes => {}
                TargetJob::Load(_) | TargetJob::Run(_) | TargetJob::Discard => {
                    acts.push(Act::TargetDone(place))
                }
                TargetJob::Other(_) => acts.push(Act::LanesLost(place)),
            }
        }
        for (line, connection) in self.connections.iter().enumerate() {
            if !connection.to_target.is_empty() && self.target_lives() {
                acts.push(Act::ToTarget(line));
            }
            if !connection.to_source.is_empty() && self.source_line == Some(line) {
                acts.push(Act::ToSource(line));
            }
        }
        if self.source_lives() && self.source.as_ref().is_some_and(|state| state.deadline().is_some()) {
            acts.push(Act::SourceTickLate);
            let dials =
                if let Some(SourceState::InDoubt(doubt)) = &self.source { doubt.attempts() } else { 0 };
            if dials < DIALS {
                acts.push(Act::SourceTick);
            }
        }
        if self.target_lives() && self.target.as_ref().is_some_and(|state| state.deadline().is_some()) {
            acts.push(Act::TargetTickLate);
        }
        if self.source.is_none() && matches!(self.guardian, Guardian::Watching | Guardian::Sealed) {
            acts.push(Act::GuardianNotices);
        }
        acts
    }

    /// What may go wrong.
    fn faults(&self) -> Vec<Act> {
        let mut acts = vec![];
        if self.faults == 0 {
            return acts;
        }
        if self.source_lives() {
            acts.extend([Act::KillSource(false), Act::KillSource(true), Act::CancelSource]);
            let places = 0..self.source_jobs.len();
            acts.extend(
                places.flat_map(|place| [Act::SourceFails(place, false), Act::SourceFails(place, true)]),
            );
        }
        if self.target_lives() && !self.stranger {
            acts.extend([Act::KillTarget(false), Act::KillTarget(true), Act::CancelTarget]);
            let can_fail = |job: &TargetJob| !matches!(job, TargetJob::Discard);
            let places = (0..self.target_jobs.len()).filter(|&place| can_fail(&self.target_jobs[place]));
            acts.extend(
                places.flat_map(|place| [Act::TargetFails(place, false), Act::TargetFails(place, true)]),
            );
            let runs = |place: &usize| matches!(self.target_jobs[*place], TargetJob::Run(_));
            acts.extend((0..self.target_jobs.len()).filter(runs).map(Act::TargetDidNotRun));
        }
        if self.target.is_none() && !self.stranger {
            acts.push(Act::StrangerListens);
        }
        if !self.lanes.end && !self.lanes.cut {
            acts.push(Act::CutLanes);
        }
        for (connection, state) in self.connections.iter().enumerate().filter(|(_, state)| !state.cut) {
            for (to_source, to_target) in [(true, true), (true, false), (false, true)] {
                acts.push(Act::Cut { connection, to_source, to_target });
            }
            if matches!(state.to_target.front(), Some(Item::Message(_))) {
                acts.push(Act::LoseToTarget(connection));
            }
            if matches!(state.to_source.front(), Some(Item::Message(_))) {
                acts.push(Act::LoseToSource(connection));
            }
        }
        acts
    }
}

fn answer(fails: Option<bool>, work: Work, done: SourceEvent) -> SourceEvent {
    if fails.is_some() { SourceEvent::WorkFailed(work, refused()) } else { done }
}

/// Whether it counts against [`FAULTS`].
fn is_fault(act: Act) -> bool {
    match act {
        Act::SourceDone(_)
        | Act::TargetDone(_)
        | Act::ToTarget(_)
        | Act::ToSource(_)
        | Act::SourceTick
        | Act::SourceTickLate
        | Act::TargetTickLate
        | Act::GuardianNotices => false,
        // The lanes broke already: that fault was counted.
        Act::LanesLost(_) => false,
        Act::SourceFails(..)
        | Act::TargetFails(..)
        | Act::TargetDidNotRun(_)
        | Act::LoseToTarget(_)
        | Act::LoseToSource(_)
        | Act::Cut { .. }
        | Act::CutLanes
        | Act::CancelSource
        | Act::CancelTarget
        | Act::KillSource(_)
        | Act::KillTarget(_)
        | Act::StrangerListens => true,
    }
}

/// What the laws speak of.
#[derive(Clone, Debug, Default)]
struct Facts {
    runners: u8,
    /// The target runs a guest that is not whole.
    torn: bool,
    broken: Option<&'static str>,
    /// Both drivers ended or died, and the guardian spoke.
    quiet: bool,
    /// Nothing will happen by itself.
    stuck: bool,
    named: bool,
    false_report: bool,
    moved: bool,
    moved_after_asking: bool,
    came_back_by_proof: bool,
    rescued: bool,
    in_doubt: bool,
}

impl Facts {
    fn of(system: &System) -> Self {
        let runs_there = system.runs_there;
        let here = matches!(system.source_outcome, Some(SourceOutcome::RunsHere { .. }));
        let moved = matches!(system.source_outcome, Some(SourceOutcome::Moved { .. }));
        let in_doubt = matches!(system.source_outcome, Some(SourceOutcome::InDoubt { .. }));
        let paused = matches!(system.source_outcome, Some(SourceOutcome::PausedHere { .. }));
        let refused = matches!(system.target_outcome, Some(TargetOutcome::NeverRan { .. }));
        let ran = matches!(system.target_outcome, Some(TargetOutcome::RunsHere));
        let guarded = matches!(system.guardian, Guardian::Dismissed | Guardian::SaysInDoubt);
        let source_is_quiet = !system.source_lives() && guarded;
        Self {
            runners: u8::from(system.runs_here) + u8::from(runs_there),
            torn: runs_there && !(system.whole && system.loaded),
            broken: system.broken,
            quiet: source_is_quiet && (!system.target_lives() || system.stranger),
            stuck: system.due().is_empty(),
            named: in_doubt || paused || system.guardian == Guardian::SaysInDoubt,
            false_report: (here && (!system.runs_here || runs_there))
                || (moved && !runs_there)
                || (refused && runs_there)
                || (ran && !runs_there),
            moved,
            moved_after_asking: moved && system.connections.len() > 1,
            came_back_by_proof: here && system.connections.len() > 1,
            rescued: system.source.is_none() && system.runs_here && system.guardian == Guardian::Dismissed,
            in_doubt,
        }
    }
}

/// A state of the model: the path to it, and what became of it.
#[derive(Clone, Debug)]
struct Path {
    acts: Vec<Act>,
    next: Vec<Act>,
    facts: Facts,
    print: u64,
}

impl Path {
    fn play(acts: Vec<Act>) -> Self {
        let mut system = System::new();
        acts.iter().for_each(|act| system.apply(*act));
        let mut hasher = DefaultHasher::new();
        format!("{system:?}").hash(&mut hasher);
        let next = [system.due(), system.faults()].concat();
        Self { acts, next, facts: Facts::of(&system), print: hasher.finish() }
    }
}

impl Hash for Path {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.print.hash(state);
    }
}

impl PartialEq for Path {
    fn eq(&self, other: &Self) -> bool {
        self.print == other.print
    }
}

impl Eq for Path {}

/// All stories of a handover with at most [`FAULTS`] faults.
struct Handover;

impl Model for Handover {
    type State = Path;
    type Action = Act;

    fn init_states(&self) -> Vec<Path> {
        vec![Path::play(vec![])]
    }

    fn actions(&self, state: &Path, actions: &mut Vec<Act>) {
        actions.extend_from_slice(&state.next);
    }

    fn next_state(&self, last: &Path, act: Act) -> Option<Path> {
        Some(Path::play(last.acts.iter().copied().chain([act]).collect()))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("never two runners", |_, path: &Path| path.facts.runners < 2),
            Property::always("a guest that runs at the target is whole", |_, path: &Path| !path.facts.torn),
            Property::always("no end is taken back", |_, path: &Path| path.facts.broken.is_none()),
            Property::always("a runner, or a name for the doubt", |_, path: &Path| {
                !path.facts.quiet || path.facts.runners == 1 || path.facts.named
            }),
            Property::always("nobody waits for nothing", |_, path: &Path| {
                path.facts.quiet || !path.facts.stuck
            }),
            Property::always("every report is true", |_, path: &Path| !path.facts.false_report),
            Property::sometimes("a move succeeds", |_, path: &Path| path.facts.moved),
            Property::sometimes("asking ends a doubt", |_, path: &Path| path.facts.moved_after_asking),
            Property::sometimes("a proof brings the guest back", |_, path: &Path| {
                path.facts.came_back_by_proof
            }),
            Property::sometimes("the guardian rescues", |_, path: &Path| path.facts.rescued),
            Property::sometimes("a doubt stays and is named", |_, path: &Path| path.facts.in_doubt),
        ]
    }
}

#[test]
fn no_interleaving_of_crash_loss_and_timeout_breaks_the_handover() {
    let checker = Handover.checker().threads(2).timeout(Duration::from_secs(55)).spawn_bfs().join();
    println!("{} states, {} of them different", checker.state_count(), checker.unique_state_count());
    checker.assert_properties();
    assert!(checker.is_done(), "the time was over before all stories were told");
    assert!(checker.unique_state_count() > 100_000, "the model lost most of its stories");
}
