//! The order in which a guest and its devices come to rest.
//!
//! ```text
//!   devices to P2P → vCPUs paused → devices stopped → DMA collected → last memory → device states
//!        │                │                │                                │
//!        └── no device ───┴─ no CPU starts ┴─ nobody writes memory: ────────┴─ and nothing of a device's state
//!            starts DMA      anything new     what a log says now is final      can depend on what comes after
//!            to a peer
//! ```
//!
//! The order is a [`Plan`], made by a pure function; [`Rest`] carries it out through [`Hands`], up to a milestone at a
//! time, and is a token: whoever holds it can go on or let everything run again, and cannot do both. What must never
//! happen: a step that failed, and the ones before it not undone. The failed one is undone as well, because a device
//! that refused may have gone half the way.

use std::fmt;

use crate::VfioError;
use crate::state::Features;

mod crew;

pub use crew::{Crew, Held, LastMile, Vcpus};

/// One step; devices by their place in the plan's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// The device starts no DMA to its peers any more.
    ToP2p(usize),
    /// The vCPUs stand still.
    PauseVcpus,
    /// The device stands still.
    Stop(usize),
    /// What devices wrote is collected from the logs, and what nobody can tell is added.
    CollectDma,
    /// The last pages of memory leave.
    LastMemory,
    /// The device's state leaves.
    SaveState(usize),
}

/// How far a plan was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Milestone {
    /// Nothing was done.
    Begun,
    /// No device starts DMA to a peer.
    P2p,
    /// The vCPUs stand still.
    VcpusPaused,
    /// So do the devices.
    Stopped,
    /// The last writes of devices are known.
    DmaCollected,
    /// The last memory left.
    MemorySent,
    /// So did the devices' states.
    StatesSaved,
}

impl Step {
    /// The milestone that this step and its like reach.
    #[must_use]
    pub const fn reaches(self) -> Milestone {
        match self {
            Step::ToP2p(_) => Milestone::P2p,
            Step::PauseVcpus => Milestone::VcpusPaused,
            Step::Stop(_) => Milestone::Stopped,
            Step::CollectDma => Milestone::DmaCollected,
            Step::LastMemory => Milestone::MemorySent,
            Step::SaveState(_) => Milestone::StatesSaved,
        }
    }
}

/// What the plan needs to know of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ability {
    /// The operator's name for it.
    pub name: String,
    /// What it can do.
    pub features: Features,
}

/// The steps for a set of devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    devices: Vec<Ability>,
    steps: Vec<Step>,
}

impl Plan {
    /// The plan for these devices: all that can go to P2P do, before any is stopped.
    #[must_use]
    pub fn of(devices: Vec<Ability>) -> Plan {
        let all = 0..devices.len();
        let to_p2p = all.clone().filter(|at| devices[*at].features.p2p).map(Step::ToP2p);
        let steps = to_p2p
            .chain([Step::PauseVcpus])
            .chain(all.clone().map(Step::Stop))
            .chain([Step::CollectDma, Step::LastMemory])
            .chain(all.map(Step::SaveState))
            .collect();
        Plan { devices, steps }
    }

    /// The steps, in order.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// What the operator should know: the devices that have no P2P state. One alone harms nobody.
    #[must_use]
    pub fn notes(&self) -> Vec<String> {
        let lacks = self.devices.iter().filter(|device| !device.features.p2p);
        let note = |device: &Ability| {
            format!(
                "device `{}` has no P2P state: it is stopped after the vCPUs, and until then other devices may still \
                 write to it",
                device.name
            )
        };
        if self.devices.len() > 1 { lacks.map(note).collect() } else { Vec::new() }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |at: &usize| self.devices.get(*at).map_or("?", |device| device.name.as_str());
        for (number, step) in self.steps.iter().enumerate() {
            let number = number + 1;
            match step {
                Step::ToP2p(at) => writeln!(f, "{number}. {} to P2P", name(at))?,
                Step::PauseVcpus => writeln!(f, "{number}. vCPUs paused")?,
                Step::Stop(at) => writeln!(f, "{number}. {} stopped", name(at))?,
                Step::CollectDma => writeln!(f, "{number}. DMA log and pinned pages collected")?,
                Step::LastMemory => writeln!(f, "{number}. last memory")?,
                Step::SaveState(at) => writeln!(f, "{number}. state of {}", name(at))?,
            }
        }
        self.notes().iter().try_for_each(|note| writeln!(f, "note: {note}"))
    }
}

/// Who carries a plan out.
pub trait Hands {
    /// Does a step.
    fn take(&mut self, step: Step) -> Result<(), VfioError>;
    /// Undoes a step that was done, or that failed half the way.
    fn undo(&mut self, step: Step) -> Result<(), VfioError>;
}

/// A guest that comes to rest: how far its plan was carried out.
#[derive(Debug)]
#[must_use = "a guest at rest must go on or be let run"]
pub struct Rest {
    plan: Plan,
    done: usize,
}

impl Rest {
    /// Nothing is done yet.
    pub fn begin(plan: Plan) -> Rest {
        Rest { plan, done: 0 }
    }

    /// The milestone that was reached.
    #[must_use]
    pub fn reached(&self) -> Milestone {
        self.plan.steps[..self.done].last().map_or(Milestone::Begun, |step| step.reaches())
    }

    /// Goes on up to and with `milestone`. When a step fails it and all before it are undone, and the guest runs. A
    /// device that no step touched is where it was: one that pre-copies does so still, until [`Held::let_run`].
    pub fn go_on(mut self, milestone: Milestone, hands: &mut dyn Hands) -> Result<Rest, VfioError> {
        while let Some(step) = self.plan.steps.get(self.done).copied() {
            if step.reaches() > milestone {
                break;
            }
            self.done += 1;
            if let Err(error) = hands.take(step) {
                return Err(match self.let_run(hands) {
                    Ok(()) => error,
                    Err(back) => VfioError::NotUndone { cause: Box::new(error), back },
                });
            }
        }
        Ok(self)
    }

    /// Undoes everything, the last step first. A step that cannot be undone keeps none before it from being undone.
    pub fn let_run(self, hands: &mut dyn Hands) -> Result<(), Vec<VfioError>> {
        let done = self.plan.steps[..self.done].iter().rev();
        let failed: Vec<_> = done.filter_map(|step| hands.undo(*step).err()).collect();
        if failed.is_empty() { Ok(()) } else { Err(failed) }
    }
}

#[cfg(test)]
mod tests;
