//! The one place of this crate that reads the clock.

use std::time::{Duration, Instant};

/// A moment that waiting must not pass.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline(Instant);

impl Deadline {
    /// `timeout` from now.
    pub(crate) fn after(timeout: Duration) -> Deadline {
        Deadline(now() + timeout)
    }

    /// The time left, or nothing when it has passed.
    pub(crate) fn left(self) -> Option<Duration> {
        self.0.checked_duration_since(now()).filter(|left| !left.is_zero())
    }
}

/// A moment that something began at.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Since(Instant);

impl Since {
    /// From now on.
    pub(crate) fn now() -> Since {
        Since(now())
    }

    /// How long ago it was.
    pub(crate) fn elapsed(self) -> Duration {
        now().duration_since(self.0)
    }
}

#[expect(clippy::disallowed_methods, reason = "waiting for a VMM is this crate's own I/O, not a decision")]
fn now() -> Instant {
    Instant::now()
}
