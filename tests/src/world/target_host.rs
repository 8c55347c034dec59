//! The receiving host: the real machine, a driver that obeys its contract, and a fake guest.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use vmferry_session::{
    AbortReason, CipherSuite, Decoder, DeviceTimes, FinalTotals, LaneTransport, Limits, Message, RunFailure,
    RunLicence, SessionError, TargetAction, TargetEvent, TargetOutcome, TargetSession, TargetTerms,
    TargetWork, VERSION, VacantToken,
};

use super::network::{Brought, ConnectionId, Delivery, Record};
use super::source_host::facts;
use super::{Common, Due, End, FakeGuest, Network};

/// How often a waiting job looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// Something that the driver does in the background, or that its lanes do to it.
#[derive(Debug)]
pub(super) struct TargetJob {
    doing: Doing,
}

#[derive(Debug)]
enum Doing {
    Prepare,
    AcceptLanes,
    AwaitLanes(FinalTotals),
    Load(VacantToken),
    Run(RunLicence),
    Discard,
    LanesBring(usize),
    LanesBroke,
}

impl TargetJob {
    pub(super) const fn lanes_bring(records: usize) -> Self {
        Self { doing: Doing::LanesBring(records) }
    }

    pub(super) const fn lanes_broke() -> Self {
        Self { doing: Doing::LanesBroke }
    }
}

/// Which process is at the target's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Process {
    /// The receiver that the story began with.
    First,
    /// A later one, which has another, empty guest and knows nothing.
    Stranger,
    /// None.
    Dead,
}

/// What the VMM was told, and may do although the driver died over it.
#[derive(Clone, Copy, Debug)]
enum Told {
    Run,
    Discard,
}

/// The receiving host.
#[derive(Debug)]
pub struct TargetHost {
    /// The guest, which outlives its driver.
    pub guest: FakeGuest,
    session: Option<TargetSession>,
    process: Process,
    inbox: VecDeque<TargetEvent>,
    decoders: BTreeMap<ConnectionId, Decoder>,
    newest: Option<ConnectionId>,
    spool: Option<u64>,
    interrupted: bool,
    told: Option<Told>,
    outcome: Option<TargetOutcome>,
    wake_at: Option<Duration>,
}

fn refused() -> SessionError {
    SessionError::HostRefused("the story wants it so".into())
}

fn listen(now: Duration) -> TargetSession {
    let terms = TargetTerms {
        transports: vec![LaneTransport::Tcp],
        versions: vec![VERSION],
        ciphers: vec![CipherSuite::Aes256Gcm],
        compressions: vec![],
        lanes_max: 8,
        guest: facts(),
    };
    TargetSession::listen(VacantToken::claim(), terms, Limits::DEFAULT, now)
}

impl TargetHost {
    pub(super) fn new(common: &mut Common, guest: FakeGuest) -> Self {
        common.network.target_listens = true;
        Self {
            guest,
            session: Some(listen(common.calendar.now())),
            process: Process::First,
            inbox: VecDeque::new(),
            decoders: BTreeMap::new(),
            newest: None,
            spool: None,
            interrupted: false,
            told: None,
            outcome: None,
            wake_at: None,
        }
    }

    /// How the driver's report read, if it lived to give one.
    pub const fn outcome(&self) -> Option<&TargetOutcome> {
        self.outcome.as_ref()
    }

    fn post(&mut self, event: TargetEvent, common: &mut Common) {
        self.inbox.push_back(event);
        while let Some(event) = self.inbox.pop_front() {
            let Some(session) = &mut self.session else { return };
            for action in session.handle(event, common.calendar.now()) {
                self.perform(action, common);
            }
        }
        let deadline = self.session.as_ref().and_then(TargetSession::deadline);
        if deadline != self.wake_at {
            self.wake_at = deadline;
            deadline.into_iter().for_each(|at| common.calendar.schedule_at(at, Due::Wake(End::Target)));
        }
    }

    pub(super) fn wake(&mut self, common: &mut Common) {
        if self.wake_at.is_some_and(|at| common.calendar.now() >= at) {
            self.wake_at = None;
            self.post(TargetEvent::Tick, common);
        }
    }

    pub(super) fn cancel(&mut self, common: &mut Common) {
        if self.process == Process::First {
            self.post(TargetEvent::Cancel, common);
        }
    }

    fn perform(&mut self, action: TargetAction, common: &mut Common) {
        match action {
            TargetAction::Send(message) => self.send(&message, common),
            TargetAction::Prepare(_) => Self::begin_job(Doing::Prepare, 5_000, common),
            TargetAction::AcceptLanes(_) => Self::begin_job(Doing::AcceptLanes, 1_000, common),
            TargetAction::AwaitLanes(totals) => Self::begin_job(Doing::AwaitLanes(totals), 1_000, common),
            TargetAction::LoadState(token, _) => Self::begin_job(Doing::Load(token), 8_000, common),
            TargetAction::Run(licence) => {
                self.told = Some(Told::Run);
                Self::begin_job(Doing::Run(licence), 5_000, common);
            }
            TargetAction::Interrupt => self.interrupted = true,
            TargetAction::Discard => {
                self.told = Some(Told::Discard);
                Self::begin_job(Doing::Discard, 5_000, common);
            }
            TargetAction::Finish(outcome) => {
                self.outcome = Some(outcome);
                self.end_driver(common);
            }
        }
    }

    fn begin_job(doing: Doing, at_most_us: u64, common: &mut Common) {
        let takes = common.dice.time(at_most_us / 10, at_most_us);
        common.calendar.schedule(takes, Due::Target(TargetJob { doing }));
    }

    fn send(&mut self, message: &Message, common: &mut Common) {
        let sent = self.newest.is_some_and(|at| Network::send(common, at, End::Target, message));
        if !sent && self.newest.take().is_some() {
            self.inbox.push_back(TargetEvent::ControlLost("a write failed".into()));
        }
    }

    fn end_driver(&mut self, common: &mut Common) {
        self.session = None;
        self.process = Process::Dead;
        common.network.target_listens = false;
        for (connection, _) in std::mem::take(&mut self.decoders) {
            Network::close(common, connection, End::Target);
        }
        self.newest = None;
    }

    pub(super) fn job_done(&mut self, job: TargetJob, common: &mut Common) -> Result<(), String> {
        if self.process != Process::First {
            return Ok(());
        }
        let fails = common.dice.per_mille(common.story.refusals_per_mille);
        match job.doing {
            Doing::Prepare => self.prepared(fails, common),
            Doing::AcceptLanes => self.accept_lanes(fails, common),
            Doing::AwaitLanes(totals) => self.await_lanes(totals, common),
            Doing::Load(token) => self.load(token, fails, common),
            Doing::Run(licence) => self.run(licence, fails, common)?,
            Doing::Discard => {
                self.told = None;
                self.guest.end()?;
                self.post(TargetEvent::Discarded, common);
            }
            Doing::LanesBring(records) => self.lanes_bring(records, common),
            Doing::LanesBroke if common.network.lanes.broke() => {
                self.post(TargetEvent::LanesFailed(refused()), common);
            }
            Doing::LanesBroke => {}
        }
        Ok(())
    }

    fn fail(&mut self, work: TargetWork, common: &mut Common) {
        self.post(TargetEvent::WorkFailed(work, refused()), common);
    }

    fn prepared(&mut self, fails: bool, common: &mut Common) {
        if fails || self.interrupted {
            return self.fail(TargetWork::Prepare, common);
        }
        self.guest.clear();
        self.post(TargetEvent::Prepared, common);
    }

    fn accept_lanes(&mut self, fails: bool, common: &mut Common) {
        if fails || self.interrupted || common.network.lanes.broke() {
            self.fail(TargetWork::AcceptLanes, common);
        } else if common.network.lanes.stand() {
            self.post(TargetEvent::LanesAccepted, common);
        } else {
            common.calendar.schedule(LOOK_AGAIN, Due::Target(TargetJob { doing: Doing::AcceptLanes }));
        }
    }

    fn await_lanes(&mut self, totals: FinalTotals, common: &mut Common) {
        let lanes = &common.network.lanes;
        if self.interrupted || lanes.broke() {
            self.fail(TargetWork::AwaitLanes, common);
        } else if lanes.complete(&totals.lanes) {
            let digest = common.story.verify.then(|| self.guest.digest());
            let state_bytes = if self.spool.is_some() { 8 } else { 0 };
            self.post(TargetEvent::RamComplete { state_bytes, digest, complete_us: 1 }, common);
        } else {
            common.calendar.schedule(LOOK_AGAIN, Due::Target(TargetJob { doing: Doing::AwaitLanes(totals) }));
        }
    }

    fn load(&mut self, token: VacantToken, fails: bool, common: &mut Common) {
        let Some(register) = self.spool.filter(|_| !fails && !self.interrupted) else {
            return self.fail(TargetWork::LoadState, common);
        };
        self.guest.load(register);
        self.post(
            TargetEvent::StateLoaded { guest: token.loaded(), load_us: 1, devices: DeviceTimes::default() },
            common,
        );
    }

    fn run(&mut self, licence: RunLicence, fails: bool, common: &mut Common) -> Result<(), String> {
        self.told = None;
        licence.spend();
        let event = match (fails, common.dice.below(3)) {
            (false, _) => {
                self.guest.run()?;
                TargetEvent::Ran { run_us: 1 }
            }
            (true, 0) => TargetEvent::RunFailed(RunFailure::DidNotRun(refused())),
            (true, 1) => TargetEvent::RunFailed(RunFailure::Unsure(refused())),
            (true, _) => {
                self.guest.run()?;
                TargetEvent::RunFailed(RunFailure::Unsure(refused()))
            }
        };
        self.post(event, common);
        Ok(())
    }

    /// Records arrive whether or not the machine is ready for them.
    fn lanes_bring(&mut self, records: usize, common: &mut Common) {
        for record in (0..records).map_while(|_| common.network.lanes.receive()) {
            match record {
                Record::Page(page, content) => self.guest.fill(page, content),
                Record::State(register) => self.spool = Some(register),
                Record::End => {}
            }
        }
    }

    pub(super) fn on_delivery(&mut self, delivery: &Delivery, common: &mut Common) {
        if !common.network.gets_through(delivery) {
            return;
        }
        let connection = delivery.connection;
        match &delivery.what {
            Brought::Opened if self.session.is_some() => {
                self.decoders.insert(connection, Decoder::default());
            }
            Brought::Opened => Network::close(common, connection, End::Target),
            Brought::Bytes(bytes) => {
                let Some(decoder) = self.decoders.get_mut(&connection) else { return };
                decoder.push(bytes);
                let messages: Vec<Message> =
                    std::iter::from_fn(|| decoder.next_message().ok().flatten()).collect();
                messages.into_iter().for_each(|message| self.on_message(connection, message, common));
            }
            Brought::Closed => {
                self.decoders.remove(&connection);
                if self.newest == Some(connection) {
                    self.newest = None;
                    self.post(TargetEvent::ControlLost("the connection ended".into()), common);
                }
            }
        }
    }

    /// Only an Ask about the attempt that is going on makes another connection the newest.
    fn on_message(&mut self, connection: ConnectionId, message: Message, common: &mut Common) {
        let attempt = self.session.as_ref().and_then(TargetSession::attempt);
        let asks = matches!(&message, Message::Ask { attempt: about } if Some(*about) == attempt);
        let is_old = self.newest.is_some_and(|newest| connection < newest);
        if asks || attempt.is_none() {
            self.newest = Some(connection);
        }
        if self.newest == Some(connection) || (is_old && common.story.hears_old_connections) {
            self.post(TargetEvent::Message(message), common);
        } else if !is_old {
            Network::send(common, connection, End::Target, &Message::Refuse(AbortReason::busy()));
        }
    }

    /// `kill -9`: what it had told the VMM happens at once or never.
    pub(super) fn kill(&mut self, common: &mut Common) -> Result<(), String> {
        if self.process != Process::First {
            return Ok(());
        }
        match self.told.take().filter(|_| common.dice.per_mille(500)) {
            Some(Told::Run) => self.guest.run()?,
            Some(Told::Discard) => self.guest.end()?,
            None => {}
        }
        self.end_driver(common);
        common.network.lanes.cut();
        Ok(())
    }

    /// Somebody starts a receiver at the same address, for another guest.
    pub(super) fn restart(&mut self, common: &mut Common) {
        if self.process == Process::Dead {
            self.session = Some(listen(common.calendar.now()));
            self.process = Process::Stranger;
            common.network.target_listens = true;
        }
    }

    /// No driver hangs: one that still lives waits for a source that has not come.
    pub(super) fn check_end(&self) -> Result<(), String> {
        match &self.session {
            Some(session) if session.phase() != "listen" && self.process == Process::First => {
                Err(format!("the target's driver waits for nothing: {self:?}"))
            }
            Some(_) | None => Ok(()),
        }
    }
}
