//! What `vmferry workload` takes.

use bytesize::ByteSize;
use clap::Args;
use vmferry_workload::{DevicePlan, PAGE_BYTES, Plan};

use crate::GuestError;

/// Runs the embedded guest until it is ended or moved away.
#[derive(Debug, Clone, Args)]
pub struct WorkloadArgs {
    /// The name that `--guest process:NAME` finds it by.
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// Its memory.
    #[arg(long, value_name = "BYTES", default_value = "256MiB")]
    pub ram: ByteSize,
    /// Wait for a workload to be moved here instead of starting one.
    #[arg(long)]
    pub incoming: bool,
    /// Threads that write, each in its own share of the memory.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=16))]
    pub writers: u64,
    /// What they do, as KEY=VALUE,...: seed, pages (all of the memory unless given), set (working set in pages),
    /// pattern (sequential, random, zipf-hot), rate (pages a second, N MiB a second, or max) and zero (zero pages in
    /// a thousand). Pages, set and rate are shared among the writers.
    #[arg(long, value_name = "PLAN", default_value = "")]
    pub plan: String,
    /// A fake device beside it, for showing and testing moves of guests with devices where there is no hardware; once
    /// for each: NAME:BYTES of state, then if wanted :BYTES that change in a second, :pinned=BYTES of the end of the
    /// memory that it writes unseen by any tracker, :stop-copy (no state before the pause), :refuse (of a target:
    /// refuses every state). Both sides need the same names, BYTES and pinned.
    #[arg(long, value_name = "NAME:BYTES[:RATE][:pinned=BYTES][:stop-copy][:refuse]")]
    pub device: Vec<DevicePlan>,
}

impl WorkloadArgs {
    /// Pages of the memory.
    pub(crate) fn pages(&self) -> u64 {
        self.ram.as_u64() / PAGE_BYTES as u64
    }

    /// Pages at the end that are left to the devices.
    fn pinned_pages(&self) -> u64 {
        self.device.iter().map(DevicePlan::pinned_pages).sum()
    }

    /// Refuses devices that cannot be told apart or do not fit.
    pub(crate) fn check_devices(&self) -> Result<(), GuestError> {
        let mut names: Vec<&str> = self.device.iter().map(|device| device.name.as_str()).collect();
        names.sort_unstable();
        if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(GuestError::mistake(format!(
                "two devices are named '{}': give each its own name",
                pair[0]
            )));
        }
        if self.device.len() > vmferry_datapath::limits::DEVICE_STREAMS_MAX {
            return Err(GuestError::mistake(format!(
                "{} devices are more than can move at once: give at most {}",
                self.device.len(),
                vmferry_datapath::limits::DEVICE_STREAMS_MAX
            )));
        }
        if self.pinned_pages() >= self.pages() {
            return Err(GuestError::mistake(format!(
                "the devices pin all of --ram {}: give more memory or pin less",
                self.ram
            )));
        }
        Ok(())
    }

    /// One plan for each writer.
    pub(crate) fn plans(&self) -> Result<Vec<Plan>, GuestError> {
        let pages = self.pages() - self.pinned_pages();
        let text = if self.plan.split(',').any(|word| word.starts_with("pages=")) {
            self.plan.clone()
        } else {
            format!("pages={pages},{}", self.plan)
        };
        let whole: Plan = text.parse().map_err(|error| GuestError::mistake(format!("--plan: {error}")))?;
        if whole.pages > pages {
            return Err(GuestError::mistake(format!(
                "--plan: {} pages do not fit into --ram {} beside what devices pin: give at most pages={pages}",
                whole.pages, self.ram
            )));
        }
        whole.shared_among(self.writers).map_err(|error| GuestError::mistake(format!("--plan: {error}")))
    }
}
