//! The sending host: the real machine, a driver that obeys its contract, a fake guest, and the guardian.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use vmferry_datapath::{ByteLen, PageCount, RamBlock, RamLayout};
use vmferry_session::{
    AttemptId, CipherSuite, ConvergePlan, Decoder, FinalTotals, GuestFacts, History, Limits, Message, Offer,
    OnNoConverge, PausedToken, Predictor, Priors, RoundReport, RunningToken, SealedToken, SessionError,
    SourceAction, SourceEvent, SourceOutcome, SourcePlan, SourceSession, VERSION, Work,
};

use super::fake_guest::PAGES;
use super::guardian::Guardian;
use super::network::{Brought, ConnectionId, Delivery, Record};
use super::target_host::TargetJob;
use super::{Common, Due, End, FakeGuest, Network};

/// The attempt of every story.
const ATTEMPT: AttemptId = AttemptId::from_bytes([0xA7; 16]);

/// Something that the driver does in the background.
#[derive(Debug)]
pub(super) struct SourceJob {
    doing: Doing,
}

#[derive(Debug)]
enum Doing {
    Move(Moving),
    Pause(PausedToken),
    RecordSeal,
    Reconnect,
    Resume(PausedToken),
    Retire(SealedToken),
}

/// Work that needs the lanes or the tracker, and that can be interrupted.
#[derive(Debug)]
enum Moving {
    OpenLanes,
    Attach,
    CopyRound { report: RoundReport, pages: BTreeSet<usize> },
    SendLast,
    SaveState,
    FinishLanes,
}

impl Moving {
    const fn work(&self) -> Work {
        match self {
            Self::OpenLanes => Work::OpenLanes,
            Self::Attach => Work::Attach,
            Self::CopyRound { .. } => Work::CopyRound,
            Self::SendLast => Work::SendLast,
            Self::SaveState => Work::SaveState,
            Self::FinishLanes => Work::FinishLanes,
        }
    }
}

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
            if generous { Duration::from_millis(300) } else { common.dice.time(7_000, 15_000) };
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
            SourceAction::OpenLanes(_) => Self::begin_job(Doing::Move(Moving::OpenLanes), 3_000, common),
            SourceAction::Attach => Self::begin_job(Doing::Move(Moving::Attach), 3_000, common),
            SourceAction::CopyRound { round } => self.copy_round(round, common),
            SourceAction::SetThrottle { percent } => self.throttle(percent, common),
            SourceAction::Pause(token) => {
                self.told = Some(Told::Pause);
                Self::begin_job(Doing::Pause(token.pause()), 5_000, common);
            }
            SourceAction::SendLast => Self::begin_job(Doing::Move(Moving::SendLast), 5_000, common),
            SourceAction::SaveState => Self::begin_job(Doing::Move(Moving::SaveState), 8_000, common),
            SourceAction::FinishLanes => Self::begin_job(Doing::Move(Moving::FinishLanes), 2_000, common),
            SourceAction::RecordSeal => {
                self.told = Some(Told::Seal);
                Self::begin_job(Doing::RecordSeal, 500, common);
            }
            SourceAction::ClearSeal => self.guardian.unseal(),
            SourceAction::ReconnectAndAsk { .. } => Self::begin_job(Doing::Reconnect, 50_000, common),
            SourceAction::Interrupt => self.interrupted = true,
            SourceAction::Resume(token) => {
                self.told = Some(Told::Resume);
                Self::begin_job(Doing::Resume(token), 5_000, common);
            }
            SourceAction::CloseLanes => Network::cut_lanes(common),
            SourceAction::Detach => self.guest.detach(),
            SourceAction::Retire(token) => {
                self.told = Some(Told::Retire);
                Self::begin_job(Doing::Retire(token), 5_000, common);
            }
            SourceAction::Finish(outcome) => self.finish(outcome, common),
        }
    }

    fn begin_job(doing: Doing, at_most_us: u64, common: &mut Common) {
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

    /// Scan now, send when the job is done: what is written in between is dirty again.
    fn copy_round(&mut self, round: u32, common: &mut Common) {
        let now = common.calendar.now();
        let since_last_scan = now.saturating_sub(self.last_scan);
        self.last_scan = now;
        let mut dirty = self.guest.scan();
        let pages = if round == 1 {
            dirty.clear();
            (0..PAGES).collect()
        } else {
            let hot: BTreeSet<usize> = dirty.intersection(&self.dirty_before).copied().collect();
            let send: BTreeSet<usize> =
                dirty.union(&self.held).filter(|page| !hot.contains(page)).copied().collect();
            self.held = hot;
            send
        };
        let report = RoundReport {
            round,
            since_last_scan: if round == 1 { Duration::ZERO } else { since_last_scan },
            scan: Duration::from_micros(100),
            dirty: count(dirty.len()),
            sent: count(pages.len()),
            held: count(self.held.len()),
            wire: ByteLen(count(pages.len()).0 * 4160),
            sending: Duration::from_millis(2),
            ..RoundReport::default()
        };
        self.dirty_before = dirty;
        Self::begin_job(Doing::Move(Moving::CopyRound { report, pages }), 30_000, common);
    }

    fn send_pages(&self, pages: impl IntoIterator<Item = usize>, common: &mut Common) -> bool {
        let lanes = &mut common.network.lanes;
        let mut records = 0;
        let sent = pages
            .into_iter()
            .inspect(|_| records += 1)
            .all(|page| lanes.send(Record::Page(page, self.guest.read(page))));
        Self::let_arrive(common, records);
        sent
    }

    /// What was just sent arrives after a while; batches keep their order.
    fn let_arrive(common: &mut Common, records: usize) {
        let flight = common.dice.time(50, 20_000);
        common.calendar.schedule(flight, Due::Target(TargetJob::lanes_bring(records)));
    }

    /// A job is done, unless its driver is dead.
    pub(super) fn job_done(&mut self, job: SourceJob, common: &mut Common) -> Result<(), String> {
        if self.session.is_none() {
            return Ok(());
        }
        let fails = common.dice.per_mille(common.story.refusals_per_mille);
        let answer = match job.doing {
            Doing::Pause(token) => self.paused(token, fails, common),
            Doing::Resume(token) => self.resumed(token, fails, common)?,
            Doing::Retire(token) => self.retired(token, fails)?,
            Doing::Reconnect => self.reconnected(fails, common),
            Doing::RecordSeal => self.seal_recorded(fails),
            Doing::Move(moving) => self.moving_done(moving, fails, common),
        };
        self.post(answer, common);
        Ok(())
    }

    fn paused(&mut self, token: PausedToken, fails: bool, common: &mut Common) -> Post {
        self.told = None;
        if !fails || common.dice.per_mille(500) {
            self.guest.pause();
        }
        let event =
            if fails { SourceEvent::PauseFailed(token, refused()) } else { SourceEvent::Paused(token) };
        Post::Event(event)
    }

    fn resumed(&mut self, token: PausedToken, fails: bool, common: &mut Common) -> Result<Post, String> {
        self.told = None;
        if !fails || common.dice.per_mille(500) {
            self.guest.run()?;
            common.calendar.schedule(Duration::ZERO, Due::GuestWrites);
        }
        let event = if fails {
            SourceEvent::ResumeFailed(token, refused())
        } else {
            SourceEvent::Resumed(token.resume())
        };
        Ok(Post::Event(event))
    }

    fn retired(&mut self, token: SealedToken, fails: bool) -> Result<Post, String> {
        self.told = None;
        token.retire();
        if fails {
            return Ok(Post::Event(SourceEvent::RetireFailed(refused())));
        }
        self.guest.end()?;
        Ok(Post::Event(SourceEvent::Retired))
    }

    fn reconnected(&mut self, fails: bool, common: &mut Common) -> Post {
        if fails || self.interrupted || !common.network.target_listens {
            return Post::Event(SourceEvent::WorkFailed(Work::Reconnect, refused()));
        }
        if let Some(old) = self.connection.take() {
            Network::close(common, old, End::Source);
        }
        let connection = Network::connect(common);
        self.connection = Some(connection);
        self.decoder = Decoder::default();
        Network::send(common, connection, End::Source, &Message::Ask { attempt: ATTEMPT });
        Post::Event(SourceEvent::Reconnected)
    }

    fn seal_recorded(&mut self, fails: bool) -> Post {
        self.told = None;
        // A write that fails may have arrived all the same.
        let recorded = self.guardian.seal() && !fails && !self.interrupted;
        let failed = SourceEvent::WorkFailed(Work::RecordSeal, refused());
        Post::Event(if recorded { SourceEvent::SealRecorded } else { failed })
    }

    fn moving_done(&mut self, moving: Moving, fails: bool, common: &mut Common) -> Post {
        let work = moving.work();
        if self.interrupted || fails {
            let error = if fails { refused() } else { SessionError::Cancelled };
            return Post::Event(SourceEvent::WorkFailed(work, error));
        }
        let lost = SessionError::LinkLost("the lanes are gone".into());
        self.try_move(moving, common).unwrap_or(Post::Event(SourceEvent::WorkFailed(work, lost)))
    }

    /// None: the lanes are gone.
    fn try_move(&mut self, moving: Moving, common: &mut Common) -> Option<Post> {
        let event = match moving {
            Moving::OpenLanes => common.network.lanes.open().then_some(SourceEvent::LanesOpened)?,
            Moving::Attach => {
                self.guest.attach();
                SourceEvent::Attached
            }
            Moving::CopyRound { report, pages } => {
                return self.send_pages(pages, common).then_some(Post::Round(report));
            }
            Moving::SendLast => {
                let mut last = self.guest.scan();
                last.append(&mut self.held);
                self.send_pages(last, common).then_some(SourceEvent::LastSent)?
            }
            Moving::SaveState => {
                let register = self.guest.save(&mut common.dice);
                let sent = common.network.lanes.send(Record::State(register));
                Self::let_arrive(common, 1);
                sent.then_some(SourceEvent::StateSaved)?
            }
            Moving::FinishLanes => SourceEvent::LanesFinished(self.finish_lanes(common)?),
        };
        Some(Post::Event(event))
    }

    fn finish_lanes(&mut self, common: &mut Common) -> Option<FinalTotals> {
        let saved_over = self.guest.scan();
        let sent = self.send_pages(saved_over, common) && common.network.lanes.send(Record::End);
        Self::let_arrive(common, 1);
        let digest = common.story.verify.then(|| self.guest.digest());
        sent.then(|| FinalTotals { lanes: vec![common.network.lanes.tally()], state_bytes: 8, digest })
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

fn count(pages: usize) -> PageCount {
    PageCount(u64::try_from(pages).unwrap_or(u64::MAX))
}
