//! How a blank machine gets its first guest: the flat payload, or a Linux kernel.

mod cpu_mode;
mod linux;
mod mp_table;

use vm_memory::{Bytes, GuestAddress};

pub use linux::LinuxBoot;

use crate::KvmError;
use crate::machine::{Blank, Machine};
use crate::payload::{FLAT_CODE, FLAT_ENTRY};

impl Blank {
    /// Boots the flat payload of [`crate::payload`] on the first CPU; the others wait for a signal that never comes.
    pub fn boot_flat(self) -> Result<Machine, KvmError> {
        self.boot_code(&FLAT_CODE)
    }

    /// Boots 32-bit code that is linked for [`FLAT_ENTRY`], in protected mode with flat segments and without paging.
    pub fn boot_code(self, code: &[u8]) -> Result<Machine, KvmError> {
        self.identify()?;
        write(&self, FLAT_ENTRY, code, "the payload")?;
        cpu_mode::enter_flat(&self.vcpus[0], FLAT_ENTRY)?;
        Ok(self.into_machine())
    }

    /// Boots a Linux bzImage.
    pub fn boot_linux(self, boot: &LinuxBoot<'_>) -> Result<Machine, KvmError> {
        self.identify()?;
        linux::load(&self, boot)?;
        Ok(self.into_machine())
    }
}

/// Writes into the guest before it runs.
fn write(blank: &Blank, at: u64, bytes: &[u8], what: &str) -> Result<(), KvmError> {
    blank.memory().map().write_slice(bytes, GuestAddress(at)).map_err(|error| {
        KvmError::mistake(format!(
            "{what} does not fit into the guest's memory ({error}): give it more --ram"
        ))
    })
}
