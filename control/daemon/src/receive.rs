//! `vmferry receive`: waits for one guest and runs it here.
//!
//! ```text
//!   open the guest ─► door ─► concierge ─► TargetSession::listen ─► loop { action ─► VMM, lanes ─► answer } ─► report
//! ```
//!
//! What must never happen: the guest run without the licence that only a Commit gives.

mod concierge;
mod devices;
mod spool;
mod terms;

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_datapath::{GuestRam, LaneTotals, Meter, Receiver};
use vmferry_guest::{DeviceFacts, GuestError, TargetGuest, open_target_with};
use vmferry_session::{
    Agreement, FinalTotals, Limits, Message, RunFailure, RunLicence, SessionError, TargetAction, TargetEvent,
    TargetOutcome, TargetSession, TargetWork, VacantToken,
};

use crate::blame;
use crate::channel::Security;
use crate::cli::{Fallback, ReceiveArgs};
use crate::door::Door;
use crate::endpoint::{Endpoint, Transport};
use crate::fabric;
use crate::failure::Failure;
use crate::hold::Hold;
use crate::interrupt;
use crate::keys;
use crate::lanes::{self, LANES_TIMEOUT, LaneWire, PinFrom};
use crate::pilot::{Machine, Pilot};
use crate::report::{MoveReport, PhaseReport, cpu_seconds, own_memory_bytes};
use crate::send::cipher;
use concierge::{LaneArrivals, Line};
use devices::{DeviceLoaders, LoadedDevice};
use spool::Spool;

/// Between two looks at the mailbox while lanes are awaited.
const GATHER_STEP: Duration = Duration::from_millis(5);
/// Between two looks at the lanes' health while nothing else happens.
const LANE_WATCH: Duration = Duration::from_millis(20);

/// Waits for a guest. The report is filled in whatever happens.
pub fn receive(args: &ReceiveArgs) -> (MoveReport, Result<(), Failure>) {
    let mut listen = args.listen.clone();
    let done = receive_once(args, &mut listen);
    let lost = matches!(done.1, Err(Failure::Unavailable(_)));
    match (&done.1, args.rdma.rdma_fallback) {
        (Err(why), Some(Fallback::Tcp)) if lost && listen.transport == Transport::Rdma => {
            eprintln!("vmferry: {why}; waiting once more, over tcp, as --rdma-fallback says");
            listen.transport = Transport::Tcp;
            receive_once(args, &mut listen)
        }
        _ => done,
    }
}

/// Waits at `listen`, which names the port afterwards also where it named none.
fn receive_once(args: &ReceiveArgs, listen: &mut Endpoint) -> (MoveReport, Result<(), Failure>) {
    let mut report = MoveReport::default();
    let result = Reception::begin(args, listen).and_then(|reception| reception.run(&mut report));
    report.conclude(&result);
    (report, result)
}

impl Machine for TargetSession {
    type Event = TargetEvent;
    type Action = TargetAction;

    fn handle(&mut self, event: TargetEvent, now: Duration) -> Vec<TargetAction> {
        TargetSession::handle(self, event, now)
    }

    fn deadline(&self) -> Option<Duration> {
        TargetSession::deadline(self)
    }

    fn tick() -> TargetEvent {
        TargetEvent::Tick
    }

    fn interrupts(action: &TargetAction) -> bool {
        matches!(action, TargetAction::Interrupt)
    }
}

/// One wait for one guest.
struct Reception<'a> {
    args: &'a ReceiveArgs,
    door: Door,
    line: Line,
    lane_arrivals: LaneArrivals,
    cpus: Vec<usize>,
    pilot: Pilot<TargetSession>,
    guest: Box<dyn TargetGuest>,
    ram: Arc<GuestRam>,
    pins: Option<fabric::Pins>,
    receiver: Option<Receiver>,
    spool: Option<Spool>,
    devices: DeviceLoaders,
    loaded: Vec<LoadedDevice>,
    state: Option<(tempfile::SpooledTempFile, u64)>,
    agreement: Option<Agreement>,
    meter: Option<Meter>,
    memory_peak: u64,
    verified: Option<bool>,
    outcome: Option<TargetOutcome>,
    lane_failure_told: bool,
    hold: Hold,
}

impl<'a> Reception<'a> {
    fn begin(args: &'a ReceiveArgs, listen: &mut Endpoint) -> Result<Self, Failure> {
        let guest = open_target_with(&args.guest, &args.primaries).map_err(|e| blame::refused_guest(&e))?;
        DeviceFacts::refuse_unmovable(guest.devices()).map_err(|e| blame::refused_guest(&e))?;
        let security = match &args.security.tls_dir {
            Some(dir) => Security::Tls(keys::server_config(dir)?),
            None => Security::InsecurePlaintext,
        };
        let cpus = lanes::lane_cpus(args.cpus.as_ref(), PinFrom::High)?;
        let ram = guest.ram();
        let limits = Limits::for_move(None, ram.layout().total_bytes().0, true);
        let rdma = listen.transport == Transport::Rdma;
        let pins = rdma.then(|| terms::pins(args, ram.layout().total_bytes().0)).transpose()?;
        let terms = terms::terms(args, guest.as_ref(), pins.as_ref());
        let began = clock();
        let session = TargetSession::listen(VacantToken::claim(), terms, limits, Duration::ZERO);
        let pilot = Pilot::new(session, Vec::new(), began);
        let door = Door::open(listen, security)?;
        *listen = door.endpoint();
        let (line, lane_arrivals) = concierge::start(&door, &pilot.post())?;
        Ok(Self {
            args,
            door,
            line,
            lane_arrivals,
            cpus,
            pilot,
            guest,
            ram,
            pins,
            receiver: None,
            spool: None,
            devices: DeviceLoaders::default(),
            loaded: Vec::new(),
            state: None,
            agreement: None,
            meter: None,
            memory_peak: 0,
            verified: None,
            outcome: None,
            lane_failure_told: false,
            hold: Hold::of("receive"),
        })
    }

    fn run(mut self, report: &mut MoveReport) -> Result<(), Failure> {
        let post = self.pilot.post();
        let interrupts = interrupt::forward(move || post.send(TargetEvent::Cancel).is_ok())
            .map_err(|e| Failure::Bug(format!("signals could not be caught: {e}")))?;
        eprintln!("vmferry: waiting for a guest on {}", self.door.endpoint());
        self.watch_clock();
        while let Some(action) = self.next_action() {
            self.act(action);
            self.memory_peak = self.memory_peak.max(own_memory_bytes());
            if self.outcome.is_some() {
                break;
            }
        }
        self.fill(report);
        self.conclude(interrupts.came())
    }

    /// The next action; a lane that fails while nothing else happens is an event, told once.
    fn next_action(&mut self) -> Option<TargetAction> {
        let (receiver, told, peak) = (&self.receiver, &mut self.lane_failure_told, &mut self.memory_peak);
        self.pilot.next_action(LANE_WATCH, &mut || {
            *peak = (*peak).max(own_memory_bytes());
            let error = receiver.as_ref().filter(|_| !*told)?.failure()?;
            *told = true;
            Some(TargetEvent::LanesFailed(blame::lane_error(&error)))
        })
    }

    /// Ends the wait at `--timeout` while nobody has come.
    fn watch_clock(&self) {
        let Some(limit) = self.args.timeout else { return };
        let (post, line) = (self.pilot.post(), self.line.clone());
        std::thread::spawn(move || {
            std::thread::sleep(limit);
            line.channel().is_none().then(|| post.send(TargetEvent::Cancel))
        });
    }

    fn act(&mut self, action: TargetAction) {
        self.hold.reached(self.pilot.machine().phase());
        match action {
            TargetAction::Send(message) => self.send(&message),
            TargetAction::Prepare(agreement) => {
                self.agreement = Some(agreement);
                let event = match self.guest.prepare() {
                    Ok(()) => TargetEvent::Prepared,
                    Err(error) => TargetEvent::WorkFailed(TargetWork::Prepare, blame::guest_error(&error)),
                };
                self.pilot.feed(event);
            }
            TargetAction::AcceptLanes(agreement) => {
                let event = match self.accept_lanes(&agreement) {
                    Ok(()) => TargetEvent::LanesAccepted,
                    Err(error) => TargetEvent::WorkFailed(TargetWork::AcceptLanes, error),
                };
                self.pilot.feed(event);
            }
            TargetAction::AwaitLanes(totals) => {
                let event = self
                    .await_lanes(&totals)
                    .unwrap_or_else(|e| TargetEvent::WorkFailed(TargetWork::AwaitLanes, e));
                self.pilot.feed(event);
            }
            TargetAction::LoadState(token, age) => self.load_state(token, age),
            TargetAction::Run(licence) => self.run_guest(licence),
            TargetAction::Interrupt => {}
            TargetAction::Discard => {
                self.close_lanes();
                self.devices.leave();
                self.guest.discard();
                self.pilot.feed(TargetEvent::Discarded);
            }
            TargetAction::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    fn send(&mut self, message: &Message) {
        let sent = self.line.send(message);
        if let Message::Refuse(reason) = message {
            eprintln!("vmferry: refused an offer: {reason}");
            self.line.vacate();
        }
        let settled = if let Message::Running(_) = message { self.guest.settle() } else { Ok(()) };
        if let Err(error) = settled {
            tracing::warn!("the VMM's migration settings could not be given back: {error}");
        }
        if let Err(failure) = sent {
            self.pilot.feed(TargetEvent::ControlLost(failure.to_string()));
        }
    }

    fn accept_lanes(&mut self, agreement: &Agreement) -> Result<(), SessionError> {
        let streams = self.gather(agreement)?;
        let channel = self
            .line
            .channel()
            .ok_or_else(|| SessionError::LinkLost("the control connection was lost".into()))?;
        let ram = &self.ram;
        let pins = self.pins.as_ref().filter(|_| agreement.transport.is_direct());
        let direct = pins.map(|pins| fabric::Direct::target(Arc::clone(ram), pins, agreement.lanes));
        let (attempt, direct, cpus) = (&agreement.attempt, direct.as_ref(), &self.cpus);
        let ends = streams
            .into_iter()
            .zip(0u16..)
            .map(|(wire, lane)| lanes::lane_end(&channel, attempt, lane, wire, direct, cpus))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|failure| SessionError::HostRefused(failure.to_string()))?;
        let (ram, cipher) = (Arc::clone(&self.ram), cipher(agreement.cipher));
        let count = devices::stream_count(self.guest.as_ref());
        let (receiver, mut streams) =
            Receiver::start_with_devices(ram, ends, cipher, count).map_err(|e| blame::lane_error(&e))?;
        let of_devices = streams.split_off(1);
        self.devices = DeviceLoaders::start(self.guest.as_mut(), of_devices, &self.pilot.post())?;
        let stream =
            streams.pop().ok_or_else(|| SessionError::Bug("the VMM's state has no stream".into()))?;
        self.spool = Some(Spool::start(stream).map_err(|e| SessionError::HostRefused(e.to_string()))?);
        self.receiver = Some(receiver);
        Ok(())
    }

    /// Waits until every lane of the attempt has arrived.
    fn gather(&mut self, agreement: &Agreement) -> Result<Vec<LaneWire>, SessionError> {
        let until = self.pilot.now() + LANES_TIMEOUT;
        let mut streams: Vec<Option<LaneWire>> = (0..agreement.lanes).map(|_| None).collect();
        while streams.iter().any(Option::is_none) {
            if let Ok((hello, wire)) = self.lane_arrivals.recv_timeout(GATHER_STEP) {
                let awaited = hello.attempt == agreement.attempt && wire.fits(agreement.transport);
                match streams.get_mut(usize::from(hello.lane)) {
                    Some(place @ None) if awaited => *place = Some(wire),
                    // The first one holds the place: a second hello for it is not the source's.
                    _ => tracing::warn!(lane = hello.lane, "a lane that is not awaited was dropped"),
                }
            }
            if !self.pilot.pump() {
                return Err(SessionError::Cancelled);
            }
            if self.pilot.now() >= until {
                return Err(SessionError::LinkLost(format!(
                    "not all of the {} lanes arrived within {} s: is a firewall counting connections?",
                    agreement.lanes,
                    LANES_TIMEOUT.as_secs()
                )));
            }
        }
        Ok(streams.into_iter().flatten().collect())
    }

    fn await_lanes(&mut self, totals: &FinalTotals) -> Result<TargetEvent, SessionError> {
        let began = clock();
        let receiver = self
            .receiver
            .as_mut()
            .ok_or_else(|| SessionError::Bug("Final before the lanes were open".into()))?;
        let tallies: Vec<LaneTotals> = totals
            .lanes
            .iter()
            .map(|t| LaneTotals { lane: t.lane, records: t.records, bytes: t.bytes })
            .collect();
        let pilot = &mut self.pilot;
        let complete =
            receiver.wait_complete(&tallies, &mut || pilot.pump()).map_err(|e| blame::lane_error(&e))?;
        if !complete {
            return Err(SessionError::Cancelled);
        }
        let spool = self.spool.take().ok_or_else(|| SessionError::Bug("no state was spooled".into()))?;
        let state = spool
            .finish()
            .map_err(|e| SessionError::LinkLost(format!("the device state did not arrive: {e}")))?;
        let state_bytes = state.1;
        self.state = Some(state);
        let complete_us = micros(began.elapsed());
        let digest = match self.agreement {
            Some(Agreement { verify: true, .. }) => Some(self.digest()?),
            _ => None,
        };
        if let (Some(theirs), Some(ours)) = (&totals.digest, &digest) {
            self.verified = Some(theirs == ours);
        }
        Ok(TargetEvent::RamComplete { state_bytes, digest, complete_us })
    }

    fn digest(&self) -> Result<String, SessionError> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        self.ram
            .digest(cpus)
            .map(|digest| digest.to_string())
            .map_err(|e| SessionError::HostRefused(e.to_string()))
    }

    fn load_state(&mut self, token: VacantToken, age: Duration) {
        let began = clock();
        let loaded = match self.state.as_mut() {
            Some((spool, _)) => self.guest.load_state(spool, age).map_err(|e| blame::guest_error(&e)),
            None => Err(SessionError::Bug("no state to load".into())),
        };
        let event = match loaded {
            Ok(_) => self.wait_for_devices(token, began.elapsed()),
            Err(error) => TargetEvent::WorkFailed(TargetWork::LoadState, error),
        };
        self.pilot.feed(event);
    }

    /// The VMM has its own state since `load`; now the devices, which have loaded theirs meanwhile.
    fn wait_for_devices(&mut self, token: VacantToken, load: Duration) -> TargetEvent {
        let began = clock();
        let (devices, pilot) = (&self.devices, &mut self.pilot);
        match devices.finish(&mut || pilot.pump()) {
            Ok(loaded) => {
                let devices = devices::times(began.elapsed(), &loaded);
                self.loaded = loaded;
                TargetEvent::StateLoaded { guest: token.loaded(), load_us: micros(load), devices }
            }
            Err(error) => TargetEvent::WorkFailed(TargetWork::LoadState, error),
        }
    }

    fn run_guest(&mut self, licence: RunLicence) {
        let began = clock();
        let ran = self.guest.run();
        licence.spend();
        let event = match ran {
            Ok(()) => TargetEvent::Ran { run_us: micros(began.elapsed()) },
            Err(error @ GuestError::Ended(_)) => {
                TargetEvent::RunFailed(RunFailure::DidNotRun(blame::guest_error(&error)))
            }
            // Whether the VMM took the order before it failed is not known here.
            Err(error) => TargetEvent::RunFailed(RunFailure::Unsure(blame::guest_error(&error))),
        };
        // The lanes are closed at the end: joining them now would keep the source waiting for `Running`.
        self.pilot.feed(event);
    }

    fn close_lanes(&mut self) {
        if let Some(mut receiver) = self.receiver.take() {
            self.meter = Some(receiver.meter());
            receiver.abort();
        }
    }

    fn fill(&mut self, report: &mut MoveReport) {
        self.close_lanes();
        let session = self.pilot.machine();
        report.phases =
            session.phases().into_iter().map(|span| PhaseReport { name: span.name, ms: span.ms }).collect();
        // The wait for a source is no part of the move.
        report.total_ms = report
            .phases
            .iter()
            .filter(|p| p.name != "listen" && p.name != "ran" && p.name != "refused")
            .map(|p| p.ms)
            .sum();
        report.ram.total_bytes = self.ram.layout().total_bytes().0;
        report.devices = devices::lines(self.guest.devices(), &self.loaded);
        report.device_state_bytes = self.state.as_ref().map_or(0, |(_, len)| *len);
        report.cipher = self.agreement.map_or_else(String::new, |agreed| cipher(agreed.cipher).to_string());
        report.cpu_seconds = cpu_seconds();
        report.own_memory_peak_bytes = self.memory_peak;
        report.verified = self.verified;
        report.turned_away = Some(self.door.turned_away());
        report.notes.extend(self.guest.description().notes.iter().cloned());
        if let Some(meter) = &self.meter {
            let receiving: f64 = report
                .phases
                .iter()
                .filter(|p| p.name == "receive" || p.name == "complete")
                .map(|p| p.ms)
                .sum();
            crate::send::fill_lanes(report, meter, receiving);
        }
    }

    fn conclude(mut self, interrupted: bool) -> Result<(), Failure> {
        match self.outcome.take() {
            Some(TargetOutcome::RunsHere) => Ok(()),
            Some(TargetOutcome::NeverRan { cause: SessionError::Cancelled }) if interrupted => {
                Err(Failure::Interrupted("interrupted; the guest never ran here".into()))
            }
            Some(TargetOutcome::NeverRan { cause: SessionError::Cancelled })
                if self.line.channel().is_none() =>
            {
                Err(Failure::Cancelled("no source came within --timeout; the guest never ran here".into()))
            }
            Some(TargetOutcome::NeverRan { cause }) => Err(blame::ended(&cause, "the guest never ran here")),
            Some(TargetOutcome::Unknown { cause }) => Err(Failure::InDoubt(format!(
                "Commit arrived and the VMM's answer is not known ({cause}): look at this VMM before you touch the source's guest"
            ))),
            None => Err(Failure::Bug("the wait stopped without an end".into())),
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[expect(clippy::disallowed_methods, reason = "the driver is where time comes from")]
fn clock() -> Instant {
    Instant::now()
}
