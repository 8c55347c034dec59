//! What this kernel's userfaultfd offers, and the bytes of its requests.
#![expect(unsafe_code, reason = "userfaultfd has no safe wrapper")]

use std::ffi::c_void;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use linux_raw_sys::general::{
    UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED,
};
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use vmferry_datapath::PAGE_BYTES;

/// `UFFDIO_API` and `UFFDIO_REGISTER` of <linux/userfaultfd.h>.
pub(crate) const API_REQUEST: u32 = 0xc018_aa3f;
/// See [`API_REQUEST`].
pub(crate) const REGISTER_REQUEST: u32 = 0xc020_aa00;
/// The handshake's constant, `UFFD_API`.
const API: u64 = 0xaa;
/// `UFFDIO_REGISTER_MODE_WP`.
const MODE_WRITE_PROTECT: u64 = 1 << 1;
/// Asynchronous write protection (Linux 6.7), also of pages not there yet, also of shared and huge memory.
#[expect(clippy::as_conversions, reason = "From is not const")]
const FEATURES: u64 =
    (UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM) as u64;
/// Faults of user mode only: what an unprivileged process may have. Enough here: asynchronous protection is lifted
/// by the kernel itself, in either mode.
pub(crate) const USER_MODE_ONLY: u32 = 1;

/// `struct uffdio_api`, asking for what tracking needs.
pub(crate) fn api_words() -> [u8; 24] {
    words([API, FEATURES, 0])
}

/// `struct uffdio_register` for write protection of one range.
pub(crate) fn register_words(start: u64, len: u64) -> [u8; 32] {
    words([start, len, MODE_WRITE_PROTECT, 0])
}

fn words<const WORDS: usize, const BYTES: usize>(values: [u64; WORDS]) -> [u8; BYTES] {
    let mut bytes = [0; BYTES];
    for (slot, value) in bytes.chunks_exact_mut(8).zip(values) {
        slot.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Whether this kernel can track by `PAGEMAP_SCAN`, in words.
pub fn kernel_support() -> Result<String, String> {
    let (descriptor, how) = match open(UserfaultfdFlags::CLOEXEC) {
        Err(Errno::PERM) => (
            open(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY)),
            ", user mode only",
        ),
        other => (other, ""),
    };
    let descriptor = descriptor.map_err(|errno| match errno {
        Errno::NOSYS => "this kernel has no userfaultfd (CONFIG_USERFAULTFD)".to_owned(),
        _ => format!("userfaultfd is refused here: {errno} (a container's seccomp profile?)"),
    })?;
    // SAFETY: UFFDIO_API only reads and writes the struct that `Api` owns.
    match unsafe { ioctl(&descriptor, Api(api_words())) } {
        Ok(()) => Ok(format!("userfaultfd with asynchronous write protection{how}")),
        Err(Errno::INVAL) => {
            Err("asynchronous write protection is not in this kernel (it came with Linux 6.7)".into())
        }
        Err(errno) => Err(format!("userfaultfd answers {errno}")),
    }
}

/// Whether the older way works: a page that was just written has its soft-dirty bit set.
#[must_use]
pub fn soft_dirty_support() -> bool {
    const ENTRY_BYTES: u64 = 8;
    const SOFT_DIRTY: u64 = 1 << 55;
    let fresh = std::hint::black_box(vec![1_u8; PAGE_BYTES]);
    let page = fresh.as_ptr().addr() / PAGE_BYTES;
    let mut entry = [0; 8];
    File::open("/proc/self/pagemap")
        .and_then(|pagemap| pagemap.read_exact_at(&mut entry, page as u64 * ENTRY_BYTES))
        .is_ok_and(|()| u64::from_le_bytes(entry) & SOFT_DIRTY != 0)
}

fn open(flags: UserfaultfdFlags) -> rustix::io::Result<OwnedFd> {
    // SAFETY: a userfaultfd without a registered range changes nothing in this process.
    unsafe { userfaultfd(flags) }
}

struct Api([u8; 24]);

// SAFETY: UFFDIO_API is _IOWR(0xaa, 0x3f, struct uffdio_api), a struct of three u64; the pointer given is to 24 bytes.
unsafe impl Ioctl for Api {
    type Output = ();

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        API_REQUEST
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER};

    #[test]
    fn request_numbers_are_the_kernels() {
        assert_eq!(API_REQUEST, UFFDIO_API);
        assert_eq!(REGISTER_REQUEST, UFFDIO_REGISTER);
    }

    #[test]
    fn the_register_struct_has_the_kernels_order() {
        let bytes = register_words(0x1000, 0x2000);
        assert_eq!(bytes[0..8], 0x1000_u64.to_le_bytes());
        assert_eq!(bytes[8..16], 0x2000_u64.to_le_bytes());
        assert_eq!(bytes[16], 2);
    }
}
