//! The handover as a world small enough to be searched: two machines, their jobs, connections as queues, no time.
//!
//! The machines are the real ones, and their tokens cannot be copied; so this world cannot be copied either. A model
//! checker plays the path to a state again. Deadlines may pass at any moment, in any order: no law rests on two
//! clocks agreeing. What else goes wrong is counted.

mod facts;
mod source_side;
mod target_side;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use vmferry_datapath::{ByteLen, RamBlock, RamLayout};
use vmferry_session::source::SourceState;
use vmferry_session::target::TargetState;
use vmferry_session::{
    AttemptId, CipherSuite, GuestFacts, LaneTransport, Limits, Message, Next, Offer, RunFailure,
    RunningToken, SessionError, SourceEvent, SourceOutcome, TargetEvent, TargetOutcome, TargetTerms, VERSION,
    VacantToken, negotiate,
};

pub use facts::Facts;
use source_side::SourceJob;
use target_side::TargetJob;

/// Reconnections of a source in doubt.
const DIALS: u32 = 2;
const LATE: Duration = Duration::from_secs(100_000);
const ATTEMPT: AttemptId = AttemptId::from_bytes([7; 16]);

/// One thing that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Act {
    /// The source's job at this place in its list is done.
    SourceDone(usize),
    /// It failed; `true`: what it told the VMM or the guardian happened all the same.
    SourceFails(usize, bool),
    /// So is the target's.
    TargetDone(usize),
    /// The target's failed; `true`: the VMM did it all the same.
    TargetFails(usize, bool),
    /// The VMM refused, and surely did not run the guest.
    TargetDidNotRun(usize),
    /// The lanes broke before everything was there.
    LanesLost(usize),
    /// The next item of a connection arrives.
    ToTarget(usize),
    /// The same, towards the source.
    ToSource(usize),
    /// It is lost, although the connection stands.
    LoseToTarget(usize),
    /// The same, towards the source.
    LoseToSource(usize),
    /// The connection breaks; what was on its way to these ends is lost.
    Cut {
        /// Which one.
        connection: usize,
        /// Whether the source gets nothing more of it.
        to_source: bool,
        /// Whether the target gets nothing more of it.
        to_target: bool,
    },
    /// The lanes break.
    CutLanes,
    /// The source's next deadline passes.
    SourceTick,
    /// All of the source's deadlines pass.
    SourceTickLate,
    /// All of the target's deadlines pass.
    TargetTickLate,
    /// Ctrl-C at the source.
    CancelSource,
    /// Ctrl-C at the target.
    CancelTarget,
    /// `kill -9`; `true`: what it had told the VMM or the guardian happens all the same.
    KillSource(bool),
    /// The same at the target.
    KillTarget(bool),
    /// The guardian notices that its driver is dead.
    GuardianNotices,
    /// A receiver that knows nothing takes the dead one's address.
    StrangerListens,
}

#[derive(Debug)]
pub(super) enum Item {
    Message(Message),
    Closed,
}

/// One control connection. An end that has read `Closed`, or closed it itself, does not hold it any more.
#[derive(Debug, Default)]
pub(super) struct Connection {
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
pub(super) struct Lanes {
    last: bool,
    state: bool,
    end: bool,
    cut: bool,
}

/// The whole world.
#[derive(Debug)]
pub struct System {
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
    let layout = RamLayout::new(vec![block]).unwrap_or_else(|error| unreachable!("{error}"));
    GuestFacts { kind: "fake".into(), name: String::new(), facts: BTreeMap::new(), layout }
}

fn offer() -> Offer {
    Offer {
        transports: vec![LaneTransport::Tcp],
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
        transports: vec![LaneTransport::Tcp],
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
    pub fn at_switchover(faults: u8) -> Self {
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
            faults,
            broken: None,
        };
        system.tell_target(TargetEvent::Message(Message::Offer(Box::new(offer()))), Duration::ZERO);
        for event in [TargetEvent::Prepared, TargetEvent::LanesAccepted] {
            system.tell_target(event, Duration::ZERO);
        }
        system.connections[0].to_source.clear();
        let agreement = negotiate(&offer(), &terms()).unwrap_or_else(|reason| unreachable!("{reason}"));
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

    /// Lets something happen.
    pub fn apply(&mut self, act: Act) {
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
            Act::ToTarget(line) => self.arrive_at_target(line),
            Act::ToSource(line) => self.arrive_at_source(line),
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

    /// What happens by itself sooner or later.
    pub fn due(&self) -> Vec<Act> {
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
    pub fn faults(&self) -> Vec<Act> {
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

/// Whether it counts as a fault.
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
