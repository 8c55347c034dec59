//! The sending host: the real machine, a driver that obeys its contract, a fake guest, and the guardian.

mod jobs;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use vmferry_datapath::{PageCount, RamBlock, RamLayout};
use vmferry_session::{
    AttemptId, CipherSuite, ConvergePlan, Decoder, GuestFacts, History, LaneTransport, Limits, Message,
    Offer, OnNoConverge, Predictor, Priors, RoundReport, RunningToken, SessionError, SourceAction,
    SourceEvent, SourceOutcome, SourcePlan, SourceSession, VERSION,
};

use super::fake_guest::PAGES;
use super::guardian::Guardian;
use super::network::{Brought, ConnectionId, Delivery};
pub(super) use jobs::SourceJob;
use jobs::{Doing, Moving};

use super::{Common, Due, End, FakeGuest, Network};

/// The attempt of every story.
const ATTEMPT: AttemptId = AttemptId::from_bytes([0xA7; 16]);

/// What the VMM or the guardian was told, and may do although the driver died over it.
#[derive(Clone, Copy, Debug)]
enum Told {
    Pause,
    Resume,
    Retire,
    Seal,
}

/// The sending host.
#[derive(Debug)]
pub struct SourceHost {
    /// The guest, which outlives its driver.
    pub guest: FakeGuest,
    session: Option<SourceSession>,
    inbox: VecDeque<Post>,
    connection: Option<ConnectionId>,
    decoder: Decoder,
    guardian: Guardian,
    outcome: Option<SourceOutcome>,
    interrupted: bool,
    /// Jobs that touch the guest.
    in_flight: u32,
    broken: Option<&'static str>,
    told: Option<Told>,
    dirty_before: BTreeSet<usize>,
    held: BTreeSet<usize>,
    last_scan: Duration,
    wake_at: Option<Duration>,
}

/// What the driver tells the session.
#[derive(Debug)]
enum Post {
    Event(SourceEvent),
    Round(RoundReport),
}

/// What the guests of all stories say about themselves.
pub(super) fn facts() -> GuestFacts {
    let len = PageCount(u64::try_from(PAGES).unwrap_or(0)).bytes();
    let block = RamBlock { name: "ram".into(), len, page_bytes: 4096 };
    let layout = RamLayout::new(vec![block]).unwrap_or_else(|error| unreachable!("{error}"));
    GuestFacts { kind: "fake".into(), name: "fake".into(), facts: BTreeMap::new(), layout }
}

fn refused() -> SessionError {
    SessionError::HostRefused("the story wants it so".into())
}

impl SourceHost {
    pub(super) fn new(_common: &mut Common, guest: FakeGuest) -> Self {
        Self {
            guest,
            session: None,
            inbox: VecDeque::new(),
            connection: None,
            decoder: Decoder::default(),
            guardian: Guardian::Watching,
            outcome: None,
            interrupted: false,
            in_flight: 0,
            broken: None,
            told: None,
            dirty_before: BTreeSet::new(),
            held: BTreeSet::new(),
            last_scan: Duration::ZERO,
            wake_at: None,
        }
    }

    /// How the driver's report read, if it lived to give one.
    pub const fn outcome(&self) -> Option<&SourceOutcome> {
        self.outcome.as_ref()
    }

    pub(super) fn begin(&mut self, common: &mut Common) {
        self.connection = Some(Network::connect(common));
        let limits = Limits { whole: common.story.timeout, ..Limits::DEFAULT };
        let offer = Offer {
            transports: vec![LaneTransport::Tcp],
            attempt: ATTEMPT,
            versions: vec![VERSION],
            ciphers: vec![CipherSuite::Aes256Gcm],
            compressions: vec![],
            lanes: 1,
            verify: common.story.verify,
            guest: facts(),
        };
        // Most moves fit easily, some need luck or a slower guest, some are out of reach.
        let generous = common.dice.per_mille(700);
        let downtime_limit =
            if generous { Duration::from_millis(300) } else { common.dice.time(10_000, 24_000) };
        let on_no_converge = match common.dice.below(3) {
            0 => OnNoConverge::Abort,
            1 => OnNoConverge::Throttle,
            _ => OnNoConverge::Force,
        };
        let converge = ConvergePlan { downtime_limit, on_no_converge };
        let predictor = Predictor::new(Priors::PROCESS, &History::default());
        let plan = SourcePlan { offer, limits, converge, predictor };
        let (session, actions) = SourceSession::begin(RunningToken::claim(), plan, common.calendar.now());
        self.session = Some(session);
        self.perform_all(actions, common);
        self.keep_time(common);
    }

    /// Posts, and everything that follows from it at once.
    fn post(&mut self, post: Post, common: &mut Common) {
        self.inbox.push_back(post);
        while let Some(post) = self.inbox.pop_front() {
            let Some(session) = &mut self.session else { return };
            let now = common.calendar.now();
            let actions = match post {
                Post::Event(event) => session.handle(event, now),
                Post::Round(report) => session.round_done(&report, now),
            };
            self.perform_all(actions, common);
        }
        self.keep_time(common);
    }

    fn event(&mut self, event: SourceEvent, common: &mut Common) {
        self.post(Post::Event(event), common);
    }

    fn keep_time(&mut self, common: &mut Common) {
        let deadline = self.session.as_ref().and_then(SourceSession::deadline);
        if deadline != self.wake_at {
            self.wake_at = deadline;
            deadline.into_iter().for_each(|at| common.calendar.schedule_at(at, Due::Wake(End::Source)));
        }
    }

    pub(super) fn wake(&mut self, common: &mut Common) {
        if self.wake_at.is_some_and(|at| common.calendar.now() >= at) {
            self.wake_at = None;
            self.event(SourceEvent::Tick, common);
        }
    }

    pub(super) fn cancel(&mut self, common: &mut Common) {
        self.event(SourceEvent::Cancel, common);
    }

    pub(super) fn guest_writes(&mut self, common: &mut Common) {
        self.guest.live(&mut common.dice);
        if self.session.is_some() && self.guest.runs() {
            let soon = common.dice.time(2_000, 20_000);
            common.calendar.schedule(soon, Due::GuestWrites);
        }
    }

    fn perform_all(&mut self, actions: Vec<SourceAction>, common: &mut Common) {
        for action in actions {
            self.perform(action, common);
        }
    }

    fn perform(&mut self, action: SourceAction, common: &mut Common) {
        match action {
            SourceAction::Send(message) => self.send(&message, common),
            SourceAction::OpenLanes(_) => self.begin_job(Doing::Move(Moving::OpenLanes), 3_000, common),
            SourceAction::Attach => self.begin_job(Doing::Move(Moving::Attach), 3_000, common),
            SourceAction::CopyRound { round } => self.copy_round(round, common),
            SourceAction::SetThrottle { percent } => self.throttle(percent, common),
            SourceAction::Pause(token) => {
                self.told = Some(Told::Pause);
                self.begin_job(Doing::Pause(token.pause()), 5_000, common);
            }
            SourceAction::SendLast => self.begin_job(Doing::Move(Moving::SendLast), 5_000, common),
            SourceAction::SaveState => self.begin_job(Doing::Move(Moving::SaveState), 8_000, common),
            SourceAction::FinishLanes => self.begin_job(Doing::Move(Moving::FinishLanes), 2_000, common),
            SourceAction::RecordSeal => {
                self.told = Some(Told::Seal);
                self.begin_job(Doing::RecordSeal, 500, common);
            }
            SourceAction::ClearSeal => self.guardian.unseal(),
            SourceAction::ReconnectAndAsk { .. } => self.begin_job(Doing::Reconnect, 50_000, common),
            SourceAction::Interrupt => self.interrupted = true,
            SourceAction::Resume(token) => {
                if self.in_flight > 0 {
                    self.broken = Some("the guest was resumed while it was still being worked on");
                }
                self.told = Some(Told::Resume);
                self.begin_job(Doing::Resume(token), 5_000, common);
            }
            SourceAction::CloseLanes => Network::cut_lanes(common),
            SourceAction::Detach => self.guest.detach(),
            SourceAction::Retire(token) => {
                self.told = Some(Told::Retire);
                self.begin_job(Doing::Retire(token), 5_000, common);
            }
            SourceAction::Finish(outcome) => self.finish(outcome, common),
        }
    }

    fn begin_job(&mut self, doing: Doing, at_most_us: u64, common: &mut Common) {
        if !matches!(doing, Doing::Reconnect) {
            self.in_flight += 1;
        }
        let takes = common.dice.time(at_most_us / 10, at_most_us);
        common.calendar.schedule(takes, Due::Source(SourceJob { doing }));
    }

    fn send(&mut self, message: &Message, common: &mut Common) {
        let sent = self.connection.is_some_and(|at| Network::send(common, at, End::Source, message));
        if !sent && self.connection.take().is_some() {
            self.inbox.push_back(Post::Event(SourceEvent::ControlLost("a write failed".into())));
        }
    }

    fn throttle(&mut self, percent: u8, common: &mut Common) {
        if percent > 0 && common.dice.per_mille(common.story.refusals_per_mille * 5) {
            self.inbox.push_back(Post::Event(SourceEvent::ThrottleFailed(refused())));
        } else {
            self.guest.set_throttle(percent);
        }
    }

    fn finish(&mut self, outcome: SourceOutcome, common: &mut Common) {
        // On a guest that would not resume, the guardian is let go without dismissal: it tries once more.
        if matches!(outcome, SourceOutcome::PausedHere { .. }) {
            common.calendar.schedule(Duration::from_millis(20), Due::GuardianNotices);
        } else {
            self.guardian.dismiss();
        }
        self.outcome = Some(outcome);
        self.end_driver(common);
    }

    fn end_driver(&mut self, common: &mut Common) {
        self.session = None;
        if let Some(connection) = self.connection.take() {
            Network::close(common, connection, End::Source);
        }
    }

    pub(super) fn on_delivery(&mut self, delivery: &Delivery, common: &mut Common) {
        if self.connection != Some(delivery.connection) || !common.network.gets_through(delivery) {
            return;
        }
        match &delivery.what {
            Brought::Opened => {}
            Brought::Bytes(bytes) => {
                self.decoder.push(bytes);
                while let Ok(Some(message)) = self.decoder.next_message() {
                    self.event(SourceEvent::Message(message), common);
                }
            }
            Brought::Closed => {
                self.connection = None;
                self.event(SourceEvent::ControlLost("the connection ended".into()), common);
            }
        }
    }

    /// `kill -9`: what it had told the VMM or the guardian happens at once or never.
    pub(super) fn kill(&mut self, common: &mut Common) -> Result<(), String> {
        if self.session.is_none() {
            return Ok(());
        }
        match self.told.take().filter(|_| common.dice.per_mille(500)) {
            Some(Told::Pause) => self.guest.pause(),
            Some(Told::Resume) => self.guest.run()?,
            Some(Told::Retire) => self.guest.end()?,
            Some(Told::Seal) => {
                self.guardian.seal();
            }
            None => {}
        }
        // The kernel closes what the process held, the userfaultfd too.
        self.guest.detach();
        self.end_driver(common);
        Network::cut_lanes(common);
        let notices = common.dice.time(1_000, 50_000);
        common.calendar.schedule(notices, Due::GuardianNotices);
        Ok(())
    }

    pub(super) fn kill_guardian(&mut self) {
        self.guardian.kill();
    }

    pub(super) fn guardian_notices(&mut self) {
        self.guardian.notice(&mut self.guest);
    }

    /// Why nobody runs the guest, where somebody says so.
    pub(super) fn named_doubt(&self) -> Option<String> {
        match (&self.outcome, &self.guardian) {
            (Some(SourceOutcome::InDoubt { last }), _) => Some(format!("in doubt: {last}")),
            (Some(SourceOutcome::PausedHere { refusal, .. }), _) => Some(format!("paused here: {refusal}")),
            (None, Guardian::SaysInDoubt) => Some("in doubt, says the guardian".into()),
            (None, Guardian::Dead) => Some("driver and guardian both died".into()),
            _ => None,
        }
    }

    /// No driver hangs, and no guest keeps a trace.
    pub(super) fn check_end(&self) -> Result<(), String> {
        if let Some(law) = self.broken {
            return Err(law.into());
        }
        if self.session.is_some() {
            return Err(format!("the source's driver waits for nothing: {self:?}"));
        }
        if self.guest.tracked() {
            return Err("the source left its tracker behind".into());
        }
        let someone_cared =
            self.outcome.is_some() || !matches!(self.guardian, Guardian::Dead | Guardian::SaysInDoubt);
        if self.guest.throttle() > 0 && someone_cared {
            return Err(format!("the guest is still slowed down: {self:?}"));
        }
        Ok(())
    }
}
