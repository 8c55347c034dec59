//! The demo with a Linux guest between two QEMUs.

use std::path::Path;
use std::time::{Duration, Instant};

use vmferry_rig::{Assets, QemuGuest, RigError, RunningGuest, guest_gap};
use vmferry_workload::{PAGE_BYTES, Plan};

use super::Stage;
use super::run::{Moved, move_guest};
use crate::failure::Failure;
use crate::report::human;

/// A beat on the target must come this soon after a move.
const BEAT_TIMEOUT: Duration = Duration::from_secs(10);

/// A QEMU with the guest, and the recipe for the next one.
pub(super) struct QemuStage {
    recipe: QemuGuest,
    here: RunningGuest,
    moves: usize,
    ram: u64,
}

impl QemuStage {
    /// Boots the guest; half of its memory is the workload's, an eighth is written again and again.
    pub(super) fn start(assets: &Assets, ram: u64) -> Result<Self, Failure> {
        let pages = ram / 2 / PAGE_BYTES as u64;
        let text =
            format!("seed=1,pages={pages},set={},pattern=random,rate=20MiB,zero=100", (pages / 4).max(1));
        let plan: Plan = text.parse().map_err(|e| Failure::Bug(format!("the demo's plan: {e}")))?;
        let recipe = QemuGuest::new(assets, ram, plan).map_err(|e| rig(&e))?;
        eprintln!("demo: booting a Linux guest under QEMU's software emulation");
        let here = recipe.boot("demo-0").map_err(|e| rig(&e))?;
        Ok(Self { recipe, here, moves: 0, ram })
    }
}

impl Stage for QemuStage {
    fn title(&self) -> String {
        format!(
            "a Linux guest with {} of RAM, writing 20 MiB/s at random, in an unmodified QEMU",
            human(self.ram)
        )
    }

    fn move_once(&mut self, pki: &Path) -> Result<Moved, Failure> {
        self.moves += 1;
        let there = self.recipe.await_incoming(&format!("demo-{}", self.moves)).map_err(|e| rig(&e))?;
        let since = clock();
        let mut moved = move_guest(pki, &self.here.spec(), &there.spec())?;
        there
            .beats()
            .wait_since(since, BEAT_TIMEOUT)
            .ok_or_else(|| Failure::Unavailable("the guest's heart does not beat on the target".into()))?;
        moved.gap_ms = guest_gap(self.here.beats(), there.beats(), since)
            .map(|handover| handover.gap().as_secs_f64() * 1e3);
        self.here = there;
        Ok(moved)
    }

    fn verify(&mut self) -> Result<String, Failure> {
        let report = self.here.console().verify().map_err(|e| rig(&e))?;
        if !report.is_clean() {
            return Err(Failure::Bug(format!(
                "the guest found {} wrong pages of {}: {:?}",
                report.wrong, report.pages, report.faults
            )));
        }
        Ok(format!(
            "the guest verified {} of its pages after {} moves: none stale, torn or lost",
            report.pages, self.moves
        ))
    }
}

fn rig(error: &RigError) -> Failure {
    Failure::Unavailable(format!("the demo's guest: {error}"))
}

#[expect(clippy::disallowed_methods, reason = "heart beats are stamped by this clock")]
fn clock() -> Instant {
    Instant::now()
}
