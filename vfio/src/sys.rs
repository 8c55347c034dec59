//! The system calls that vfio-ioctls 0.10 does not wrap, or wraps in a way that hides what a mover needs.
//!
//! | here | because in the crate |
//! |---|---|
//! | set a migration state | the data file is private, behind a mutex, and blocks |
//! | `GET_PRECOPY_INFO` | works on that private file only |
//! | reset | `VfioDevice::reset` gives no answer, and does nothing unless the device announces it (mtty does not) |
//! | read and write a region | `region_read` logs a failure and returns as if it had read |
//! | `VFIO_IOMMU_DIRTY_PAGES` | is not there |

#![expect(
    unsafe_code,
    reason = "system calls on VFIO's files; every one is a block of its own with its reason"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::OFlags;
use vfio_bindings::bindings::vfio as kernel;
use vfio_ioctls::{VfioDevice, VfioOps};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ref, ioctl_with_ref};

/// `_IO(';', 100 + n)`.
const fn request(n: libc::c_ulong) -> libc::c_ulong {
    0x3b64 + n
}
const DEVICE_RESET: libc::c_ulong = request(11);
const DEVICE_FEATURE: libc::c_ulong = request(17);
const IOMMU_DIRTY_PAGES: libc::c_ulong = request(17);
const GET_PRECOPY_INFO: libc::c_ulong = request(21);

fn answer(code: libc::c_int) -> io::Result<()> {
    if code < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct vfio_device_feature` with a `vfio_device_feature_mig_state` behind it.
#[repr(C)]
#[derive(Debug)]
struct MigStateRequest {
    argsz: u32,
    flags: u32,
    device_state: u32,
    data_fd: i32,
}
const _: () = assert!(size_of::<MigStateRequest>() == 16);

/// The device's file, for as long as the device lives.
pub(crate) fn file_of(device: &VfioDevice) -> BorrowedFd<'_> {
    // SAFETY: the device owns this file and the borrow ends before it does.
    unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) }
}

/// Asks for a state. The file that comes with it is non-blocking.
pub(crate) fn set_state(device: &VfioDevice, state: u32) -> io::Result<Option<OwnedFd>> {
    let mut request = MigStateRequest {
        argsz: 16,
        flags: kernel::VFIO_DEVICE_FEATURE_SET | kernel::VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE,
        device_state: state,
        data_fd: -1,
    };
    // SAFETY: the struct is the one that this feature is documented to take, and outlives the call.
    answer(unsafe { ioctl_with_mut_ref(device, DEVICE_FEATURE, &mut request) })?;
    if request.data_fd < 0 {
        return Ok(None);
    }
    // SAFETY: the kernel made this file for us in the call above, and nobody else knows its number.
    let file = unsafe { OwnedFd::from_raw_fd(request.data_fd) };
    let flags = rustix::fs::fcntl_getfl(&file)?;
    rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
    Ok(Some(file))
}

/// What is still to be read of a device that pre-copies.
pub(crate) fn precopy_info(file: &OwnedFd) -> io::Result<(u64, u64)> {
    let argsz = u32::try_from(size_of::<kernel::vfio_precopy_info>()).unwrap_or(u32::MAX);
    let mut info = kernel::vfio_precopy_info { argsz, ..Default::default() };
    // SAFETY: the struct is the one that this call is documented to take, and outlives the call.
    answer(unsafe { ioctl_with_mut_ref(file, GET_PRECOPY_INFO, &mut info) })?;
    Ok((info.initial_bytes, info.dirty_bytes))
}

/// `VFIO_DEVICE_RESET`.
pub(crate) fn reset(device: &VfioDevice) -> io::Result<()> {
    // SAFETY: the call takes no argument.
    answer(unsafe { ioctl(device, DEVICE_RESET) })
}

/// What `VFIO_IOMMU_DIRTY_PAGES` is to do.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Type1Log {
    Start,
    Stop,
}

/// The header of `struct vfio_iommu_type1_dirty_bitmap`, with the range behind it.
#[repr(C)]
#[derive(Debug)]
struct DirtyRequest {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
    page_bytes: u64,
    bitmap_bytes: u64,
    bitmap: u64,
}
const _: () = assert!(size_of::<DirtyRequest>() == 48);

impl DirtyRequest {
    fn of(flags: u32) -> DirtyRequest {
        DirtyRequest { argsz: 48, flags, iova: 0, size: 0, page_bytes: 0, bitmap_bytes: 0, bitmap: 0 }
    }
}

/// Starts or stops the container's log.
pub(crate) fn type1_log(container: &vfio_ioctls::VfioContainer, what: Type1Log) -> io::Result<()> {
    let request = DirtyRequest::of(match what {
        Type1Log::Start => kernel::VFIO_IOMMU_DIRTY_PAGES_FLAG_START,
        Type1Log::Stop => kernel::VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP,
    });
    // SAFETY: the struct is the one that this call is documented to take, and outlives the call.
    answer(unsafe { ioctl_with_ref(container, IOMMU_DIRTY_PAGES, &request) })
}

/// The container's log of `iova..iova + size`, into a bitmap of one bit a page that has room for it.
pub(crate) fn type1_report(
    container: &vfio_ioctls::VfioContainer,
    (iova, size): (u64, u64),
    page_bytes: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    let needed = size.div_ceil(page_bytes).div_ceil(64);
    if u64::try_from(bitmap.len()).is_ok_and(|words| words < needed) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let request = DirtyRequest {
        iova,
        size,
        page_bytes,
        bitmap_bytes: needed * 8,
        bitmap: bitmap.as_mut_ptr().addr() as u64,
        ..DirtyRequest::of(kernel::VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP)
    };
    // SAFETY: the struct is the one that this call is documented to take; the bitmap is ours for the call and has
    // room for the bytes that are named.
    answer(unsafe { ioctl_with_ref(container, IOMMU_DIRTY_PAGES, &request) })
}

/// A piece of a file in this process's address space, for devices only: nobody here reads or writes through it.
#[derive(Debug)]
pub(crate) struct Mapping {
    at: *mut libc::c_void,
    len: usize,
}

// SAFETY: the pointer is never followed in this process; it is an address for the kernel.
unsafe impl Send for Mapping {}

impl Mapping {
    pub(crate) fn of(file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Mapping> {
        use rustix::mm::{MapFlags, ProtFlags};
        let (access, shared) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses the address, so no other mapping is touched.
        let at = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, shared, file, offset) }?;
        Ok(Mapping { at, len })
    }

    /// Lets devices reach it at `iova`.
    pub(crate) fn map(&self, ops: &dyn VfioOps, iova: u64) -> Result<(), vfio_ioctls::VfioError> {
        // SAFETY: it stays mapped until its owner unmapped the range or closed the container, and there is no
        // reference to it in this process.
        unsafe { ops.vfio_dma_map(iova, self.len, self.at.cast()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, nobody kept its address, and devices were unmapped before.
        let unmapped = unsafe { rustix::mm::munmap(self.at, self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping: {unmapped:?}");
    }
}
