//! What of the host's devices a process holds open, by the links in `/proc/PID/fd`.
//!
//! A VFIO group names its IOMMU group, and sysfs names the devices in it. What must never happen: opening one.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::Serialize;

use super::memory::cannot_look;
use crate::GuestError;

/// A device, or a part of one, that a process holds open.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct HostDevice {
    /// What it is: `vfio-group`, `vfio-device`, `vfio-cdev`, `vfio-container`, `iommufd`, `kvm-vm`, `kvm-vcpu`,
    /// `vhost-net`, `tap`.
    pub kind: &'static str,
    /// The link that was found.
    pub link: String,
    /// Addresses, models and drivers, where sysfs has them.
    pub devices: Vec<String>,
}

impl HostDevice {
    /// Whether a guest may drive it.
    #[must_use]
    pub fn is_passed_through(&self) -> bool {
        matches!(self.kind, "vfio-group" | "vfio-device" | "vfio-cdev")
    }
}

/// Looks at the descriptors of process `pid`.
pub(super) fn look(pid: i32) -> Result<Vec<HostDevice>, GuestError> {
    let folder = format!("/proc/{pid}/fd");
    let entries = fs::read_dir(&folder).map_err(|error| cannot_look(pid, error))?;
    let links = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    let found: BTreeSet<HostDevice> =
        links.filter_map(|link| device(&link.to_string_lossy(), Path::new("/sys"))).collect();
    Ok(found.into_iter().collect())
}

/// What a descriptor's link says, if it is a device that matters here.
fn device(link: &str, sysfs: &Path) -> Option<HostDevice> {
    let (kind, devices) = match link {
        "/dev/vfio/vfio" => ("vfio-container", Vec::new()),
        "/dev/iommu" => ("iommufd", Vec::new()),
        "/dev/net/tun" => ("tap", Vec::new()),
        "/dev/vhost-net" => ("vhost-net", Vec::new()),
        "anon_inode:kvm-vm" => ("kvm-vm", Vec::new()),
        _ if link.starts_with("anon_inode:kvm-vcpu") => ("kvm-vcpu", Vec::new()),
        _ if link.starts_with("anon_inode:[vfio-device") => ("vfio-device", Vec::new()),
        _ => {
            if let Some(name) = link.strip_prefix("/dev/vfio/devices/") {
                ("vfio-cdev", sysfs_link(&sysfs.join("class/vfio-dev").join(name).join("device")))
            } else {
                let group: u32 = link.strip_prefix("/dev/vfio/")?.parse().ok()?;
                ("vfio-group", of_group(sysfs, group))
            }
        }
    };
    Some(HostDevice { kind, link: link.to_owned(), devices })
}

/// The devices of an IOMMU group.
fn of_group(sysfs: &Path, group: u32) -> Vec<String> {
    let folder = sysfs.join(format!("kernel/iommu_groups/{group}/devices"));
    let mut found: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .flat_map(|entry| sysfs_link(&entry.path()))
        .collect();
    found.sort();
    found
}

/// "0000:01:10.0 8086:10ca (vfio-pci)".
fn sysfs_link(device: &Path) -> Vec<String> {
    let Ok(real) = fs::canonicalize(device) else { return Vec::new() };
    let word = |name: &str| {
        let text = fs::read_to_string(real.join(name)).unwrap_or_default();
        text.trim().trim_start_matches("0x").to_owned()
    };
    let name = real.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let model = match (word("vendor"), word("device")) {
        (vendor, model) if !vendor.is_empty() => format!(" {vendor}:{model}"),
        _ => String::new(),
    };
    let driver = fs::read_link(real.join("driver")).ok();
    let driver =
        driver.and_then(|path| path.file_name().map(|name| format!(" ({})", name.to_string_lossy())));
    vec![format!("{name}{model}{}", driver.unwrap_or_default())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_told_apart_and_others_left_out() {
        let sysfs = Path::new("/nowhere");
        for (link, kind) in [
            ("/dev/vfio/vfio", "vfio-container"),
            ("/dev/vfio/12", "vfio-group"),
            ("/dev/vfio/devices/vfio0", "vfio-cdev"),
            ("anon_inode:[vfio-device]", "vfio-device"),
            ("anon_inode:kvm-vm", "kvm-vm"),
            ("anon_inode:kvm-vcpu:3", "kvm-vcpu"),
            ("/dev/iommu", "iommufd"),
        ] {
            assert_eq!(device(link, sysfs).map(|device| device.kind), Some(kind), "{link}");
        }
        for link in ["/dev/kvm", "/dev/vfio/x", "anon_inode:[eventfd]", "socket:[7]", "/tmp/a"] {
            assert_eq!(device(link, sysfs), None, "{link}");
        }
    }

    #[test]
    fn a_group_names_its_devices_with_model_and_driver() {
        let sysfs = tempfile::tempdir().unwrap();
        let real = sysfs.path().join("devices/0000:01:10.0");
        let group = sysfs.path().join("kernel/iommu_groups/7/devices");
        let driver = sysfs.path().join("drivers/vfio-pci");
        for folder in [&real, &group, &driver] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(real.join("vendor"), "0x8086\n").unwrap();
        fs::write(real.join("device"), "0x10ca\n").unwrap();
        std::os::unix::fs::symlink(&driver, real.join("driver")).unwrap();
        std::os::unix::fs::symlink(&real, group.join("0000:01:10.0")).unwrap();
        let found = device("/dev/vfio/7", sysfs.path()).unwrap();
        assert_eq!(found.devices, ["0000:01:10.0 8086:10ca (vfio-pci)"]);
        assert!(found.is_passed_through());
    }
}
