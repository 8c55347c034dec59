//! The simulated world: two hosts, one guest, a link that fails, and a clock that is moved by hand.
//!
//! ```text
//!   SourceHost ──── control connections, as bytes through the real codec ──── TargetHost
//!   (SourceSession)                                                          (TargetSession)
//!       │    └───────────────── lanes: pages, state, totals ───────────────────┘   │
//!   FakeGuest   Guardian                                                       FakeGuest
//! ```
//!
//! The machines are the real ones; everything they act on is a fake, public and named so. All that happens is a
//! queue of events in time, drawn from one seed: the same seed is the same story. [`Story`] says what goes wrong,
//! [`World::run`] plays it to its end, and [`Ending`] says who runs the guest. What must never happen, checked after
//! every single event: two runners. What must never be left, checked at the end: no runner without a name for it.

mod dice;
mod fake_guest;
mod guardian;
mod network;
mod source_host;
mod story;
mod target_host;

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

pub use dice::Dice;
pub use fake_guest::FakeGuest;
pub use network::{Cut, End, Network};
pub use source_host::SourceHost;
pub use story::{Story, Trouble};
pub use target_host::TargetHost;
use vmferry_session::{SourceOutcome, TargetOutcome};

use crate::world::network::Delivery;
use crate::world::source_host::SourceJob;
use crate::world::target_host::TargetJob;

/// Events after which a story that has not ended is stuck.
const EVENTS_MAX: u64 = 50_000;

/// What is going to happen.
#[derive(Debug)]
enum Due {
    /// The source guest writes some pages.
    GuestWrites,
    /// A job of the source's driver is done.
    Source(SourceJob),
    /// A job of the target's driver is done, or looks again.
    Target(TargetJob),
    /// A connection brings something.
    Net(Delivery),
    /// A driver's deadline.
    Wake(End),
    /// Somebody presses Ctrl-C.
    Cancel(End),
    /// The source's driver died a moment ago; its guardian notices.
    GuardianNotices,
}

/// Events in order of time; at one time, in order of scheduling.
#[derive(Debug, Default)]
pub struct Calendar {
    now: Duration,
    next: u64,
    heap: BinaryHeap<Reverse<Entry>>,
}

#[derive(Debug)]
struct Entry {
    at: Duration,
    number: u64,
    due: Due,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

impl Calendar {
    /// The time.
    pub const fn now(&self) -> Duration {
        self.now
    }

    fn schedule(&mut self, after: Duration, due: Due) {
        self.schedule_at(self.now + after, due);
    }

    fn schedule_at(&mut self, at: Duration, due: Due) {
        let at = at.max(self.now);
        self.heap.push(Reverse(Entry { at, number: self.next, due }));
        self.next += 1;
    }

    fn pop(&mut self) -> Option<Due> {
        let Reverse(entry) = self.heap.pop()?;
        self.now = entry.at;
        Some(entry.due)
    }
}

/// What both drivers share: time, luck, the network.
#[derive(Debug)]
pub struct Common {
    /// Time.
    pub calendar: Calendar,
    /// Luck.
    pub dice: Dice,
    /// Connections and lanes.
    pub network: Network,
    /// What goes wrong.
    pub story: Story,
}

/// Two hosts and what is between them.
#[derive(Debug)]
pub struct World {
    common: Common,
    source: SourceHost,
    target: TargetHost,
    events: u64,
}

/// Who runs the guest at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Runner {
    /// It never left.
    Source,
    /// It moved, whole.
    Target,
    /// Nobody, and somebody says so: the named doubt, or a guest that its host refuses to resume.
    Nobody(String),
}

/// How a story ended.
#[derive(Clone, Debug)]
pub struct Ending {
    /// Who runs the guest.
    pub runner: Runner,
    /// What the source's driver reported; none if it died.
    pub source: Option<SourceOutcome>,
    /// What the target's driver reported; none if it died, or never was asked.
    pub target: Option<TargetOutcome>,
    /// Events that happened: the steps at which a later story can let something fail.
    pub events: u64,
    /// When the last thing happened.
    pub time: Duration,
    /// Whether the source guest was slowed down on the way.
    pub throttled: bool,
}

impl World {
    /// A world in which `story` is going to happen.
    pub fn new(story: Story) -> Self {
        let mut common = Common {
            calendar: Calendar::default(),
            dice: Dice::new(story.seed),
            network: Network::default(),
            story,
        };
        let guest = FakeGuest::with_content(&mut common.dice);
        let target = TargetHost::new(&mut common, guest.vacant_twin());
        let source = SourceHost::new(&mut common, guest);
        Self { common, source, target, events: 0 }
    }

    /// Plays the story to its end. The error is a broken law, in a sentence.
    pub fn run(mut self) -> Result<Ending, String> {
        self.common.calendar.schedule(Duration::ZERO, Due::GuestWrites);
        for (at, end) in self.common.story.cancels.clone() {
            self.common.calendar.schedule(at, Due::Cancel(end));
        }
        self.source.begin(&mut self.common);
        while let Some(due) = self.common.calendar.pop() {
            self.events += 1;
            if self.events > EVENTS_MAX {
                return Err(format!("the story does not end: {:?} / {:?}", self.source, self.target));
            }
            self.trouble()?;
            self.happen(due)?;
            self.check_runners()?;
        }
        self.ending()
    }

    /// What the story lets go wrong at this event.
    fn trouble(&mut self) -> Result<(), String> {
        let at = self.events;
        let troubles: Vec<Trouble> = self
            .common
            .story
            .troubles
            .iter()
            .filter(|(when, _)| *when == at)
            .map(|(_, what)| *what)
            .collect();
        for trouble in troubles {
            match trouble {
                Trouble::KillSource => self.source.kill(&mut self.common)?,
                Trouble::KillTarget => self.target.kill(&mut self.common)?,
                Trouble::KillGuardian => self.source.kill_guardian(),
                Trouble::CutControl(cut) => {
                    self.common.network.cut(cut, &mut self.common.calendar, &mut self.common.dice)
                }
                Trouble::CutLanes => Network::cut_lanes(&mut self.common),
                Trouble::RestartTarget => self.target.restart(&mut self.common),
            }
        }
        Ok(())
    }

    fn happen(&mut self, due: Due) -> Result<(), String> {
        let common = &mut self.common;
        match due {
            Due::GuestWrites => self.source.guest_writes(common),
            Due::Source(job) => self.source.job_done(job, common)?,
            Due::Target(job) => self.target.job_done(job, common)?,
            Due::Net(delivery) => self.deliver(&delivery),
            Due::Wake(End::Source) => self.source.wake(common),
            Due::Wake(End::Target) => self.target.wake(common),
            Due::Cancel(End::Source) => self.source.cancel(common),
            Due::Cancel(End::Target) => self.target.cancel(common),
            Due::GuardianNotices => self.source.guardian_notices(),
        }
        Ok(())
    }

    fn deliver(&mut self, delivery: &Delivery) {
        let common = &mut self.common;
        match delivery.to {
            End::Source => self.source.on_delivery(delivery, common),
            End::Target => self.target.on_delivery(delivery, common),
        }
    }

    fn check_runners(&self) -> Result<(), String> {
        if self.source.guest.runs() && self.target.guest.runs() {
            return Err(format!(
                "the guest runs twice at {:?}: {:?} / {:?}",
                self.common.calendar.now, self.source, self.target
            ));
        }
        Ok(())
    }

    fn ending(self) -> Result<Ending, String> {
        let (source, target) = (&self.source, &self.target);
        source.check_end()?;
        target.check_end()?;
        let runner = match (source.guest.runs(), target.guest.runs()) {
            (true, false) => Runner::Source,
            (false, true) => {
                target.guest.check_equal(&source.guest)?;
                Runner::Target
            }
            (true, true) => return Err("the guest runs twice".into()),
            (false, false) => Runner::Nobody(source.named_doubt().ok_or_else(|| {
                format!("nobody runs the guest and nobody says so: {source:?} / {target:?}")
            })?),
        };
        self.check_reports(&runner)?;
        Ok(Ending {
            runner,
            source: self.source.outcome().cloned(),
            target: self.target.outcome().cloned(),
            events: self.events,
            time: self.common.calendar.now,
            throttled: self.source.guest.was_throttled(),
        })
    }

    /// What the drivers reported must be true.
    fn check_reports(&self, runner: &Runner) -> Result<(), String> {
        let source_is_right = match self.source.outcome() {
            None | Some(SourceOutcome::InDoubt { .. }) => true,
            Some(SourceOutcome::Moved { .. }) => *runner == Runner::Target,
            Some(SourceOutcome::RunsHere { .. }) => *runner == Runner::Source,
            // Its guardian may have resumed it after all.
            Some(SourceOutcome::PausedHere { .. }) => *runner != Runner::Target,
        };
        let target_is_right = match self.target.outcome() {
            None | Some(TargetOutcome::Unknown { .. }) => true,
            Some(TargetOutcome::RunsHere) => *runner == Runner::Target,
            Some(TargetOutcome::NeverRan { .. }) => *runner != Runner::Target,
        };
        if source_is_right && target_is_right {
            return Ok(());
        }
        Err(format!(
            "{runner:?}, but the source reported {:?} and the target {:?}",
            self.source.outcome(),
            self.target.outcome()
        ))
    }
}
