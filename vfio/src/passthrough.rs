//! A device of the kernel's VFIO: a PCI device bound to `vfio-pci` or a variant of it, or a mediated device.
//!
//! What must never happen: a device taken as its last holder left it. A holder that died may have left any state (a
//! driver need not clean up: mtty's stays where it was), so a device that is not RUNNING when it is opened is reset.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vfio_bindings::bindings::vfio as kernel;
use vfio_ioctls::{DmaLoggingRange, VfioDevice};

use crate::device::{
    Bitmap, DataFile, DataRead, DmaLog, MigratableDevice, Migration, PrecopyInfo, READ_WAIT_MS,
};
use crate::dma::{IovaRange, PAGE_BYTES};
use crate::error::Left;
use crate::state::{Features, MigState};
use crate::{Iommu, VfioError, sys};

/// A device of this host, held by this process.
pub struct Passthrough {
    name: String,
    identity: Identity,
    migration: Migration,
    found: Option<MigState>,
    // Before the address space: the memory that it can reach goes last.
    device: Arc<VfioDevice>,
    iommu: Iommu,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    model: String,
    driver: String,
    address: String,
}

/// One of the regions of a device: its BARs by number, its configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region(pub u32);

impl Region {
    /// The configuration space of a PCI device.
    pub const CONFIG: Region = Region(kernel::VFIO_PCI_CONFIG_REGION_INDEX);
}

impl Passthrough {
    /// Takes the device at `path` (`/sys/bus/pci/devices/…`, `/sys/bus/mdev/devices/…`), called `name` by the
    /// operator.
    pub fn open(name: &str, path: &Path, iommu: &Iommu) -> Result<Passthrough, VfioError> {
        let path = fs::canonicalize(path).map_err(|error| {
            VfioError::UserMistake(format!("device `{name}`: there is no {}: {error}", path.display()))
        })?;
        let identity = Identity::read(&path);
        let what = format!(
            "take device `{name}` ({identity}); it must be bound to vfio-pci, and no other process may hold it or a device \
             of its group",
        );
        let device = VfioDevice::new(&path, iommu.ops(), true).map_err(VfioError::vfio(what))?;
        let migration = query(name, &device, &identity)?;
        let device = Arc::new(device);
        let (name, iommu) = (name.to_owned(), iommu.clone());
        let mut taken = Passthrough { name, identity, migration, found: None, device, iommu };
        if matches!(taken.migration, Migration::V2(_)) {
            let found = taken.state()?;
            if found != MigState::Running {
                taken.reset()?;
            }
            taken.found = Some(found);
        }
        Ok(taken)
    }

    /// What must be the same on both hosts.
    #[must_use]
    pub fn model(&self) -> &str {
        &self.identity.model
    }

    /// Model, driver and address, for people.
    #[must_use]
    pub fn what(&self) -> String {
        self.identity.to_string()
    }

    /// Where its last holder had left it.
    #[must_use]
    pub fn found(&self) -> Option<MigState> {
        self.found
    }

    /// The address space that it is in.
    #[must_use]
    pub fn iommu(&self) -> &Iommu {
        &self.iommu
    }

    /// The log that the device itself keeps, whether or not it has one: it is asked by starting it.
    #[must_use]
    pub fn log(&self) -> DeviceLog {
        DeviceLog(Arc::clone(&self.device))
    }

    /// Its regions, for accesses from any thread while the device is held elsewhere.
    #[must_use]
    pub fn regions(&self) -> Regions {
        Regions { name: self.name.clone(), device: Arc::clone(&self.device), _iommu: self.iommu.clone() }
    }
}

/// The regions of a [`Passthrough`], for a VMM's vCPUs.
#[derive(Clone)]
pub struct Regions {
    name: String,
    device: Arc<VfioDevice>,
    _iommu: Iommu,
}

impl Regions {
    /// How many bytes a region has; 0: the device has no such region.
    #[must_use]
    pub fn bytes(&self, region: Region) -> u64 {
        self.device.get_region_size(region.0)
    }

    /// Reads from a region. A driver does accesses of 1, 2 and 4 bytes as one.
    pub fn read(&self, region: Region, offset: u64, into: &mut [u8]) -> Result<(), VfioError> {
        let at = region_at(&self.name, &self.device, region, (offset, into.len()))?;
        let len = into.len();
        let read = rustix::io::pread(sys::file_of(&self.device), into, at);
        whole(&self.name, read, len, || format!("read region {} at {offset:#x}", region.0))
    }

    /// Writes to a region.
    pub fn write(&self, region: Region, offset: u64, bytes: &[u8]) -> Result<(), VfioError> {
        let at = region_at(&self.name, &self.device, region, (offset, bytes.len()))?;
        let written = rustix::io::pwrite(sys::file_of(&self.device), bytes, at);
        whole(&self.name, written, bytes.len(), || format!("write region {} at {offset:#x}", region.0))
    }
}

fn region_at(
    name: &str,
    device: &VfioDevice,
    region: Region,
    access: (u64, usize),
) -> Result<u64, VfioError> {
    let (offset, len) = (access.0, access.1 as u64);
    let size = device.get_region_size(region.0);
    if offset.checked_add(len).is_none_or(|end| end > size) {
        let Region(number) = region;
        return Err(VfioError::UserMistake(format!(
            "device `{name}`: region {number} has {size} bytes, and {len} at {offset:#x} are not in it"
        )));
    }
    Ok(device.get_region_offset(region.0) + offset)
}

fn whole(
    name: &str,
    done: Result<usize, Errno>,
    len: usize,
    what: impl FnOnce() -> String,
) -> Result<(), VfioError> {
    let source = match done {
        Ok(count) if count == len => return Ok(()),
        Ok(count) => io::Error::other(format!("{count} of {len} bytes")),
        Err(errno) => errno.into(),
    };
    Err(VfioError::HostRefused { what: format!("device `{name}`: {}", what()), source })
}

/// Whether a device can move, asked of its driver.
fn query(name: &str, device: &VfioDevice, identity: &Identity) -> Result<Migration, VfioError> {
    let what = format!("ask device `{name}` whether it can be moved");
    let flags = device.query_migration_support().map_err(VfioError::vfio(what))?;
    let has = |flag: u32| flags.is_some_and(|flags| flags & u64::from(flag) != 0);
    if !has(kernel::VFIO_MIGRATION_STOP_COPY) {
        let Identity { model, driver, .. } = identity;
        return Ok(Migration::NotMigratable(format!(
            "its driver {driver} has no migration for {model}; bind the vendor's VFIO driver for it if there is one, or \
             move it by failover to a virtio NIC"
        )));
    }
    let p2p = has(kernel::VFIO_MIGRATION_P2P);
    Ok(Migration::V2(Features { p2p, pre_copy: has(kernel::VFIO_MIGRATION_PRE_COPY) }))
}

impl MigratableDevice for Passthrough {
    fn name(&self) -> &str {
        &self.name
    }

    fn migration(&self) -> &Migration {
        &self.migration
    }

    fn state(&self) -> Result<MigState, VfioError> {
        let what = format!("ask device `{}` where it is", self.name);
        let number = self.device.get_migration_state().map_err(VfioError::vfio(what))?;
        MigState::from_kernel(number)
            .ok_or_else(|| VfioError::Bug(format!("device `{}` is in the unknown state {number}", self.name)))
    }

    fn set_state(&mut self, to: MigState) -> Result<Option<Box<dyn DataFile>>, VfioError> {
        let features = match &self.migration {
            Migration::V2(features) => *features,
            Migration::NotMigratable(why) => {
                return Err(VfioError::NotMigratable { device: self.name.clone(), why: why.clone() });
            }
        };
        let from = self.state()?;
        // Never put to the kernel: 6.12's `vfio_mig_get_next_state` skips the states that a device lacks, counts ERROR
        // among them, and on the way to an illegal one spins in ERROR for ever, out of reach of any signal.
        if features.path(from, to).is_none() {
            let (device, source) = (self.name.clone(), io::Error::from_raw_os_error(libc::EINVAL));
            return Err(VfioError::StateRefused { device, from, to, left: Left::In(from), source });
        }
        match sys::set_state(&self.device, to.to_kernel()) {
            Ok(file) => Ok(file.map(|file| Box::new(KernelFile(file)) as Box<dyn DataFile>)),
            Err(source) => {
                let left = self.state().map_or(Left::Unknown, Left::In);
                Err(VfioError::StateRefused { device: self.name.clone(), from, to, left, source })
            }
        }
    }

    fn reset(&mut self) -> Result<(), VfioError> {
        sys::reset(&self.device).map_err(VfioError::refused(format!("reset device `{}`", self.name)))
    }

    fn stop_copy_bytes(&self) -> Result<u64, VfioError> {
        let what = format!("ask device `{}` for the size of its state", self.name);
        self.device.get_mig_data_size().map_err(VfioError::vfio(what))
    }
}

/// A data file of the kernel.
struct KernelFile(OwnedFd);

impl KernelFile {
    fn wait(&self, flags: PollFlags) -> io::Result<bool> {
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(READ_WAIT_MS) * 1_000_000 };
        Ok(poll(&mut [PollFd::new(&self.0, flags)], Some(&wait))? > 0)
    }

    fn read_now(&self, into: &mut [u8]) -> io::Result<DataRead> {
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut *into)) {
            Ok(0) | Err(Errno::NOMSG) => Ok(DataRead::Empty),
            Ok(count) => Ok(DataRead::Bytes(count)),
            Err(Errno::AGAIN) => Ok(DataRead::NotYet),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl DataFile for KernelFile {
    fn read(&mut self, into: &mut [u8]) -> io::Result<DataRead> {
        let read = self.read_now(into)?;
        if read == DataRead::NotYet && self.wait(PollFlags::IN)? { self.read_now(into) } else { Ok(read) }
    }

    fn write_all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match rustix::io::retry_on_intr(|| rustix::io::write(&self.0, bytes)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => bytes = &bytes[count..],
                Err(Errno::AGAIN) => drop(self.wait(PollFlags::OUT)?),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn precopy_info(&mut self) -> io::Result<PrecopyInfo> {
        let (initial_bytes, dirty_bytes) = sys::precopy_info(&self.0)?;
        Ok(PrecopyInfo { initial_bytes, dirty_bytes })
    }

    fn duplicate(&self) -> Option<io::Result<OwnedFd>> {
        Some(self.0.as_fd().try_clone_to_owned())
    }
}

/// The log that a device keeps of its own DMA. It ends with the device's file.
///
/// A kernel without `CONFIG_IOMMUFD_DRIVER` (the lab's) starts such a log, and refuses every report of it with
/// EOPNOTSUPP, whatever the device: the error makes everything dirty, and the next best log is taken.
#[derive(Clone)]
pub struct DeviceLog(Arc<VfioDevice>);

impl DmaLog for DeviceLog {
    fn start(&mut self, ranges: &[IovaRange]) -> io::Result<()> {
        let ranges: Vec<_> = ranges.iter().map(|range| logged(*range)).collect();
        self.0.start_dma_logging(PAGE_BYTES, &ranges).map(drop).map_err(io::Error::other)
    }

    fn report(&mut self, range: IovaRange) -> io::Result<Bitmap> {
        self.0.report_dma_logging(logged(range), PAGE_BYTES).map_err(io::Error::other)
    }

    fn stop(&mut self) -> io::Result<()> {
        self.0.stop_dma_logging().map_err(io::Error::other)
    }
}

fn logged(range: IovaRange) -> DmaLoggingRange {
    DmaLoggingRange { iova: range.iova, length: range.len }
}

impl Identity {
    fn read(path: &Path) -> Identity {
        let link = |name: &str| {
            let target = fs::read_link(path.join(name)).ok()?;
            Some(target.file_name()?.to_string_lossy().into_owned())
        };
        let word = |name: &str| {
            Some(fs::read_to_string(path.join(name)).ok()?.trim().trim_start_matches("0x").to_owned())
        };
        let pci = || Some(format!("{}:{}", word("vendor")?, word("device")?));
        let unknown = || "unknown".to_owned();
        Identity {
            model: link("mdev_type").or_else(pci).unwrap_or_else(unknown),
            driver: link("driver").unwrap_or_else(|| "none".into()),
            address: path.file_name().map_or_else(unknown, |name| name.to_string_lossy().into_owned()),
        }
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, driver {}, at {}", self.model, self.driver, self.address)
    }
}
