//! Drives one session machine: events in, actions out, and the clock that the machine itself must not read.
//!
//! ```text
//!   control reader ─┐
//!   Ctrl-C ─────────┼─► mailbox ─► pump ─► machine.step(event, now) ─► actions ─► the hands (send, receive)
//!   deadline ───────┘                          ▲                                     │
//!                                              └──────────── answers ────────────────┘
//! ```
//!
//! Work that takes long asks `pump` every few milliseconds whether to go on, so that a Cancel or a lost link reaches
//! the machine while pages flow. What must never happen: an event that no machine sees.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

/// Events that wait at most; past it the control reader waits, so that a chatty peer costs no memory.
const MAILBOX_EVENTS_MAX: usize = 256;

/// How long a broken lane waits for the word of why; a cut control connection ends the wait at once.
const WHY_MAX: Duration = Duration::from_millis(250);
const WHY_STEP: Duration = Duration::from_millis(1);

/// A source or a target session, as the pilot sees it.
pub trait Machine {
    /// What happens to it.
    type Event;
    /// What it asks for.
    type Action;
    /// One step.
    fn handle(&mut self, event: Self::Event, now: Duration) -> Vec<Self::Action>;
    /// When it wants to be told the time at the latest.
    fn deadline(&self) -> Option<Duration>;
    /// The event that tells the time.
    fn tick() -> Self::Event;
    /// Whether an action asks that work in flight ends soon.
    fn interrupts(action: &Self::Action) -> bool;
}

/// One machine with its mailbox and its clock.
pub struct Pilot<M: Machine> {
    machine: M,
    actions: VecDeque<M::Action>,
    mailbox: Receiver<M::Event>,
    post: Sender<M::Event>,
    began: Instant,
    interrupted: bool,
}

impl<M: Machine> Pilot<M> {
    /// Takes the machine, what it asked for at its beginning, and the instant that its time counts from.
    #[must_use]
    pub fn new(machine: M, actions: Vec<M::Action>, began: Instant) -> Self {
        let (post, mailbox) = bounded(MAILBOX_EVENTS_MAX);
        Self { machine, actions: actions.into(), mailbox, post, began, interrupted: false }
    }

    /// Where other threads post events.
    #[must_use]
    pub fn post(&self) -> Sender<M::Event> {
        self.post.clone()
    }

    /// Time since the move began.
    #[must_use]
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// The machine, between steps.
    #[must_use]
    pub fn machine(&self) -> &M {
        &self.machine
    }

    /// Feeds one event.
    pub fn feed(&mut self, event: M::Event) {
        let actions = self.machine.handle(event, self.began.elapsed());
        self.interrupted |= actions.iter().any(M::interrupts);
        self.actions.extend(actions);
    }

    /// Feeds what arrived and, when it is due, the time. Returns false once the machine asked to interrupt work in flight.
    pub fn pump(&mut self) -> bool {
        while let Ok(event) = self.mailbox.try_recv() {
            self.feed(event);
        }
        if self.machine.deadline().is_some_and(|deadline| self.now() >= deadline) {
            self.feed(M::tick());
        }
        !self.interrupted
    }

    /// After a lane broke: gives the word of why, which travels on another connection, a moment to come first. Whoever
    /// knows why the peer closed its lanes need not guess.
    pub fn hear_why(&mut self) {
        let until = self.now() + WHY_MAX;
        while self.pump() && self.now() < until {
            std::thread::sleep(WHY_STEP);
        }
    }

    /// The next action, waiting for events until there is one; every `every` it calls `look` for an event that nobody
    /// posts. `None` when nothing can happen any more.
    pub fn next_action(
        &mut self,
        every: Duration,
        look: &mut dyn FnMut() -> Option<M::Event>,
    ) -> Option<M::Action> {
        loop {
            match self.actions.pop_front() {
                // It concerns work that was in flight when it was asked for; that work has returned by now.
                Some(action) if M::interrupts(&action) => self.interrupted = false,
                Some(action) => return Some(action),
                None => self.wait(every, look)?,
            }
        }
    }

    /// Waits for one event, the deadline, or one look.
    fn wait(&mut self, every: Duration, look: &mut dyn FnMut() -> Option<M::Event>) -> Option<()> {
        let due = self.machine.deadline().map(|deadline| deadline.saturating_sub(self.now()));
        let event = match self.mailbox.recv_timeout(due.unwrap_or(every).min(every)) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) if due.is_some_and(|due| due <= every) => Some(M::tick()),
            Err(RecvTimeoutError::Timeout) => look(),
            Err(RecvTimeoutError::Disconnected) => return None,
        };
        if let Some(event) = event {
            self.feed(event);
        }
        Some(())
    }

    /// Takes the next action if it is `wanted`, to run it beside the one just taken.
    pub fn take_if(&mut self, wanted: impl Fn(&M::Action) -> bool) -> Option<M::Action> {
        if self.actions.front().is_some_and(wanted) { self.actions.pop_front() } else { None }
    }
}
