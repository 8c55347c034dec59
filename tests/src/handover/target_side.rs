//! The target and its driver's jobs.

use std::collections::VecDeque;
use std::time::Duration;

use vmferry_session::target::TargetState;
use vmferry_session::{
    DeviceTimes, Message, RunFailure, RunLicence, TargetAction, TargetEvent, TargetWork, VacantToken,
};

use super::{Item, System, refused};

#[derive(Debug)]
pub(super) enum TargetJob {
    AwaitLanes,
    Load(VacantToken),
    Run(RunLicence),
    Discard,
    Other(TargetWork),
}

impl System {
    pub(super) fn tell_target(&mut self, event: TargetEvent, now: Duration) {
        let mut inbox = VecDeque::from([event]);
        while let Some(event) = inbox.pop_front() {
            let Some(state) = self.target.take() else { return };
            let (state, actions) = state.step(event, now);
            self.target = Some(state);
            for action in actions {
                self.target_acts(action, &mut inbox);
            }
        }
    }

    pub(super) fn target_acts(&mut self, action: TargetAction, inbox: &mut VecDeque<TargetEvent>) {
        match action {
            TargetAction::Send(message) => match self.target_line {
                Some(line) if !self.connections[line].cut => {
                    self.connections[line].to_source.push_back(Item::Message(message));
                }
                Some(_) => {}
                None => inbox.push_back(TargetEvent::ControlLost(String::new())),
            },
            TargetAction::Prepare(_) => self.target_jobs.push(TargetJob::Other(TargetWork::Prepare)),
            TargetAction::AcceptLanes(_) => self.target_jobs.push(TargetJob::Other(TargetWork::AcceptLanes)),
            TargetAction::AwaitLanes(_) => self.target_jobs.push(TargetJob::AwaitLanes),
            TargetAction::LoadState(token, _) => self.target_jobs.push(TargetJob::Load(token)),
            TargetAction::Run(licence) => self.target_jobs.push(TargetJob::Run(licence)),
            TargetAction::Discard => self.target_jobs.push(TargetJob::Discard),
            TargetAction::Interrupt => {}
            TargetAction::Finish(outcome) => {
                self.target_outcome = Some(outcome);
                self.end_target();
            }
        }
    }

    pub(super) fn end_target(&mut self) {
        self.target_line = None;
        self.target_jobs.clear();
        for connection in &mut self.connections {
            connection.to_target.clear();
            connection.to_source.push_back(Item::Closed);
            connection.cut = true;
        }
    }

    pub(super) fn target_lives(&self) -> bool {
        self.target.as_ref().is_some_and(|state| state.outcome().is_none())
    }

    pub(super) fn run_there(&mut self) {
        if self.discarded {
            self.broken = Some("a discarded guest was run");
        }
        self.runs_there = true;
    }

    pub(super) fn target_job(&mut self, place: usize, fails: Option<bool>) {
        let job = self.target_jobs.remove(place);
        let event = match (job, fails) {
            (TargetJob::AwaitLanes, None) => {
                self.whole = self.lanes.last && self.lanes.state;
                TargetEvent::RamComplete { state_bytes: 1, digest: None, complete_us: 0 }
            }
            (TargetJob::AwaitLanes, Some(_)) => TargetEvent::WorkFailed(TargetWork::AwaitLanes, refused()),
            (TargetJob::Load(token), None) => {
                self.loaded = true;
                TargetEvent::StateLoaded {
                    guest: token.loaded(),
                    load_us: 0,
                    devices: DeviceTimes::default(),
                }
            }
            (TargetJob::Load(_), Some(_)) => TargetEvent::WorkFailed(TargetWork::LoadState, refused()),
            (TargetJob::Run(licence), fails) => {
                licence.spend();
                if fails.unwrap_or(true) {
                    self.run_there();
                }
                match fails {
                    None => TargetEvent::Ran { run_us: 0 },
                    Some(_) => TargetEvent::RunFailed(RunFailure::Unsure(refused())),
                }
            }
            (TargetJob::Discard, _) => {
                self.discarded = true;
                TargetEvent::Discarded
            }
            (TargetJob::Other(work), _) => TargetEvent::WorkFailed(work, refused()),
        };
        self.tell_target(event, Duration::ZERO);
    }

    pub(super) fn arrive_at_target(&mut self, line: usize) {
        let Some(item) = self.connections[line].to_target.pop_front() else { return };
        if !self.target_lives() {
            return;
        }
        match item {
            Item::Message(message) => {
                let attempt = self.target.as_ref().and_then(TargetState::attempt);
                let asks = matches!(&message, Message::Ask { attempt: about } if Some(*about) == attempt);
                if asks || attempt.is_none() {
                    self.target_line = Some(line);
                }
                // Also from an old connection: the contract forbids it, and it must do no harm.
                self.tell_target(TargetEvent::Message(message), Duration::ZERO);
            }
            Item::Closed if self.target_line == Some(line) => {
                self.target_line = None;
                self.tell_target(TargetEvent::ControlLost(String::new()), Duration::ZERO);
            }
            Item::Closed => {}
        }
    }

    pub(super) fn kill_target(&mut self, happens: bool) {
        for job in std::mem::take(&mut self.target_jobs).into_iter().filter(|_| happens) {
            match job {
                TargetJob::Run(_) => self.run_there(),
                TargetJob::Discard => self.discarded = true,
                TargetJob::AwaitLanes | TargetJob::Load(_) | TargetJob::Other(_) => {}
            }
        }
        self.target = None;
        self.lanes.cut = true;
        self.end_target();
    }
}
