//! PCI devices of the lab, and memory for their DMA.

use std::fs;
use std::fs::File;
use std::path::PathBuf;

/// The devices of a vendor and model, `8086:10ca`.
pub(crate) fn find(model: &str) -> Vec<PathBuf> {
    let word = |path: PathBuf| {
        fs::read_to_string(path).unwrap_or_default().trim().trim_start_matches("0x").to_owned()
    };
    let devices = fs::read_dir("/sys/bus/pci/devices").unwrap().map(|entry| entry.unwrap().path());
    let is_it =
        |path: &PathBuf| format!("{}:{}", word(path.join("vendor")), word(path.join("device"))) == model;
    devices.filter(is_it).collect()
}

/// A shared file of so many pages.
pub(crate) fn memory(pages: u64) -> File {
    let memory = rustix::fs::memfd_create("dma", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(memory);
    file.set_len(pages * 4096).unwrap();
    file
}
