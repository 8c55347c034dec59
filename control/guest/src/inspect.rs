//! Shows a guest without touching it: nothing is stopped, attached, mapped or changed.
//!
//! ```text
//!   pid:PID ───► /proc: shared files that are RAM, who else writes them, /dev/vfio and KVM descriptors
//!   qemu:PATH ─► the same of its process, and what QMP says: blocks, devices, O_DIRECT nodes, blockers
//!   kvm:, process: ► the same of its process, and its own devices
//! ```
//!
//! What cannot be found out this way is said to be so. What must never happen: a guest that is different after it
//! was looked at.

mod descriptors;
mod memory;

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

pub use descriptors::HostDevice;
pub use memory::{MemoryFile, MemoryWriter};

use crate::attach::{kernel_support, soft_dirty_support};
use crate::device::{DeviceFacts, DeviceMigration};
use crate::{GuestError, GuestSpec, kvm, process, qemu};

/// What to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InspectSpec {
    /// A guest that an adapter knows.
    Guest(GuestSpec),
    /// Any process that runs a guest.
    Pid(i32),
}

impl FromStr for InspectSpec {
    type Err = GuestError;

    fn from_str(text: &str) -> Result<Self, GuestError> {
        if let Some(number) = text.strip_prefix("pid:") {
            let pid = number.parse().ok().filter(|pid| *pid > 0).ok_or_else(|| {
                GuestError::mistake(format!(
                    "`{text}` names no process: write pid: and its number, such as pid:4711"
                ))
            })?;
            return Ok(Self::Pid(pid));
        }
        let guest = text.parse().map_err(|_: GuestError| {
            GuestError::mistake(format!(
                "`{text}` names no guest; write qemu:/path/of/its/qmp.sock, kvm:NAME, process:NAME or pid:PID"
            ))
        })?;
        Ok(Self::Guest(guest))
    }
}

impl fmt::Display for InspectSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Guest(guest) => guest.fmt(f),
            Self::Pid(pid) => write!(f, "pid:{pid}"),
        }
    }
}

/// What was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Inspection {
    /// The guest's or the process's name, and its process id.
    pub name: String,
    /// The process that runs it.
    pub pid: i32,
    /// Whether it runs, in the VMM's own word; none where only `/proc` was looked at.
    pub status: Option<String>,
    /// Memory that other processes can map: the guest's RAM is among it.
    pub memory: Vec<MemoryFile>,
    /// RAM that no other process can map, bytes.
    pub private_bytes: u64,
    /// How a guest's writes could be tracked on this host, best first.
    pub trackers: Vec<Tracker>,
    /// Who maps the memory for writing.
    pub writers: Vec<MemoryWriter>,
    /// Devices that the VMM or the workload names.
    pub devices: Vec<InspectedDevice>,
    /// What of the host's devices the process holds open.
    pub host_devices: Vec<HostDevice>,
    /// Block nodes with O_DIRECT: their reads reach memory after the dirty bit was seen.
    pub direct_io_nodes: Vec<String>,
    /// What keeps the guest from being moved, in sentences that say what to do.
    pub blockers: Vec<String>,
    /// What else an operator should know.
    pub notes: Vec<String>,
}

/// A way to track writes.
#[derive(Clone, Debug, Serialize)]
pub struct Tracker {
    /// Its name.
    pub name: &'static str,
    /// Why it cannot be used here; none when it can.
    pub unavailable: Option<String>,
}

/// A device as the VMM names it.
#[derive(Clone, Debug, Serialize)]
pub struct InspectedDevice {
    /// What is passed through.
    #[serde(flatten)]
    pub facts: DeviceFacts,
    /// Whether it can be moved.
    pub migratable: bool,
    /// How, or why not.
    pub how: String,
}

impl From<DeviceFacts> for InspectedDevice {
    fn from(facts: DeviceFacts) -> Self {
        let (migratable, how) = match &facts.migration {
            DeviceMigration::PreCopy { .. } => {
                (true, "pre-copied while the guest runs, the rest after the pause".into())
            }
            DeviceMigration::StopCopy { .. } => (true, "copied after the pause".into()),
            DeviceMigration::InVmmState => {
                (true, "carried by the VMM inside its own state, if it names no blocker".into())
            }
            DeviceMigration::NotMigratable(why) => (false, why.clone()),
        };
        Self { facts, migratable, how }
    }
}

/// Looks.
pub fn inspect(spec: &InspectSpec) -> Result<Inspection, GuestError> {
    match spec {
        InspectSpec::Pid(pid) => by_number(*pid),
        InspectSpec::Guest(GuestSpec::Qemu { qmp }) => qemu::inspect(qmp),
        InspectSpec::Guest(GuestSpec::Kvm { name }) => kvm::inspect(name),
        InspectSpec::Guest(GuestSpec::Process { name }) => process::inspect(name),
    }
}

/// A process of which only the number is known.
fn by_number(pid: i32) -> Result<Inspection, GuestError> {
    let mut seen = by_process(pid)?;
    if seen.host_devices.iter().any(HostDevice::is_passed_through) {
        seen.notes.push(
            "devices are passed through: whether they can migrate is the VMM's to tell; inspect it by its own name \
             (qemu:, kvm:) too"
                .into(),
        );
    }
    Ok(seen)
}

/// All that `/proc` says about a process that runs a guest.
pub(crate) fn by_process(pid: i32) -> Result<Inspection, GuestError> {
    let found = memory::look(pid)?;
    let host_devices = descriptors::look(pid)?;
    let mut seen = Inspection {
        name: found.name,
        pid,
        memory: found.files,
        private_bytes: found.private_bytes,
        trackers: trackers(),
        writers: found.writers,
        host_devices,
        notes: found.notes,
        ..Inspection::default()
    };
    if seen.memory.is_empty() {
        seen.blockers.push(format!(
            "{} shares no memory of {} MiB or more that others can map: it runs no guest, or one whose RAM is private; \
             give a QEMU `-object memory-backend-file,…,share=on`",
            seen.name,
            memory::FILE_BYTES_MIN >> 20
        ));
    }
    Ok(seen)
}

fn trackers() -> Vec<Tracker> {
    let soft_dirty = "this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)";
    vec![
        Tracker { name: "pagemap-scan", unavailable: kernel_support().err() },
        Tracker { name: "soft-dirty", unavailable: (!soft_dirty_support()).then(|| soft_dirty.to_owned()) },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_reads_back_what_it_prints() {
        for text in ["qemu:/run/a.qmp", "kvm:a", "process:db-1", "pid:4711"] {
            assert_eq!(text.parse::<InspectSpec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn anything_else_is_told_what_can_be_written() {
        for text in ["pid:", "pid:x", "pid:-1", "pid:0"] {
            assert!(text.parse::<InspectSpec>().unwrap_err().to_string().contains("pid:4711"), "{text}");
        }
        assert!("x".parse::<InspectSpec>().unwrap_err().to_string().contains("or pid:PID"));
    }
}
