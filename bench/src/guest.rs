//! A guest that is moved again and again: after each move a fresh VMM waits for the next.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use vmferry_rig::{Assets, QemuGuest, RunningGuest, guest_gap};
use vmferry_workload::Plan;

use crate::qemu_move::tls_objects;

/// A beat that is this late does not come any more.
const FIRST_BEAT_TIMEOUT: Duration = Duration::from_secs(20);

/// The guest and the recipe of its next VMM.
pub(crate) struct Traveller {
    recipe: QemuGuest,
    here: RunningGuest,
    next: Option<RunningGuest>,
    moves: u32,
}

/// What the host's clock saw of a move.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    /// From the command to the first beat on the target.
    pub(crate) total: Duration,
    /// From the last beat on the source to the first on the target.
    pub(crate) gap: Duration,
    /// The guest's own longest gap between two beats.
    pub(crate) own_gap: Duration,
}

impl Traveller {
    /// Boots a guest of `ram_bytes` whose memory is filled as `plan` says.
    pub(crate) fn boot(assets: &Assets, ram_bytes: u64, plan: Plan, keys: &Path) -> Result<Self> {
        let objects = tls_objects(keys);
        let words: Vec<&str> = ["-name", "bench,debug-threads=on"]
            .into_iter()
            .chain(objects.iter().map(String::as_str))
            .collect();
        // Preallocated on both sides and for every mover: what a host takes to give a page for the first time (0.3 s a GiB on
        // a machine of its own, ten times that on one whose hypervisor takes free pages back) is no mover's figure.
        let recipe = QemuGuest::new(assets, ram_bytes, plan)?.prealloc().extra_args(&words);
        let here = recipe.boot("vmm-0")?;
        Ok(Self { recipe, here, next: None, moves: 0 })
    }

    /// Sets rate and working set.
    pub(crate) fn work(&mut self, rate: &str, set_pages: u64) -> Result<()> {
        self.here.console().ask(&format!("set set={set_pages}"))?;
        self.here.console().ask(&format!("rate {rate}"))?;
        // The new rate must be the guest's state, not its future, when the move begins.
        std::thread::sleep(Duration::from_millis(200));
        Ok(())
    }

    /// The VMM that the guest runs in.
    pub(crate) fn here(&mut self) -> &mut RunningGuest {
        &mut self.here
    }

    /// Source and target of the next move.
    pub(crate) fn ends(&mut self) -> Result<(&mut RunningGuest, &mut RunningGuest)> {
        if self.next.is_none() {
            self.moves += 1;
            self.next = Some(self.recipe.await_incoming(&format!("vmm-{}", self.moves))?);
        }
        let next = self.next.as_mut().context("no target was started")?;
        Ok((&mut self.here, next))
    }

    /// After a move that began at `start`: what the clock saw. The source's VMM ends here.
    pub(crate) fn arrived(&mut self, start: Instant) -> Result<Seen> {
        let Some(mut target) = self.next.take() else { bail!("no move was under way") };
        let Some(first) = target.beats().wait_since(start, FIRST_BEAT_TIMEOUT) else {
            bail!("the guest does not beat on the target (its VMM is {:?})", target.run_state());
        };
        let handover = guest_gap(self.here.beats(), target.beats(), start).context("one side never beat")?;
        if handover.overlaps() {
            bail!("both sides beat at once: two runners");
        }
        let own_gap = Duration::from_micros(target.console().gap()?.gap_us);
        self.here = target;
        Ok(Seen { total: first.at.duration_since(start), gap: handover.gap(), own_gap })
    }

    /// After a move that did not happen: the target's VMM ends.
    pub(crate) fn stayed(&mut self) {
        self.next = None;
    }

    /// Resets the guest's own gap meter just before a move.
    pub(crate) fn forget_gaps(&mut self) -> Result<()> {
        self.here.console().gap()?;
        Ok(())
    }

    /// Every page must be right, or nothing that was measured counts.
    pub(crate) fn prove(&mut self) -> Result<()> {
        let report = self.here.console().verify()?;
        if !report.is_clean() {
            bail!("the guest's memory is wrong after a move: {report}");
        }
        Ok(())
    }
}
