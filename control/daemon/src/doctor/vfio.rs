//! VFIO: devices that can be passed through, and what happens to them in a move.
//!
//! Nothing is opened, because opening a device resets it: whether a driver migrates is read from its name. The kernel's
//! `vfio-pci` does not; drivers that do have a name of their own (`mlx5_vfio_pci`, …).

use super::host::{Host, PciDevice, linked, names, text};
use super::{Finding, Verdict, finding};

pub(super) fn row(host: &Host) -> Finding {
    const PART: &str = "VFIO";
    let groups = names(&host.sys("kernel/iommu_groups")).len();
    if !host.dev("vfio/vfio").exists() {
        let iommu = if groups == 0 { "no IOMMU".to_owned() } else { format!("{groups} IOMMU groups") };
        return finding(
            PART,
            Verdict::Without,
            format!("no /dev/vfio, {iommu}"),
            "guests without passthrough devices; load vfio-pci (and switch the IOMMU on) for them",
        );
    }
    let bound: Vec<PciDevice> =
        host.pci().into_iter().filter(|device| device.driver.contains("vfio")).collect();
    let mut found = vec![format!("type1 container, {groups} IOMMU groups")];
    found.extend(bound.iter().map(|device| {
        format!("{} ({}, {}, group {})", device.address, device.model, device.driver, device.group)
    }));
    found.extend(mediated(host));
    finding(PART, Verdict::Good, found.join("; "), consequence(&bound, host))
}

/// Mediated devices that exist, and the kinds that can be made.
fn mediated(host: &Host) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for device in names(&host.sys("bus/mdev/devices")) {
        let folder = host.sys("bus/mdev/devices").join(&device);
        found.push(format!(
            "mdev {device} ({}, group {})",
            linked(&folder.join("mdev_type")),
            linked(&folder.join("iommu_group"))
        ));
    }
    for parent in names(&host.sys("class/mdev_bus")) {
        let types = host.sys("class/mdev_bus").join(&parent).join("mdev_supported_types");
        for kind in names(&types) {
            let free = text(&types.join(&kind).join("available_instances")).unwrap_or_default();
            found.push(format!("mdev {kind}: {free} can be made"));
        }
    }
    found
}

fn consequence(bound: &[PciDevice], host: &Host) -> String {
    let plain = bound.iter().filter(|device| device.driver == "vfio-pci").count();
    let mut words = Vec::new();
    if plain > 0 {
        words.push(format!(
            "{plain} by plain vfio-pci cannot migrate: their guests need a standby (failover)"
        ));
    }
    if bound.len() > plain {
        words
            .push(format!("{} whose driver migrates: their state moves with the guest", bound.len() - plain));
    }
    if words.is_empty() {
        words.push(
            "no device is bound yet: a guest's device is asked whether it migrates when a move begins".into(),
        );
    }
    let unsafe_interrupts = host.read("module/vfio_iommu_type1/parameters/allow_unsafe_interrupts");
    if unsafe_interrupts.as_deref() == Some("Y") {
        words.push("unsafe interrupts are allowed on this host: a guest's device can disturb it".into());
    }
    words.join("; ")
}

pub(super) fn iommufd_row(host: &Host) -> Finding {
    const PART: &str = "iommufd";
    let devices = names(&host.dev("vfio/devices"));
    if !host.dev("iommu").exists() {
        return finding(
            PART,
            Verdict::Without,
            "no /dev/iommu",
            "groups and type1 containers, whose dirty tracking counts every pinned page as dirty",
        );
    }
    let found = match devices.len() {
        0 => "/dev/iommu, no device with a cdev".to_owned(),
        _ => format!("/dev/iommu, {}", devices.join(", ")),
    };
    finding(PART, Verdict::Good, found, "devices by cdev, the IOMMU's own dirty tracking")
}

#[cfg(test)]
mod tests {
    use super::super::host::tree::{file, pci};
    use super::*;

    #[test]
    fn a_host_without_vfio_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let host = Host::in_folder(folder.path());
        assert_eq!(row(&host).found, "no /dev/vfio, no IOMMU");
        assert_eq!((row(&host).verdict, iommufd_row(&host).verdict), (Verdict::Without, Verdict::Without));
    }

    #[test]
    fn bound_devices_are_told_apart_by_whether_they_migrate() {
        let folder = tempfile::tempdir().unwrap();
        let host = Host::in_folder(folder.path());
        file(folder.path(), "dev/vfio/vfio", "");
        file(folder.path(), "sys/kernel/iommu_groups/7/type", "DMA");
        pci(folder.path(), "0000:01:10.0", ("8086", "10ca"), "vfio-pci", "7");
        pci(folder.path(), "0000:01:10.2", ("8086", "10ca"), "igbvf", "8");
        pci(folder.path(), "0000:02:00.1", ("15b3", "101e"), "mlx5_vfio_pci", "9");
        file(
            folder.path(),
            "sys/class/mdev_bus/mtty/mdev_supported_types/mtty-2/available_instances",
            "12\n",
        );
        let row = row(&host);
        assert_eq!(
            row.found,
            "type1 container, 1 IOMMU groups; 0000:01:10.0 (8086:10ca, vfio-pci, group 7); 0000:02:00.1 (15b3:101e, \
             mlx5_vfio_pci, group 9); mdev mtty-2: 12 can be made"
        );
        assert!(row.consequence.contains("1 by plain vfio-pci cannot migrate"), "{}", row.consequence);
        assert!(row.consequence.contains("1 whose driver migrates"), "{}", row.consequence);
    }

    #[test]
    fn iommufd_is_used_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        file(folder.path(), "dev/iommu", "");
        file(folder.path(), "dev/vfio/devices/vfio0", "");
        assert_eq!(iommufd_row(&Host::in_folder(folder.path())).found, "/dev/iommu, vfio0");
    }
}
