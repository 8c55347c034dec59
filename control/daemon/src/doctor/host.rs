//! Where the kernel tells about hardware: `/sys` and `/dev`, or a tree that a test made.

use std::fs;
use std::path::{Path, PathBuf};

/// The two trees that rows read.
#[derive(Debug, Clone)]
pub(super) struct Host {
    sys: PathBuf,
    dev: PathBuf,
}

/// A device on the PCI bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PciDevice {
    /// Domain, bus, slot and function.
    pub(super) address: String,
    /// Vendor and model in hexadecimal.
    pub(super) model: String,
    /// The driver that it is bound to; empty where none is.
    pub(super) driver: String,
    /// Its IOMMU group; empty where the host has no IOMMU.
    pub(super) group: String,
    /// Its folder.
    pub(super) folder: PathBuf,
}

impl Host {
    /// This host.
    pub(super) fn this() -> Self {
        Self { sys: "/sys".into(), dev: "/dev".into() }
    }

    /// A host in a test's folder.
    #[cfg(test)]
    pub(super) fn in_folder(folder: &Path) -> Self {
        Self { sys: folder.join("sys"), dev: folder.join("dev") }
    }

    /// A path below `/sys`.
    pub(super) fn sys(&self, below: &str) -> PathBuf {
        self.sys.join(below)
    }

    /// A path below `/dev`.
    pub(super) fn dev(&self, below: &str) -> PathBuf {
        self.dev.join(below)
    }

    /// A file's text below `/sys`.
    pub(super) fn read(&self, below: &str) -> Option<String> {
        text(&self.sys(below))
    }

    /// Everything on the PCI bus, by address.
    pub(super) fn pci(&self) -> Vec<PciDevice> {
        names(&self.sys("bus/pci/devices"))
            .into_iter()
            .map(|address| {
                let folder = self.sys("bus/pci/devices").join(&address);
                let number = |file: &str| text(&folder.join(file)).unwrap_or_default().replace("0x", "");
                PciDevice {
                    model: format!("{}:{}", number("vendor"), number("device")),
                    driver: linked(&folder.join("driver")),
                    group: linked(&folder.join("iommu_group")),
                    address,
                    folder,
                }
            })
            .collect()
    }
}

/// A file's text without its end of line.
pub(super) fn text(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// The names in a folder, sorted; none where there is no such folder.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> =
        entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The last word of what a link points to.
pub(super) fn linked(link: &Path) -> String {
    let target = fs::read_link(link).unwrap_or_default();
    target.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
pub(super) mod tree {
    //! A host made of files.

    use std::os::unix::fs::symlink;

    use super::{Path, fs};

    /// Writes a file and the folders above it.
    pub(in super::super) fn file(folder: &Path, name: &str, content: &str) {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    /// A device on the PCI bus.
    pub(in super::super) fn pci(
        folder: &Path,
        address: &str,
        model: (&str, &str),
        driver: &str,
        group: &str,
    ) {
        let device = format!("sys/bus/pci/devices/{address}");
        file(folder, &format!("{device}/vendor"), &format!("0x{}\n", model.0));
        file(folder, &format!("{device}/device"), &format!("0x{}\n", model.1));
        for (link, target) in [("driver", driver), ("iommu_group", group)] {
            if !target.is_empty() {
                symlink(format!("../../{link}s/{target}"), folder.join(&device).join(link)).unwrap();
            }
        }
    }
}
