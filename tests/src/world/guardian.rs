//! The source's guardian: what stands between the guest and its driver's sudden death.

use super::FakeGuest;

/// A process of its own, which knows one thing: whether the guest may be the target's.
#[derive(Debug)]
pub(super) enum Guardian {
    /// It would bring the guest back.
    Watching,
    /// It would touch nothing.
    Sealed,
    /// Nothing is left to guard.
    Dismissed,
    /// It was killed.
    Dead,
    /// It saw the driver die after the seal, and says so.
    SaysInDoubt,
}

impl Guardian {
    /// The driver's word before Commit. False: nobody heard it.
    pub(super) fn seal(&mut self) -> bool {
        let hears = matches!(self, Self::Watching | Self::Sealed);
        if hears {
            *self = Self::Sealed;
        }
        hears
    }

    /// The driver's word after the target's proof.
    pub(super) fn unseal(&mut self) {
        if matches!(self, Self::Sealed) {
            *self = Self::Watching;
        }
    }

    /// The driver's last word.
    pub(super) fn dismiss(&mut self) {
        if !matches!(self, Self::Dead) {
            *self = Self::Dismissed;
        }
    }

    /// `kill -9`.
    pub(super) fn kill(&mut self) {
        if !matches!(self, Self::Dismissed | Self::SaysInDoubt) {
            *self = Self::Dead;
        }
    }

    /// The driver's end of the pipe is gone.
    pub(super) fn notice(&mut self, guest: &mut FakeGuest) {
        match self {
            Self::Watching => {
                guest.set_throttle(0);
                guest.run().unwrap_or_default();
                *self = Self::Dismissed;
            }
            Self::Sealed => *self = Self::SaysInDoubt,
            Self::Dismissed | Self::Dead | Self::SaysInDoubt => {}
        }
    }
}
