//! The source, its driver's jobs, and the guardian.

use std::collections::VecDeque;
use std::time::Duration;

use vmferry_session::{FinalTotals, Message, PausedToken, SealedToken, SourceAction, SourceEvent, Work};

use super::{ATTEMPT, Connection, Guardian, Item, System, refused};

/// A job in the background.
#[derive(Debug)]
pub(super) enum SourceJob {
    Pause(PausedToken),
    Move(Last),
    RecordSeal,
    Dial,
    Resume(PausedToken),
    Retire(SealedToken),
    Other(Work),
}

/// What the lanes carry in the blackout.
#[derive(Clone, Copy, Debug)]
pub(super) enum Last {
    Pages,
    State,
    End,
}

impl System {
    pub(super) fn tell_source(&mut self, event: SourceEvent, now: Duration) {
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

    pub(super) fn source_acts(&mut self, action: SourceAction, inbox: &mut VecDeque<SourceEvent>) {
        match action {
            SourceAction::Send(message) => match self.source_line {
                Some(line) => self.send_to_target(line, message),
                None => inbox.push_back(SourceEvent::ControlLost(String::new())),
            },
            SourceAction::OpenLanes(_) => self.source_jobs.push(SourceJob::Other(Work::OpenLanes)),
            SourceAction::Attach => self.source_jobs.push(SourceJob::Other(Work::Attach)),
            SourceAction::CopyRound { .. } => self.source_jobs.push(SourceJob::Other(Work::CopyRound)),
            SourceAction::Pause(token) => self.source_jobs.push(SourceJob::Pause(token.pause())),
            SourceAction::SendLast => self.source_jobs.push(SourceJob::Move(Last::Pages)),
            SourceAction::SaveState => self.source_jobs.push(SourceJob::Move(Last::State)),
            SourceAction::FinishLanes => self.source_jobs.push(SourceJob::Move(Last::End)),
            SourceAction::RecordSeal => self.source_jobs.push(SourceJob::RecordSeal),
            SourceAction::ReconnectAndAsk { .. } => self.source_jobs.push(SourceJob::Dial),
            SourceAction::Resume(token) => {
                // A reconnection does not touch the guest; everything else would race with the resume.
                if self.source_jobs.iter().any(|job| !matches!(job, SourceJob::Dial)) {
                    self.broken = Some("the guest was resumed while it was still being worked on");
                }
                self.source_jobs.push(SourceJob::Resume(token));
            }
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

    pub(super) fn end_source(&mut self) {
        if let Some(line) = self.source_line.take() {
            self.connections[line].to_target.push_back(Item::Closed);
        }
        self.source_jobs.clear();
    }

    pub(super) fn send_to_target(&mut self, line: usize, message: Message) {
        let connection = &mut self.connections[line];
        if !connection.cut {
            connection.to_target.push_back(Item::Message(message));
        }
    }

    pub(super) fn source_lives(&self) -> bool {
        self.source.as_ref().is_some_and(|state| state.outcome().is_none())
    }

    pub(super) fn run_here(&mut self) {
        if self.retired {
            self.broken = Some("a retired guest was resumed");
        }
        self.runs_here = true;
    }

    pub(super) fn source_job(&mut self, place: usize, fails: Option<bool>) {
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
            SourceJob::Move(last) => self.move_last(last, fails),
        };
        self.tell_source(event, Duration::ZERO);
    }

    /// The last pages, the state, or the end of the lanes.
    pub(super) fn move_last(&mut self, last: Last, fails: Option<bool>) -> SourceEvent {
        let fails = fails.or_else(|| (self.lanes.cut || self.interrupted).then_some(false));
        let carried = fails.is_none();
        match last {
            Last::Pages => {
                self.lanes.last |= carried;
                answer(fails, Work::SendLast, SourceEvent::LastSent)
            }
            Last::State => {
                self.lanes.state |= carried;
                answer(fails, Work::SaveState, SourceEvent::StateSaved)
            }
            Last::End => {
                self.lanes.end |= carried;
                let totals = FinalTotals { lanes: vec![], state_bytes: 1, digest: None, state_age_us: None };
                answer(fails, Work::FinishLanes, SourceEvent::LanesFinished(totals))
            }
        }
    }

    pub(super) fn dial(&mut self, fails: Option<bool>) -> SourceEvent {
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

    pub(super) fn arrive_at_source(&mut self, line: usize) {
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

    pub(super) fn kill_source(&mut self, happens: bool) {
        for job in std::mem::take(&mut self.source_jobs).into_iter().filter(|_| happens) {
            match job {
                SourceJob::Pause(_) => self.runs_here = false,
                SourceJob::Resume(_) => self.run_here(),
                SourceJob::Retire(_) => self.retired = true,
                SourceJob::RecordSeal => self.guardian = Guardian::Sealed,
                SourceJob::Move(_) | SourceJob::Dial | SourceJob::Other(_) => {}
            }
        }
        self.source = None;
        self.lanes.cut |= !self.lanes.end;
        self.end_source();
    }

    pub(super) fn guardian_notices(&mut self) {
        if self.guardian == Guardian::Watching {
            self.run_here();
            self.guardian = Guardian::Dismissed;
        } else {
            self.guardian = Guardian::SaysInDoubt;
        }
    }
}

fn answer(fails: Option<bool>, work: Work, done: SourceEvent) -> SourceEvent {
    if fails.is_some() { SourceEvent::WorkFailed(work, refused()) } else { done }
}
