//! What the guest does while it is moved.

use serde::Serialize;

const PAGES_A_MIB: u64 = 256;

/// A dirty rate over a working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Scenario {
    /// `None` writes as fast as the guest can.
    pub(crate) rate_mib_per_s: Option<u64>,
    pub(crate) set_mib: u64,
}

impl Scenario {
    pub(crate) fn rate_word(&self) -> String {
        self.rate_mib_per_s.map_or_else(|| "max".to_owned(), |mib| format!("{mib}MiB"))
    }

    pub(crate) fn set_pages(&self) -> u64 {
        self.set_mib * PAGES_A_MIB
    }

    pub(crate) fn name(&self) -> String {
        match self.rate_mib_per_s {
            Some(0) => "idle".to_owned(),
            Some(rate) => format!("{rate} MiB/s in {} MiB", self.set_mib),
            None => format!("max in {} MiB", self.set_mib),
        }
    }
}

/// From an idle guest to one that writes faster than a link carries.
pub(crate) fn all(data_mib: u64, quick: bool) -> Vec<Scenario> {
    let set = |mib: u64| mib.min(data_mib);
    let idle = Scenario { rate_mib_per_s: Some(0), set_mib: set(64) };
    if quick {
        return vec![idle, Scenario { rate_mib_per_s: Some(20), set_mib: set(64) }];
    }
    vec![
        idle,
        Scenario { rate_mib_per_s: Some(20), set_mib: set(64) },
        Scenario { rate_mib_per_s: Some(100), set_mib: set(64) },
        Scenario { rate_mib_per_s: Some(100), set_mib: set(512) },
        Scenario { rate_mib_per_s: Some(400), set_mib: set(512) },
        Scenario { rate_mib_per_s: None, set_mib: set(512) },
    ]
}
