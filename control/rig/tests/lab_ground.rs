//! The lab itself: what other lab tests stand on is there.

use std::fs;
use std::path::Path;

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}")).trim().to_owned()
}

/// Devices of one vendor and model, and the driver that each is bound to.
fn pci(vendor: &str, model: &str) -> Vec<String> {
    let devices = fs::read_dir("/sys/bus/pci/devices").expect("a PCI bus").flatten();
    let wanted = devices.filter(|device| {
        let word = |name: &str| read(&device.path().join(name).display().to_string());
        word("vendor") == vendor && word("device") == model
    });
    let driver = |path: &Path| fs::read_link(path.join("driver")).ok();
    wanted
        .map(|device| {
            driver(&device.path())
                .and_then(|link| Some(link.file_name()?.to_string_lossy().into_owned()))
                .unwrap_or_default()
        })
        .collect()
}

#[test]
fn kvm_is_there() {
    assert!(Path::new("/dev/kvm").exists());
}

#[test]
fn passthrough_devices_are_bound_to_vfio() {
    assert_eq!(pci("0x8086", "0x10ca"), ["vfio-pci", "vfio-pci"], "two functions of the igb");
    assert_eq!(pci("0x1b36", "0x0010"), ["vfio-pci"], "the nvme");
    assert_eq!(pci("0x1234", "0x11e8"), ["vfio-pci"], "the edu device");
    assert!(Path::new("/sys/class/mdev_bus/mtty/mdev_supported_types/mtty-2/create").exists());
}

#[test]
fn rdma_links_are_active() {
    for link in ["rxe0", "rxelan"] {
        assert_eq!(read(&format!("/sys/class/infiniband/{link}/ports/1/state")), "4: ACTIVE", "{link}");
    }
}
