//! What the source's session is fed with, and how the pilot feeds it.

use std::time::Duration;

use vmferry_session::{
    DeviceDrain, DeviceReport, LastReport, RoundReport, SourceAction, SourceEvent, SourceSession,
};

use crate::pilot::Machine;

/// What the source's session is fed with.
#[derive(Debug)]
pub enum Input {
    /// Anything that happened.
    Event(SourceEvent),
    /// The answer to `CopyRound`, and what the devices would add.
    Round(RoundReport, Vec<DeviceReport>),
    /// The answer to `SendLast`.
    Last(LastReport),
    /// The answer to `SaveState`, and how long it took; what left of the devices' states, and how much longer that took.
    Saved(Duration, Vec<DeviceDrain>, Duration),
}

impl Machine for SourceSession {
    type Event = Input;
    type Action = SourceAction;

    fn handle(&mut self, event: Input, now: Duration) -> Vec<SourceAction> {
        match event {
            Input::Event(event) => SourceSession::handle(self, event, now),
            Input::Round(report, devices) => {
                self.devices_seen(&devices);
                self.round_done(&report, now)
            }
            Input::Last(report) => self.last_sent(&report, now),
            Input::Saved(took, devices, longer) => {
                self.devices_drained(devices, longer);
                self.state_saved(took, now)
            }
        }
    }

    fn deadline(&self) -> Option<Duration> {
        SourceSession::deadline(self)
    }

    fn tick() -> Input {
        Input::Event(SourceEvent::Tick)
    }

    fn interrupts(action: &SourceAction) -> bool {
        matches!(action, SourceAction::Interrupt)
    }
}
