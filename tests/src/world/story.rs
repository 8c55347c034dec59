//! What goes wrong in a simulated world.

use std::time::Duration;

use super::{Cut, Dice, End};

/// Something that goes wrong at one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// `kill -9` of the source's driver.
    KillSource,
    /// `kill -9` of the target's driver.
    KillTarget,
    /// `kill -9` of the guardian.
    KillGuardian,
    /// The control connection.
    CutControl(Cut),
    /// Every lane.
    CutLanes,
    /// A new receiver at the target's address, which knows nothing; only after the old one died.
    RestartTarget,
}

/// Everything that goes wrong, and how the drivers are set up.
#[derive(Clone, Debug, Default)]
pub struct Story {
    /// Where all luck comes from.
    pub seed: u64,
    /// What happens at which event, counted from 1.
    pub troubles: Vec<(u64, Trouble)>,
    /// Ctrl-C, when and where.
    pub cancels: Vec<(Duration, End)>,
    /// How often in a thousand an adapter's action fails.
    pub refusals_per_mille: u64,
    /// How often in a thousand a control message is lost, or comes twice, although its connection stands. TCP does
    /// neither; safety may not rest on it.
    pub losses_per_mille: u64,
    /// See `losses_per_mille`.
    pub repeats_per_mille: u64,
    /// How often in a thousand a message takes seconds.
    pub stalls_per_mille: u64,
    /// `--verify`.
    pub verify: bool,
    /// The target's driver posts what old connections still bring, which its contract forbids.
    pub hears_old_connections: bool,
    /// `--timeout`.
    pub timeout: Option<Duration>,
}

impl Story {
    /// Nothing goes wrong.
    pub fn calm(seed: u64) -> Self {
        Self { seed, ..Self::default() }
    }

    /// Something goes wrong at one event.
    #[must_use]
    pub fn with(mut self, at: u64, trouble: Trouble) -> Self {
        self.troubles.push((at, trouble));
        self
    }

    /// Anything may go wrong, as the seed will have it.
    pub fn wild(seed: u64) -> Self {
        let mut dice = Dice::new(seed ^ 0x5707);
        let mut story = Self::calm(seed);
        for _ in 0..dice.below(4) {
            let trouble = match dice.below(9) {
                0 => Trouble::KillSource,
                1 => Trouble::KillTarget,
                2 => Trouble::KillGuardian,
                3 | 4 => Trouble::CutControl(Cut::Both),
                5 => Trouble::CutControl(Cut::SourceDeaf),
                6 => Trouble::CutControl(Cut::TargetDeaf),
                7 => Trouble::CutLanes,
                _ => Trouble::RestartTarget,
            };
            story = story.with(1 + dice.below(160), trouble);
        }
        for end in [End::Source, End::Target] {
            if dice.per_mille(120) {
                story.cancels.push((dice.time(0, 400_000), end));
            }
        }
        let sometimes = |dice: &mut Dice, rate| if dice.per_mille(300) { rate } else { 0 };
        story.refusals_per_mille = sometimes(&mut dice, 60);
        story.losses_per_mille = sometimes(&mut dice, 60);
        story.repeats_per_mille = sometimes(&mut dice, 60);
        story.stalls_per_mille = sometimes(&mut dice, 80);
        story.verify = dice.per_mille(300);
        story.hears_old_connections = dice.per_mille(300);
        story.timeout = dice.per_mille(100).then(|| dice.time(10_000, 600_000));
        story
    }
}
