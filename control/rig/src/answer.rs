//! What the guest's init answers on its console: one line, `vmferry: ok {json}` or `vmferry: error text`.

use serde::{Deserialize, Serialize};

/// Marks the init's own lines among the kernel's.
pub const ANSWER_PREFIX: &str = "vmferry: ";

/// The guest's view of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestStatus {
    /// The workload, as a plan prints itself.
    pub plan: String,
    /// False while the writers are stopped by command.
    pub writing: bool,
    /// Page writes so far.
    pub writes: u64,
    /// Pages verified in the background so far.
    pub verified: u64,
    /// Of those, wrong ones.
    pub wrong: u64,
    /// Blocks read from the disk with O_DIRECT so far.
    pub disk_reads: u64,
    /// Of those, wrong ones.
    pub disk_wrong: u64,
    /// Heart beats so far.
    pub beats: u64,
    /// The guest's monotonic clock.
    pub uptime_ms: u64,
}

/// What the guest sent to the host on the wire, and what came back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStatus {
    /// Numbered datagrams that the guest's kernel took.
    pub sent: u64,
    /// Those that it did not take, because it had no way out.
    pub refused: u64,
    /// Numbers that came back, each once.
    pub answered: u64,
}

impl NetStatus {
    /// Sent, and never answered.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.answered)
    }
}

/// What the guest's processors do, each by its number.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestCpus {
    /// Those that the kernel runs on, as it writes them: `0-1`.
    pub online: String,
    /// Turns of the relay that goes round them.
    pub turns: Vec<u64>,
    /// Pages of the relay that did not hold what the last turn left there.
    pub wrong: u64,
    /// Interrupts of their own timers.
    pub timer: Vec<u64>,
    /// Interrupts that they had from each other.
    pub between: Vec<u64>,
}

/// The longest time between two heart beats by the guest's own clock, since it was last asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestGap {
    /// In microseconds.
    pub gap_us: u64,
}
