//! A Linux kernel by the 64-bit boot protocol: bzImage, initramfs, command line and the map of the memory.
//!
//! ```text
//!   0x500 GDT · 0x7000 boot_params · 0x9000 page tables · 0x20000 command line · 0x9fc00 processors │ 1 MiB kernel … │ … initramfs, at the top
//! ```

use std::fs::File;

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::boot_params;
use linux_loader::loader::{BzImage, KernelLoader};
use vm_memory::GuestAddress;

use super::{cpu_mode, mp_table, write};
use crate::KvmError;
use crate::machine::Blank;
use crate::memory::{GAP_END, GAP_START};

const BOOT_PARAMS: u64 = 0x7000;
const COMMAND_LINE: u64 = 0x2_0000;
/// The kernel's own limit.
const COMMAND_LINE_BYTES_MAX: usize = 2047;
/// Below it lies what a PC's BIOS would claim.
const LOW_MEMORY_END: u64 = 0x9_fc00;
const KERNEL_START: u64 = 0x10_0000;
/// Where the 64-bit entry lies in the loaded image.
const ENTRY_OFFSET: u64 = 0x200;
/// The page tables that the kernel starts on reach to here.
const MAPPED_END: u64 = 1 << 30;
const E820_RAM: u32 = 1;
const PAGE: u64 = 4096;

/// What a Linux guest is booted from.
#[derive(Debug)]
pub struct LinuxBoot<'a> {
    /// A bzImage.
    pub kernel: &'a File,
    /// Its first file system, as the kernel unpacks it.
    pub initramfs: &'a [u8],
    /// The kernel's command line.
    pub command_line: &'a str,
}

pub(super) fn load(blank: &Blank, boot: &LinuxBoot<'_>) -> Result<(), KvmError> {
    let mut kernel = boot.kernel;
    let start = GuestAddress(KERNEL_START);
    let loaded =
        BzImage::load(blank.memory().map(), Some(start), &mut kernel, Some(start)).map_err(|error| {
            KvmError::mistake(format!(
                "the kernel cannot be loaded ({error}): give a bzImage and enough --ram"
            ))
        })?;
    let mut params = boot_params::default();
    if let Some(header) = loaded.setup_header {
        params.hdr = header;
    }
    // "Some other loader", as the protocol wants of one that has no number.
    params.hdr.type_of_loader = 0xff;
    place_command_line(blank, boot.command_line, &mut params)?;
    place_initramfs(blank, boot.initramfs, loaded.kernel_end, &mut params)?;
    let cpus = u8::try_from(blank.vcpus.len()).unwrap_or(u8::MAX);
    write(blank, mp_table::MP_TABLE, &mp_table::table(cpus), "the processor table")?;
    describe_memory(blank.memory().layout().total_bytes().0, &mut params);
    let params = BootParams::new::<boot_params>(&params, GuestAddress(BOOT_PARAMS));
    LinuxBootConfigurator::write_bootparams(&params, blank.memory().map()).map_err(|error| {
        KvmError::mistake(format!("the guest has no room for its boot parameters: {error}"))
    })?;
    cpu_mode::enter_long(blank, loaded.kernel_load.0 + ENTRY_OFFSET, BOOT_PARAMS)
}

fn place_command_line(blank: &Blank, text: &str, params: &mut boot_params) -> Result<(), KvmError> {
    if text.len() > COMMAND_LINE_BYTES_MAX || text.contains('\0') {
        return Err(KvmError::mistake(format!(
            "the kernel's command line has {} bytes, and at most {COMMAND_LINE_BYTES_MAX} without a zero are taken",
            text.len()
        )));
    }
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    write(blank, COMMAND_LINE, &bytes, "the command line")?;
    params.hdr.cmd_line_ptr = u32::try_from(COMMAND_LINE).unwrap_or(0);
    params.hdr.cmdline_size = u32::try_from(text.len()).unwrap_or(0);
    Ok(())
}

/// As high as the kernel takes it, so that it does not lie where the kernel unpacks itself.
fn place_initramfs(
    blank: &Blank,
    bytes: &[u8],
    kernel_end: u64,
    params: &mut boot_params,
) -> Result<(), KvmError> {
    let top = blank.memory().layout().total_bytes().0.min(GAP_START).min(MAPPED_END);
    let top = top.min(u64::from(params.hdr.initrd_addr_max) + 1);
    let at = top.checked_sub(bytes.len() as u64).map(|at| at / PAGE * PAGE).filter(|at| *at >= kernel_end);
    let at = at.ok_or_else(|| {
        KvmError::mistake("kernel and initramfs do not fit into the guest: give it more --ram")
    })?;
    write(blank, at, bytes, "the initramfs")?;
    params.hdr.ramdisk_image = u32::try_from(at).unwrap_or(0);
    params.hdr.ramdisk_size = u32::try_from(bytes.len()).unwrap_or(0);
    Ok(())
}

fn describe_memory(ram: u64, params: &mut boot_params) {
    let below = ram.min(GAP_START);
    let pieces = [(0, LOW_MEMORY_END), (KERNEL_START, below - KERNEL_START), (GAP_END, ram - below)];
    let pieces = pieces.into_iter().filter(|(_, len)| *len > 0);
    for ((addr, size), entry) in pieces.zip(&mut params.e820_table) {
        (entry.addr, entry.size, entry.r#type) = (addr, size, E820_RAM);
        params.e820_entries += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_leaves_the_gap_out() {
        let mut params = boot_params::default();
        describe_memory((3 << 30) + (1 << 20), &mut params);
        let found: Vec<_> =
            params.e820_table[..3].iter().map(|entry| ({ entry.addr }, { entry.size })).collect();
        assert_eq!(params.e820_entries, 3);
        assert_eq!(found, [(0, 0x9_fc00), (1 << 20, (3 << 30) - (1 << 20)), (4 << 30, 1 << 20)]);
    }
}
