//! What the sending driver does in the background, and what comes of it.

use std::collections::BTreeSet;
use std::time::Duration;

use vmferry_datapath::{ByteLen, PageCount};
use vmferry_session::{
    Decoder, FinalTotals, Message, PausedToken, RoundReport, SealedToken, SessionError, SourceEvent, Work,
};

use super::super::fake_guest::PAGES;
use super::super::network::Record;
use super::super::target_host::TargetJob;
use super::super::{Common, Due, End, Network};
use super::{ATTEMPT, Post, SourceHost, refused};

/// Something that the driver does in the background.
#[derive(Debug)]
pub(in crate::world) struct SourceJob {
    pub(super) doing: Doing,
}

#[derive(Debug)]
pub(super) enum Doing {
    Move(Moving),
    Pause(PausedToken),
    RecordSeal,
    Reconnect,
    Resume(PausedToken),
    Retire(SealedToken),
}

/// Work that needs the lanes or the tracker, and that can be interrupted.
#[derive(Debug)]
pub(super) enum Moving {
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

impl SourceHost {
    /// Scan now, send when the job is done: what is written in between is dirty again.
    pub(super) fn copy_round(&mut self, round: u32, common: &mut Common) {
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
        self.begin_job(Doing::Move(Moving::CopyRound { report, pages }), 30_000, common);
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
    pub(in crate::world) fn job_done(&mut self, job: SourceJob, common: &mut Common) -> Result<(), String> {
        if self.session.is_none() {
            return Ok(());
        }
        if !matches!(job.doing, Doing::Reconnect) {
            self.in_flight -= 1;
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
        sent.then(|| FinalTotals {
            lanes: vec![common.network.lanes.tally()],
            state_bytes: 8,
            digest,
            state_age_us: Some(20),
        })
    }
}

fn count(pages: usize) -> PageCount {
    PageCount(u64::try_from(pages).unwrap_or(u64::MAX))
}
