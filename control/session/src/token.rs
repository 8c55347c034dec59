//! Who may let the guest run: a token that is passed by value and can be held once.
//!
//! ```text
//!   source                                                     target
//!   RunningToken ──pause──► PausedToken ──seal──► SealedToken   VacantToken ──loaded──► LoadedToken ──► RunLicence
//!        ▲                    │    ▲                  │                     only a Commit (or an Ask, which
//!        └──────resume────────┘    └──refused_by──────┘                     repeats it) turns one into the other
//!                                  (ProofOfRefusal)
//! ```
//!
//! A sealed guest has no resume, because from that moment the target may run it. None of the tokens can be copied:
//!
//! ```compile_fail,E0599
//! fn twice(guest: vmferry_session::SealedToken) -> vmferry_session::RunningToken {
//!     guest.resume() // there is no such thing
//! }
//! ```
//!
//! ```compile_fail,E0382
//! fn twice(guest: vmferry_session::PausedToken) {
//!     let _runs = guest.resume();
//!     let _runs_again = guest.resume(); // moved above
//! }
//! ```
//!
//! What must never happen: a second token for one guest. Every failing action therefore hands its token back.

use crate::message::AttemptId;

/// The source guest runs, and its holder may pause it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped token leaves a guest that nobody may touch"]
pub struct RunningToken(());

/// The source guest is paused (or may be: a pause that failed halfway counts), and its holder may resume it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped token leaves a guest that stays paused"]
pub struct PausedToken(());

/// The source guest is paused and the target may run it: it can be retired, and nothing else.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped token leaves a guest that stays paused"]
pub struct SealedToken(());

/// The target's word that it never ran the guest of this attempt and never will.
#[derive(Debug, PartialEq, Eq)]
pub struct ProofOfRefusal {
    attempt: AttemptId,
}

impl RunningToken {
    /// Claims the running source guest: the one place where a token begins, once per guest and move.
    pub const fn claim() -> Self {
        Self(())
    }

    /// Call it *before* the VMM is told to stop: from then on the guest counts as paused, whatever the VMM answers.
    pub fn pause(self) -> PausedToken {
        PausedToken(())
    }
}

impl PausedToken {
    /// Call it *after* the VMM said that the guest runs.
    pub fn resume(self) -> RunningToken {
        RunningToken(())
    }

    pub(crate) fn seal(self) -> SealedToken {
        SealedToken(())
    }
}

impl SealedToken {
    pub(crate) fn refused_by(self, _proof: ProofOfRefusal) -> PausedToken {
        PausedToken(())
    }

    /// Call it when the source's VMM is ended, after the target said that it runs the guest.
    pub fn retire(self) {}
}

impl ProofOfRefusal {
    /// A `NeverRan` that speaks of `ours` is a proof; one that speaks of another attempt proves nothing here.
    pub(crate) fn new(said: AttemptId, ours: AttemptId) -> Option<Self> {
        (said == ours).then_some(Self { attempt: said })
    }

    /// The attempt that was refused.
    pub const fn attempt(&self) -> AttemptId {
        self.attempt
    }
}

/// The target's guest is empty or half filled: it may be loaded or discarded, never run.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped token leaves a target that can neither be loaded nor discarded"]
pub struct VacantToken(());

/// The target's guest is whole and paused.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped token leaves a guest that nobody may run"]
pub struct LoadedToken(());

/// The source committed: the target's guest is to run, once.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a dropped licence leaves a committed guest that does not run"]
pub struct RunLicence(());

impl VacantToken {
    /// Claims the target's empty guest: once per guest and move.
    pub const fn claim() -> Self {
        Self(())
    }

    /// Call it when the VMM holds the whole state and the guest is paused.
    pub fn loaded(self) -> LoadedToken {
        LoadedToken(())
    }
}

impl LoadedToken {
    pub(crate) fn commit(self) -> RunLicence {
        RunLicence(())
    }
}

impl RunLicence {
    /// Call it when the VMM was told to run the guest, whatever it answered.
    pub fn spend(self) {}
}
