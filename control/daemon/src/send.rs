//! `vmferry send`: moves a running guest to a target where `vmferry receive` waits.
//!
//! ```text
//!   open the guest ─► dial ─► guardian ─► SourceState::begin ─► loop { action ─► hands ─► answer }  ─► report
//!   (refusals first)                        (decides)              (does)
//! ```
//!
//! What must never happen: an end of this process, by any way, that leaves a guest paused that is still this host's.
//! Every way out goes through the machine's `Resume`, and a death goes through the guardian.

mod again;
mod auto_compress;
mod devices;
mod hands;
mod history;
mod input;
mod io_horizon;
mod narrator;
mod terms;

use std::time::{Duration, Instant};

use vmferry_datapath::{Compression, DataError, SendPlan, Sender};
use vmferry_guest::failover::CancelFlag;
use vmferry_guest::{DeviceFacts, open_source_with};
use vmferry_session::{
    Agreement, AttemptId, CompressionMode, FinalTotals, LaneTally, Message, PausedToken, RunningToken,
    SealedToken, SessionError, SourceAction, SourceEvent, SourceOutcome, SourceSession,
    VERSION_WITH_STATE_AGE, Work,
};

use crate::blame;
use crate::channel::{ChannelEvent, ControlChannel, Security};
use crate::cli::{Compress, SendArgs};
use crate::endpoint::Transport;
use crate::fabric;
use crate::failure::Failure;
use crate::guardian::Guardian;
use crate::hold::Hold;
use crate::interrupt;
use crate::keys;
use crate::lanes::{self, PinFrom};
use crate::pilot::Pilot;
use crate::report::MoveReport;
use auto_compress::AutoCompress;
use hands::{Saved, SourceHands, Stopped};
use history::HistoryFile;
use narrator::{Narrator, device_lines};
use terms::{failover, new_attempt, offer, plan};

pub use input::Input;
pub(crate) use narrator::fill_lanes;
pub use terms::{cipher, facts};

/// zstd's level for `--compress`: the fastest that still halves text and zero-rich pages.
const ZSTD_LEVEL: i32 = -1;

/// The longest sleep while nothing happens.
const IDLE: Duration = Duration::from_secs(1);

/// Moves a guest. The report is filled in whatever happens.
pub fn send(args: &SendArgs) -> (MoveReport, Result<(), Failure>) {
    let done = send_once(args);
    match again::instead(args, &done.1) {
        Some(args) => again::patiently(|| send_once(&args)),
        None => done,
    }
}

fn send_once(args: &SendArgs) -> (MoveReport, Result<(), Failure>) {
    let mut report = MoveReport::default();
    let result = Move::begin(args).and_then(|moving| moving.run(&mut report));
    report.conclude(&result);
    (report, result)
}

/// One move, from the source's side.
struct Move<'a> {
    args: &'a SendArgs,
    security: Security<rustls::ClientConfig>,
    cpus: Vec<usize>,
    attempt: AttemptId,
    pilot: Pilot<SourceSession>,
    channel: ControlChannel,
    /// Counts control connections, so that the end of an old one is not taken for the end of the newest.
    connection: std::sync::Arc<std::sync::atomic::AtomicU32>,
    hands: SourceHands,
    guardian: Option<Guardian>,
    history: HistoryFile,
    narrator: Narrator,
    auto_compress: Option<AutoCompress>,
    agreement: Option<Agreement>,
    saved: Option<Saved>,
    hold: Hold,
    cancel: CancelFlag,
    outcome: Option<SourceOutcome>,
}

impl<'a> Move<'a> {
    /// Everything that can be refused before the guest is touched.
    fn begin(args: &'a SendArgs) -> Result<Self, Failure> {
        let began = clock();
        let cancel = CancelFlag::default();
        let guest =
            open_source_with(&args.guest, failover(args, &cancel)).map_err(|e| blame::refused_guest(&e))?;
        let security = match &args.security.tls_dir {
            Some(dir) => Security::Tls(keys::client_config(dir)?),
            None => Security::InsecurePlaintext,
        };
        let cpus = lanes::lane_cpus(args.cpus.as_ref(), PinFrom::Low)?;
        let lanes = lanes::lane_count(args.lanes, &cpus);
        if args.to.transport == Transport::Rdma {
            fabric::check_memlock(lanes)?;
        }
        let attempt = new_attempt()?;
        DeviceFacts::refuse_unmovable(guest.devices()).map_err(|e| blame::refused_guest(&e))?;
        let offer = offer(args, attempt, lanes, guest.as_ref());
        let name = args.tls_hostname.as_ref().unwrap_or(&args.to.host);
        let channel = ControlChannel::connect(&args.to, name, &security)?;
        let guardian = Guardian::start(&args.guest)?;
        let hands = SourceHands::new(guest);
        let ram_bytes = hands.ram().layout().total_bytes().0;
        let history = HistoryFile::of_kind(&hands.guest.description().kind);
        let plan = plan(args, offer, &hands, &history);
        let (session, actions) = SourceSession::begin(RunningToken::claim(), plan, began.elapsed());
        let pilot = Pilot::new(session, actions, began);
        Ok(Self {
            args,
            security,
            cpus,
            attempt,
            pilot,
            channel,
            connection: std::sync::Arc::default(),
            hands,
            guardian: Some(guardian),
            history,
            narrator: Narrator::new(ram_bytes),
            auto_compress: None,
            agreement: None,
            saved: None,
            hold: Hold::of("send"),
            cancel,
            outcome: None,
        })
    }

    fn run(mut self, report: &mut MoveReport) -> Result<(), Failure> {
        let post = self.pilot.post();
        let cancel = self.cancel.clone();
        let interrupts = interrupt::forward(move || {
            cancel.cancel();
            post.send(Input::Event(SourceEvent::Cancel)).is_ok()
        })
        .map_err(|e| Failure::Bug(format!("signals could not be caught: {e}")))?;
        self.listen()?;
        while let Some(action) = self.pilot.next_action(IDLE, &mut || None) {
            self.act(action);
            if self.outcome.is_some() {
                break;
            }
        }
        self.narrator.finish();
        self.fill(report);
        self.conclude(interrupts.came())
    }

    /// Reads the newest control connection into the pilot's mailbox.
    fn listen(&self) -> Result<(), Failure> {
        use std::sync::atomic::Ordering;
        let newest = std::sync::Arc::clone(&self.connection);
        let mine = newest.fetch_add(1, Ordering::SeqCst) + 1;
        let post = self.pilot.post();
        let sink = move |event| {
            if newest.load(Ordering::SeqCst) != mine {
                return false;
            }
            let event = match event {
                ChannelEvent::Message(message) => SourceEvent::Message(message),
                ChannelEvent::Lost(why) => SourceEvent::ControlLost(why),
                ChannelEvent::Misbehaved(why) => SourceEvent::PeerBroke(why),
            };
            post.send(Input::Event(event)).is_ok()
        };
        self.channel
            .start_reader(sink)
            .map_err(|e| Failure::Bug(format!("no thread for the control channel: {e}")))
    }

    fn act(&mut self, action: SourceAction) {
        let now = self.pilot.now();
        self.narrator.action(now, &action);
        self.hold.reached(self.pilot.machine().progress().phase);
        match action {
            SourceAction::Send(message) => self.send_message(&message),
            SourceAction::OpenLanes(agreement) => self.open_lanes(agreement),
            SourceAction::Attach => {
                let done = self.hands.attach().map(|()| SourceEvent::Attached);
                self.answer(done, Work::Attach);
            }
            SourceAction::CopyRound { round } => self.copy_round(round),
            SourceAction::SetThrottle { percent } => {
                if let Err(error) = self.hands.guest.set_throttle(percent) {
                    self.feed(SourceEvent::ThrottleFailed(blame::guest_error(&error)));
                }
            }
            SourceAction::Pause(token) => self.pause(token),
            SourceAction::SendLast => self.send_last(),
            // Begun with `SendLast`, which runs both; alone it would be a change of the session's order.
            SourceAction::SaveState => {
                let error = SessionError::Bug("the state is saved beside the last pages only".into());
                self.feed(SourceEvent::WorkFailed(Work::SaveState, error));
            }
            SourceAction::FinishLanes => {
                let done = self.finish_lanes().map(SourceEvent::LanesFinished);
                self.answer(done, Work::FinishLanes);
            }
            SourceAction::RecordSeal => self.record_seal(),
            SourceAction::ClearSeal => {
                if let Some(Err(failure)) = self.guardian.as_mut().map(Guardian::unseal) {
                    tracing::warn!("{failure}");
                }
            }
            SourceAction::ReconnectAndAsk { attempt } => self.reconnect(attempt),
            SourceAction::Interrupt => {}
            SourceAction::Resume(token) => self.resume(token),
            SourceAction::CloseLanes => self.hands.close_lanes(),
            SourceAction::Detach => self.hands.detach(),
            SourceAction::Retire(token) => self.retire(token),
            SourceAction::Finish(outcome) => self.outcome = Some(outcome),
        }
    }

    fn send_message(&mut self, message: &Message) {
        if let Err(failure) = self.channel.send(message) {
            self.feed(SourceEvent::ControlLost(failure.to_string()));
        }
    }

    /// Feeds an action's answer: its event, or that it failed.
    fn answer(&mut self, done: Result<SourceEvent, Stopped>, work: Work) {
        match done {
            Ok(event) => self.feed(event),
            Err(stopped) => self.failed(work, stopped),
        }
    }

    fn failed(&mut self, work: Work, stopped: Stopped) {
        if matches!(stopped, Stopped::Lane(DataError::LinkLost { .. })) {
            self.pilot.hear_why();
        }
        self.feed(SourceEvent::WorkFailed(work, session_error(stopped)));
    }

    fn open_lanes(&mut self, agreement: Agreement) {
        self.agreement = Some(agreement);
        let opened = lanes::open(&self.channel, &self.args.to, &agreement, self.hands.ram(), &self.cpus)
            .map_err(|failure| SessionError::LinkLost(failure.to_string()))
            .and_then(|ends| {
                let plan = SendPlan {
                    cipher: cipher(agreement.cipher),
                    compression: match agreement.compression {
                        CompressionMode::Zstd => Compression::Zstd { level: ZSTD_LEVEL },
                        CompressionMode::Off | CompressionMode::Other => Compression::Off,
                    },
                    keep_hashes: self.hands.keeps_hashes(),
                    rate_limit: self.args.bandwidth.map(|b| b.bytes_per_s),
                };
                Sender::start(std::sync::Arc::clone(self.hands.ram()), ends, plan)
                    .map_err(|e| blame::lane_error(&e))
            });
        let event = match opened {
            Ok(sender) => {
                if self.args.compress == Compress::Auto {
                    self.auto_compress =
                        Some(AutoCompress::new(&sender, std::sync::Arc::clone(self.hands.ram())));
                }
                self.narrator.watch(sender.meter_reader());
                self.hands.take_sender(sender);
                SourceEvent::LanesOpened
            }
            Err(error) => SourceEvent::WorkFailed(Work::OpenLanes, error),
        };
        self.feed(event);
    }

    fn feed(&mut self, event: SourceEvent) {
        self.pilot.feed(Input::Event(event));
    }

    fn copy_round(&mut self, round: u32) {
        let now = self.pilot.now();
        let (hands, pilot, narrator) = (&mut self.hands, &mut self.pilot, &mut self.narrator);
        let auto_compress = &mut self.auto_compress;
        let done = hands.copy_round(round, now, &mut || {
            let go_on = pilot.pump();
            if let Some(meter) = narrator.glance(pilot.now(), round, pilot.machine()) {
                auto_compress.iter_mut().for_each(|auto| auto.look(pilot.now(), &meter));
            }
            go_on
        });
        match done {
            Ok(report) => {
                let devices = self.hands.device_reports();
                self.pilot.feed(Input::Round(report, devices));
                self.narrator.round(self.pilot.now(), &self.pilot.machine().progress());
            }
            Err(stopped) => self.failed(Work::CopyRound, stopped),
        }
    }

    fn pause(&mut self, token: RunningToken) {
        let token = token.pause();
        let event = match self.hands.pause() {
            Ok(()) => SourceEvent::Paused(token),
            Err(error) => SourceEvent::PauseFailed(token, blame::guest_error(&error)),
        };
        self.feed(event);
    }

    /// The last pages, and the device state beside them: the session asks for both at once.
    fn send_last(&mut self) {
        self.pilot.take_if(|next| *next == SourceAction::SaveState);
        let now = self.pilot.now();
        let (hands, pilot) = (&mut self.hands, &mut self.pilot);
        let (sent, saved) = hands.send_last_and_state(now, &mut || pilot.pump());
        let saved = saved.and_then(|saved| Ok((saved, hands.drain_devices(&mut || pilot.pump())?)));
        match sent {
            Ok(report) => self.pilot.feed(Input::Last(report)),
            Err(stopped) => self.failed(Work::SendLast, stopped),
        }
        match saved {
            Ok((saved, (devices, longer))) => {
                self.saved = Some(saved);
                self.pilot.feed(Input::Saved(saved.took, devices, longer));
            }
            Err(stopped) => self.failed(Work::SaveState, stopped),
        }
    }

    fn finish_lanes(&mut self) -> Result<FinalTotals, Stopped> {
        let now = self.pilot.now();
        let (hands, pilot) = (&mut self.hands, &mut self.pilot);
        let totals = hands.finish_lanes(now, &mut || pilot.pump())?;
        let digest = if self.args.verify { Some(self.hands.digest()?) } else { None };
        let lanes =
            totals.iter().map(|t| LaneTally { lane: t.lane, records: t.records, bytes: t.bytes }).collect();
        Ok(FinalTotals { lanes, state_bytes: self.state_bytes(), digest, state_age_us: self.state_age_us() })
    }

    fn state_bytes(&self) -> u64 {
        self.saved.map_or(0, |saved| saved.bytes.0)
    }

    /// Told to a target that understands it.
    fn state_age_us(&self) -> Option<u64> {
        let told = self.agreement.is_some_and(|agreed| agreed.version >= VERSION_WITH_STATE_AGE);
        let saved = self.saved.filter(|_| told)?;
        Some(u64::try_from(saved.at.elapsed().as_micros()).unwrap_or(u64::MAX))
    }

    fn record_seal(&mut self) {
        let recorded = match self.guardian.as_mut() {
            Some(guardian) => guardian.seal(),
            None => Err(Failure::Bug("no guardian is there to record the seal".into())),
        };
        let event = match recorded {
            Ok(()) => SourceEvent::SealRecorded,
            Err(failure) => {
                SourceEvent::WorkFailed(Work::RecordSeal, SessionError::HostRefused(failure.to_string()))
            }
        };
        self.feed(event);
    }

    fn reconnect(&mut self, attempt: u32) {
        tracing::warn!(attempt, "in doubt: asking the target whether it runs the guest");
        let name = self.args.tls_hostname.as_ref().unwrap_or(&self.args.to.host);
        let asked = ControlChannel::connect(&self.args.to, name, &self.security).and_then(|channel| {
            self.channel = channel;
            self.listen()?;
            self.channel.send(&Message::Ask { attempt: self.attempt })
        });
        let event = match asked {
            Ok(()) => SourceEvent::Reconnected,
            Err(failure) => {
                SourceEvent::WorkFailed(Work::Reconnect, SessionError::LinkLost(failure.to_string()))
            }
        };
        self.feed(event);
    }

    fn resume(&mut self, token: PausedToken) {
        let event = match self.hands.resume() {
            Ok(()) => SourceEvent::Resumed(token.resume()),
            Err(error) => SourceEvent::ResumeFailed(token, blame::guest_error(&error)),
        };
        self.feed(event);
    }

    fn retire(&mut self, token: SealedToken) {
        let retired = self.hands.guest.retire();
        token.retire();
        let event = match retired {
            Ok(()) => SourceEvent::Retired,
            Err(error) => SourceEvent::RetireFailed(blame::guest_error(&error)),
        };
        self.feed(event);
    }

    fn fill(&self, report: &mut MoveReport) {
        let session = self.pilot.machine();
        report.total_ms = self.pilot.now().as_secs_f64() * 1e3;
        report.blackout_ms = session.blackout().map(|b| b.as_secs_f64() * 1e3);
        report.device_state_bytes = self.state_bytes();
        report.cipher = self.agreement.map_or_else(String::new, |agreed| cipher(agreed.cipher).to_string());
        report.ram.total_bytes = self.hands.ram().layout().total_bytes().0;
        report.tracker = self.hands.tracker_name().map(str::to_owned);
        report.scan_ms_max = Some(self.hands.scan_max().as_secs_f64() * 1e3);
        report.notes.extend(self.hands.notes().cloned());
        report.notes.extend(self.auto_compress.as_ref().and_then(AutoCompress::verdict).map(str::to_owned));
        if self.args.verify && matches!(self.outcome, Some(SourceOutcome::Moved { .. })) {
            report.verified = Some(true);
        }
        self.narrator.fill(report, session, self.hands.meter());
        report.devices = device_lines(self.hands.guest.devices(), session, &self.hands.device_drains());
    }

    /// Dismisses the guardian where the guest is safe, and turns the outcome into an exit.
    fn conclude(mut self, interrupted: bool) -> Result<(), Failure> {
        // A blackout with a digest in it says nothing about one without.
        if let Some(record) = self.pilot.machine().record().filter(|_| !self.args.verify) {
            self.history.add(record);
        }
        let guardian = self.guardian.take();
        match self.outcome.take() {
            Some(SourceOutcome::Moved { left_behind }) => {
                dismiss(guardian);
                if let Some(error) = left_behind {
                    eprintln!(
                        "vmferry: the guest runs on the target, but the source's VMM could not be ended ({error}): end it, never resume it"
                    );
                }
                Ok(())
            }
            Some(SourceOutcome::RunsHere { cause }) => {
                dismiss(guardian);
                if interrupted && cause == SessionError::Cancelled {
                    return Err(Failure::Interrupted("interrupted; the guest runs on here".into()));
                }
                Err(blame::ended(&cause, "the guest runs on here"))
            }
            Some(SourceOutcome::PausedHere { cause, refusal }) => {
                // Dropping the guardian without a word makes it try once more.
                drop(guardian);
                Err(blame::ended(
                    &cause,
                    &format!(
                        "the guest is whole but could not be resumed ({refusal}): resume it here by hand"
                    ),
                ))
            }
            Some(SourceOutcome::InDoubt { last }) => {
                dismiss(guardian);
                Err(Failure::InDoubt(format!(
                    "Commit was sent and the target did not answer ({last}): the guest stays paused here; look at the target, and resume it here only if it does not run there"
                )))
            }
            None => Err(Failure::Bug("the move stopped without an end".into())),
        }
    }
}

fn dismiss(guardian: Option<Guardian>) {
    if let Some(guardian) = guardian {
        guardian.dismiss();
    }
}

fn session_error(stopped: Stopped) -> SessionError {
    match stopped {
        Stopped::Interrupted => SessionError::Cancelled,
        Stopped::Lane(error) => blame::lane_error(&error),
        Stopped::Guest(error) => blame::guest_error(&error),
        Stopped::Tracker(text) => SessionError::HostRefused(text),
    }
}

#[expect(clippy::disallowed_methods, reason = "the driver is where time comes from")]
fn clock() -> Instant {
    Instant::now()
}
