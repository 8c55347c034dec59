//! A link inside one process, for tests and simulated faults.
use super::Link;

/// One end of a link in memory.
pub struct MemoryLink {}

impl MemoryLink {
    /// Two connected ends.
    pub fn pair() -> (MemoryLink, MemoryLink) {
        (MemoryLink {}, MemoryLink {})
    }
}

impl Link for MemoryLink {}
