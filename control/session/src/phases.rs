//! When a move was in which phase: the machine's states, by the driver's clock.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// One stay in one phase.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseSpan {
    /// The state's name.
    pub name: String,
    /// How long it took.
    pub ms: f64,
}

/// The phases so far, in order.
#[derive(Clone, Debug)]
pub struct PhaseLog {
    closed: Vec<(&'static str, Duration)>,
    current: &'static str,
    since: Duration,
}

impl PhaseLog {
    /// Begins in phase `name`.
    pub const fn new(name: &'static str, now: Duration) -> Self {
        Self { closed: Vec::new(), current: name, since: now }
    }

    /// The machine is in phase `name` now; staying in one is no change.
    pub fn enter(&mut self, name: &'static str, now: Duration) {
        if name != self.current {
            self.closed.push((self.current, now.saturating_sub(self.since)));
            self.current = name;
            self.since = now;
        }
    }

    /// The phase that is on.
    pub const fn current(&self) -> &'static str {
        self.current
    }

    /// Every phase that is over.
    pub fn spans(&self) -> Vec<PhaseSpan> {
        let span = |(name, time): &(&'static str, Duration)| PhaseSpan {
            name: (*name).to_owned(),
            ms: time.as_secs_f64() * 1e3,
        };
        self.closed.iter().map(span).collect()
    }
}
