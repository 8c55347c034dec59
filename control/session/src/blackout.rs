//! How long each part of the blackout took, by the source's clock: the other half of every prediction.
//!
//! The terms are those of [`Term`]; what the target measured itself (loading, running) is taken from its messages,
//! and what is left of the two waits for it is the handover: round trips, the guardian, and the target's last pages.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::converge::LastReport;
use crate::devices::DeviceDrain;
use crate::message::{Message, TargetTimes};
use crate::predict::{DeviceRecord, Term};
use crate::source::{SourceAction, SourceEvent};

/// Marks of one blackout.
#[derive(Clone, Debug, Default)]
pub(crate) struct BlackoutWatch {
    marks: BTreeMap<Mark, Duration>,
    last: LastReport,
    save: Duration,
    devices: Vec<DeviceDrain>,
    drain: Duration,
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

    /// What left of each device's state, and how much longer that took than the pages and the VMM's state.
    pub(crate) fn devices_drained(&mut self, devices: Vec<DeviceDrain>, longer: Duration) {
        self.devices = devices;
        self.drain = longer;
    }

    /// Device by device, in the order of the streams.
    pub(crate) fn device_records(&self) -> Vec<DeviceRecord> {
        let loads = self.times.devices.load_us().iter().map(|us| f64::from(*us) / 1e3);
        let loads = loads.chain(std::iter::repeat(0.0));
        let record = |(drain, load_ms): (&DeviceDrain, f64)| DeviceRecord {
            name: drain.name.clone(),
            pre_copied_bytes: drain.pre_copied.0,
            blackout_bytes: drain.in_blackout.0,
            load_ms,
        };
        self.devices.iter().zip(loads).map(record).collect()
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
        let after = Duration::from_micros(self.times.devices.after_us());
        let devices = (!self.devices.is_empty()).then_some(self.drain + after);
        let waited = self.between(Mark::Closed, Mark::Running);
        let handover = waited.map(|wait| wait.saturating_sub(load + after + run));
        let terms = [
            (Term::Stop, self.between(Mark::Ordered, Mark::Paused)),
            (Term::Scan, Some(self.last.scan)),
            (Term::Pages, Some(self.last.sending)),
            (Term::Save, Some(self.save)),
            (Term::Close, self.between(Mark::Closing, Mark::Closed)),
            (Term::Load, Some(load)),
            (Term::Handover, handover),
            (Term::Run, Some(run)),
            (Term::Devices, devices),
        ];
        let measured = |(term, time): (Term, Option<Duration>)| Some((term, time?.as_secs_f64() * 1e3));
        terms.into_iter().filter_map(measured).collect()
    }
}
