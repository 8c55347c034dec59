//! The memory of a guest whose VMM speaks the control socket: a memfd, which has no path, so it is reached through the
//! process that holds it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;

use vmferry_datapath::{ByteLen, PAGE_BYTES, PageIndex, RamBlock, RamFile, RamLayout};

use crate::GuestError;
use crate::attach::{BlockPlace, Inode};

/// One block of memory as the lanes and the tracker see it.
pub(crate) struct MemoryPlace {
    pub(crate) layout: RamLayout,
    pub(crate) file: RamFile,
    pub(crate) block: BlockPlace,
}

impl MemoryPlace {
    /// `len` bytes in the descriptor `fd` of process `pid`; `whose` is "workload 'a'".
    pub(crate) fn open(
        pid: i32,
        fd: i32,
        len: ByteLen,
        block_name: &str,
        whose: &str,
        writable: bool,
    ) -> Result<MemoryPlace, GuestError> {
        let path = format!("/proc/{pid}/fd/{fd}");
        let what = format!("the memory of {whose} cannot be opened; run vmferry as the same user");
        let file =
            OpenOptions::new().read(true).write(writable).open(path).map_err(GuestError::refused(what))?;
        let inode = inode_of(&file, whose)?;
        let page_bytes = u32::try_from(PAGE_BYTES).unwrap_or(u32::MAX);
        let layout = RamLayout::new(vec![RamBlock { name: block_name.to_owned(), len, page_bytes }])?;
        let block = BlockPlace { inode, offset: 0, len: len.0, first_page: PageIndex(0) };
        Ok(MemoryPlace { layout, file: RamFile { file, offset: 0 }, block })
    }
}

fn inode_of(file: &File, whose: &str) -> Result<Inode, GuestError> {
    let what = format!("the memory of {whose} cannot be looked at");
    let found = file.metadata().map_err(GuestError::refused(what))?;
    let device = (rustix::fs::major(found.dev()), rustix::fs::minor(found.dev()));
    Ok(Inode { device, number: found.ino() })
}
