//! What is true of one world of the model.

use vmferry_session::{SourceOutcome, TargetOutcome};

use super::{Guardian, System};

/// What the laws speak of.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// Who runs the guest: none, one, or the catastrophe.
    pub runners: u8,
    /// The target runs a guest that is not whole.
    pub torn: bool,
    /// An end was taken back.
    pub broken: Option<&'static str>,
    /// Both drivers ended or died, and the guardian spoke.
    pub quiet: bool,
    /// Nothing will happen by itself.
    pub stuck: bool,
    /// Somebody says that nobody may run the guest.
    pub named: bool,
    /// A driver reported what is not so.
    pub false_report: bool,
    /// The source reported that the guest moved.
    pub moved: bool,
    /// … and it had to ask.
    pub moved_after_asking: bool,
    /// The guest runs at the source again after it was asked for.
    pub came_back_by_proof: bool,
    /// The guardian brought it back.
    pub rescued: bool,
    /// The source reported a doubt.
    pub in_doubt: bool,
}

impl Facts {
    /// What is true of a world.
    pub fn of(system: &System) -> Self {
        let runs_there = system.runs_there;
        let here = matches!(system.source_outcome, Some(SourceOutcome::RunsHere { .. }));
        let moved = matches!(system.source_outcome, Some(SourceOutcome::Moved { .. }));
        let in_doubt = matches!(system.source_outcome, Some(SourceOutcome::InDoubt { .. }));
        let paused = matches!(system.source_outcome, Some(SourceOutcome::PausedHere { .. }));
        let refused = matches!(system.target_outcome, Some(TargetOutcome::NeverRan { .. }));
        let ran = matches!(system.target_outcome, Some(TargetOutcome::RunsHere));
        let guarded = matches!(system.guardian, Guardian::Dismissed | Guardian::SaysInDoubt);
        let source_is_quiet = !system.source_lives() && guarded;
        Self {
            runners: u8::from(system.runs_here) + u8::from(runs_there),
            torn: runs_there && !(system.whole && system.loaded),
            broken: system.broken,
            quiet: source_is_quiet && (!system.target_lives() || system.stranger),
            stuck: system.due().is_empty(),
            named: in_doubt || paused || system.guardian == Guardian::SaysInDoubt,
            false_report: (here && (!system.runs_here || runs_there))
                || (moved && !runs_there)
                || (refused && runs_there)
                || (ran && !runs_there),
            moved,
            moved_after_asking: moved && system.connections.len() > 1,
            came_back_by_proof: here && system.connections.len() > 1,
            rescued: system.source.is_none() && system.runs_here && system.guardian == Guardian::Dismissed,
            in_doubt,
        }
    }
}
