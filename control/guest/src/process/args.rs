//! What `vmferry workload` takes.

use bytesize::ByteSize;
use clap::Args;
use vmferry_workload::{PAGE_BYTES, Plan};

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
}

impl WorkloadArgs {
    /// Pages of the memory.
    pub(crate) fn pages(&self) -> u64 {
        self.ram.as_u64() / PAGE_BYTES as u64
    }

    /// One plan for each writer.
    pub(crate) fn plans(&self) -> Result<Vec<Plan>, GuestError> {
        let pages = self.pages();
        let text = if self.plan.split(',').any(|word| word.starts_with("pages=")) {
            self.plan.clone()
        } else {
            format!("pages={pages},{}", self.plan)
        };
        let whole: Plan = text.parse().map_err(|error| GuestError::mistake(format!("--plan: {error}")))?;
        if whole.pages > pages {
            return Err(GuestError::mistake(format!(
                "--plan: {} pages do not fit into --ram {}: give at most pages={pages}",
                whole.pages, self.ram
            )));
        }
        whole.shared_among(self.writers).map_err(|error| GuestError::mistake(format!("--plan: {error}")))
    }
}
