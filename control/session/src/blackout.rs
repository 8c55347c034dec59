//! How long each part of the blackout took, by the source's clock: the other half of every prediction.
//!
//! The terms are those of [`Term`]; what the target measured itself (loading, running) is taken from its messages,
//! and what is left of the two waits for it is the handover: round trips, the guardian, and the target's last pages.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::converge::LastReport;
use crate::message::{Message, TargetTimes};
use crate::predict::Term;
use crate::source::{SourceAction, SourceEvent};

/// Marks of one blackout.
#[derive(Clone, Debug, Default)]
pub(crate) struct BlackoutWatch {
    marks: BTreeMap<Mark, Duration>,
    last: LastReport,
    save: Duration,
    times: TargetTimes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mark {
    Ordered,
    Paused,
    Closing,
    Closed,
    Running,
}

impl BlackoutWatch {
    /// An action is about to begin.
    pub(crate) fn begin(&mut self, action: &SourceAction, now: Duration) {
        match action {
            SourceAction::Pause(_) => self.mark(Mark::Ordered, now),
            SourceAction::FinishLanes => self.mark(Mark::Closing, now),
            SourceAction::Send(_)
            | SourceAction::OpenLanes(_)
            | SourceAction::Attach
            | SourceAction::CopyRound { .. }
            | SourceAction::SetThrottle { .. }
            | SourceAction::SendLast
            | SourceAction::SaveState
            | SourceAction::RecordSeal
            | SourceAction::ClearSeal
            | SourceAction::ReconnectAndAsk { .. }
            | SourceAction::Interrupt
            | SourceAction::Resume(_)
            | SourceAction::CloseLanes
            | SourceAction::Detach
            | SourceAction::Retire(_)
            | SourceAction::Finish(_) => {}
        }
    }

    /// Something happened.
    pub(crate) fn end(&mut self, event: &SourceEvent, now: Duration) {
        match event {
            SourceEvent::Paused(_) => self.mark(Mark::Paused, now),
            SourceEvent::LanesFinished(_) => self.mark(Mark::Closed, now),
            SourceEvent::Message(Message::Running(times)) => {
                self.times = *times;
                self.mark(Mark::Running, now);
            }
            SourceEvent::Message(_)
            | SourceEvent::ControlLost(_)
            | SourceEvent::PeerBroke(_)
            | SourceEvent::Cancel
            | SourceEvent::Tick
            | SourceEvent::LanesOpened
            | SourceEvent::Attached
            | SourceEvent::RoundDone(_)
            | SourceEvent::ThrottleFailed(_)
            | SourceEvent::PauseFailed(..)
            | SourceEvent::LastSent
            | SourceEvent::StateSaved
            | SourceEvent::SealRecorded
            | SourceEvent::Reconnected
            | SourceEvent::Resumed(_)
            | SourceEvent::ResumeFailed(..)
            | SourceEvent::Retired
            | SourceEvent::RetireFailed(_)
            | SourceEvent::WorkFailed(..) => {}
        }
    }

    /// The last round's report, by the worker's own clock.
    pub(crate) fn last_sent(&mut self, report: &LastReport) {
        self.last = *report;
    }

    /// How long saving took, by the worker's own clock.
    pub(crate) fn state_saved(&mut self, took: Duration) {
        self.save = took;
    }

    /// The first time counts: a second Running is an echo.
    fn mark(&mut self, mark: Mark, now: Duration) {
        self.marks.entry(mark).or_insert(now);
    }

    fn between(&self, from: Mark, to: Mark) -> Option<Duration> {
        Some(self.marks.get(&to)?.saturating_sub(*self.marks.get(&from)?))
    }

    /// From the order to stop until the word that the guest runs.
    pub(crate) fn total(&self) -> Option<Duration> {
        self.between(Mark::Ordered, Mark::Running)
    }

    /// Every term that was measured.
    pub(crate) fn terms_ms(&self) -> BTreeMap<Term, f64> {
        let load = Duration::from_micros(self.times.load_us);
        let run = Duration::from_micros(self.times.run_us);
        let handover = self.between(Mark::Closed, Mark::Running).map(|wait| wait.saturating_sub(load + run));
        let terms = [
            (Term::Stop, self.between(Mark::Ordered, Mark::Paused)),
            (Term::Scan, Some(self.last.scan)),
            (Term::Pages, Some(self.last.sending)),
            (Term::Save, Some(self.save)),
            (Term::Close, self.between(Mark::Closing, Mark::Closed)),
            (Term::Load, Some(load)),
            (Term::Handover, handover),
            (Term::Run, Some(run)),
        ];
        let measured = |(term, time): (Term, Option<Duration>)| Some((term, time?.as_secs_f64() * 1e3));
        terms.into_iter().filter_map(measured).collect()
    }
}
