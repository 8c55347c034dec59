//! SR-IOV: physical functions, and the virtual functions that they have been told to show.

use super::host::{Host, PciDevice, linked, names, text};
use super::{Finding, Verdict, finding};

pub(super) fn row(host: &Host) -> Finding {
    const PART: &str = "SR-IOV";
    let devices = host.pci();
    let capable: Vec<(&PciDevice, u32)> = devices
        .iter()
        .filter_map(|device| Some((device, number(device, "sriov_totalvfs").filter(|total| *total > 0)?)))
        .collect();
    if capable.is_empty() {
        return finding(
            PART,
            Verdict::Without,
            "no device with virtual functions",
            "guests with virtio NICs",
        );
    }
    let found: Vec<String> =
        capable.iter().map(|(device, total)| describe(device, *total, &devices)).collect();
    let made: u32 = capable.iter().filter_map(|(device, _)| number(device, "sriov_numvfs")).sum();
    let consequence = if made == 0 {
        "none is made: echo N > /sys/bus/pci/devices/ADDRESS/sriov_numvfs"
    } else {
        "a guest's virtual function leaves for its standby before a move (send --failover auto) and the target's takes \
         over (receive --failover-primary)"
    };
    finding(PART, Verdict::Good, found.join("; "), consequence)
}

fn describe(device: &PciDevice, total: u32, all: &[PciDevice]) -> String {
    let made = number(device, "sriov_numvfs").unwrap_or(0);
    let net = names(&device.folder.join("net"));
    let name = net.first().map_or_else(|| device.driver.clone(), Clone::clone);
    let mut functions: Vec<String> = names(&device.folder)
        .iter()
        .filter(|file| file.starts_with("virtfn"))
        .map(|link| {
            let address = linked(&device.folder.join(link));
            let driver = all.iter().find(|function| function.address == address).map(|f| f.driver.as_str());
            format!("{address} by {}", driver.filter(|driver| !driver.is_empty()).unwrap_or("nobody"))
        })
        .collect();
    functions.sort();
    let list = if functions.is_empty() { String::new() } else { format!(": {}", functions.join(", ")) };
    format!("{} ({}, {name}) shows {made} of {total}{list}", device.address, device.model)
}

fn number(device: &PciDevice, file: &str) -> Option<u32> {
    text(&device.folder.join(file))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::host::tree::{file, pci};
    use super::*;

    #[test]
    fn functions_are_named_with_their_drivers() {
        let folder = tempfile::tempdir().unwrap();
        let host = Host::in_folder(folder.path());
        assert_eq!(row(&host).verdict, Verdict::Without);
        pci(folder.path(), "0000:01:00.0", ("8086", "10c9"), "igb", "3");
        pci(folder.path(), "0000:01:10.0", ("8086", "10ca"), "vfio-pci", "7");
        pci(folder.path(), "0000:01:10.2", ("8086", "10ca"), "", "8");
        let parent = "sys/bus/pci/devices/0000:01:00.0";
        file(folder.path(), &format!("{parent}/sriov_totalvfs"), "7\n");
        file(folder.path(), &format!("{parent}/sriov_numvfs"), "2\n");
        file(folder.path(), &format!("{parent}/net/eth3/address"), "x");
        for (name, target) in [("virtfn0", "0000:01:10.0"), ("virtfn1", "0000:01:10.2")] {
            symlink(format!("../{target}"), folder.path().join(parent).join(name)).unwrap();
        }
        assert_eq!(
            row(&host).found,
            "0000:01:00.0 (8086:10c9, eth3) shows 2 of 7: 0000:01:10.0 by vfio-pci, 0000:01:10.2 by nobody"
        );
    }
}
