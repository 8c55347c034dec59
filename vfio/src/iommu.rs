//! Where devices find memory: a type1 container with its groups, or an iommufd.
//!
//! Memory comes as a file: a guest's RAM is one anyway, so whoever shares it with a device needs no pointer. What must
//! never happen: memory unmapped here while a device can still reach it; the maps go after the container.
//!
//! iommufd stands behind the same `VfioOps` of vfio-ioctls. The kernel of the lab has none (`CONFIG_IOMMUFD` is off), so
//! that half was never run. Its dirty tracking (by page table, not by address space) is not used: under it a device
//! without a log of its own pins what it has mapped.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommufd_ioctls::IommuFd;
use vfio_ioctls::{VfioContainer, VfioIommufd, VfioOps};

use crate::VfioError;
use crate::device::{Bitmap, DmaLog};
use crate::dma::{DmaMaps, IovaRange, PAGE_BYTES};
use crate::sys::{self, Mapping, Type1Log};

/// An address space of devices. A clone is the same one.
#[derive(Clone)]
pub struct Iommu {
    kind: Kind,
    book: Arc<Mutex<Book>>,
}

#[derive(Clone)]
enum Kind {
    Container(Arc<VfioContainer>),
    Iommufd(Arc<VfioIommufd>),
}

#[derive(Default)]
struct Book {
    maps: DmaMaps,
    memory: Vec<(IovaRange, Mapping)>,
}

impl Iommu {
    /// What this host has: a container, or an iommufd where there are no groups.
    pub fn new() -> Result<Iommu, VfioError> {
        if Path::new("/dev/vfio/vfio").exists() { Iommu::container() } else { Iommu::iommufd() }
    }

    /// A type1 container; groups join it with their first device.
    pub fn container() -> Result<Iommu, VfioError> {
        let container = VfioContainer::new(None).map_err(VfioError::vfio("open /dev/vfio/vfio"))?;
        Ok(Iommu { kind: Kind::Container(Arc::new(container)), book: Arc::default() })
    }

    /// An iommufd with an address space of its own.
    pub fn iommufd() -> Result<Iommu, VfioError> {
        let fd = IommuFd::new().map_err(|error| VfioError::HostRefused {
            what: "open /dev/iommu; is the module vfio-pci loaded, and iommufd part of this kernel?".into(),
            source: io::Error::other(error),
        })?;
        let iommufd =
            VfioIommufd::new(Arc::new(fd), None, None).map_err(VfioError::vfio("make an address space"))?;
        Ok(Iommu { kind: Kind::Iommufd(Arc::new(iommufd)), book: Arc::default() })
    }

    pub(crate) fn ops(&self) -> Arc<dyn VfioOps> {
        match &self.kind {
            Kind::Container(container) => Arc::clone(container) as Arc<dyn VfioOps>,
            Kind::Iommufd(iommufd) => Arc::clone(iommufd) as Arc<dyn VfioOps>,
        }
    }

    /// Lets devices read and write `range.len` bytes of a shared memory file, from `offset` on. A container takes maps
    /// once it has a device.
    pub fn map(&self, range: IovaRange, file: impl AsFd, offset: u64) -> Result<(), VfioError> {
        let mut book = self.book();
        let mut maps = book.maps.clone();
        maps.add(range)?;
        let len = usize::try_from(range.len).map_err(|error| VfioError::Bug(error.to_string()))?;
        let memory = Mapping::of(file.as_fd(), offset, len)
            .map_err(VfioError::refused(format!("map {len} bytes of memory for devices")))?;
        let what = format!("let devices reach {range}; 'ulimit -l' must allow for all of the guest's memory");
        memory.map(self.ops().as_ref(), range.iova).map_err(VfioError::vfio(what))?;
        book.maps = maps;
        book.memory.push((range, memory));
        Ok(())
    }

    /// Takes back what was mapped as exactly this range.
    pub fn unmap(&self, range: IovaRange) -> Result<(), VfioError> {
        let mut book = self.book();
        let mut maps = book.maps.clone();
        maps.remove(range)?;
        let len = usize::try_from(range.len).map_err(|error| VfioError::Bug(error.to_string()))?;
        let what = format!("take {range} back from devices");
        self.ops().vfio_dma_unmap(range.iova, len).map_err(VfioError::vfio(what))?;
        book.maps = maps;
        book.memory.retain(|(other, _)| *other != range);
        Ok(())
    }

    /// What is mapped.
    #[must_use]
    pub fn maps(&self) -> DmaMaps {
        self.book().maps.clone()
    }

    /// The log that the IOMMU's driver keeps: type1's; iommufd's is not used.
    #[must_use]
    pub fn log(&self) -> Option<IommuLog> {
        match &self.kind {
            Kind::Container(container) => Some(IommuLog(Arc::clone(container))),
            Kind::Iommufd(_) => None,
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Type1's log of dirty pages, of a whole container. It knows what mediated devices pin; for a device behind a real
/// IOMMU it calls every mapped page dirty, every time.
pub struct IommuLog(Arc<VfioContainer>);

impl DmaLog for IommuLog {
    fn start(&mut self, _ranges: &[IovaRange]) -> io::Result<()> {
        sys::type1_log(&self.0, Type1Log::Start)
    }

    fn report(&mut self, range: IovaRange) -> io::Result<Bitmap> {
        let words = usize::try_from(range.pages().div_ceil(64)).map_err(io::Error::other)?;
        let mut bitmap = vec![0; words];
        sys::type1_report(&self.0, (range.iova, range.len), PAGE_BYTES, &mut bitmap)?;
        Ok(bitmap)
    }

    fn stop(&mut self) -> io::Result<()> {
        sys::type1_log(&self.0, Type1Log::Stop)
    }
}
