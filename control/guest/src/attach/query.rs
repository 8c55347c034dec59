//! Shared writable mappings of a process by `PROCMAP_QUERY` (Linux 6.11): the kernel picks them out.
//!
//! The look for new writers happens inside the blackout, at every process of the host. As text that is thousands of
//! lines of libraries and heaps; by this call it is one question per process, mostly answered "none".
#![expect(unsafe_code, reason = "PROCMAP_QUERY has no safe wrapper")]

use std::ffi::c_void;
use std::fs::File;

use linux_raw_sys::general::procmap_query;
use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

use super::Inode;
use super::maps::Mapping;

/// Writable, shared, next from an address, of a file (`enum procmap_query_flags` of <linux/fs.h>).
const WRITABLE_SHARED_FILES: u64 = 0x02 | 0x08 | 0x10 | 0x20;

/// The shared writable file mappings behind an open `/proc/PID/maps`; nothing where the kernel does not know the call.
pub(crate) fn shared_writable(maps: &File) -> Option<Vec<Mapping>> {
    let mut found = Vec::new();
    let mut from = 0;
    loop {
        match query(maps, from) {
            Ok(answer) => {
                from = answer.vma_end;
                found.push(mapping(&answer));
            }
            // No further one, or no memory at all (a kernel thread, a process that has just ended).
            Err(Errno::NOENT | Errno::SRCH) => return Some(found),
            Err(_) => return None,
        }
    }
}

fn mapping(answer: &procmap_query) -> Mapping {
    Mapping {
        start: answer.vma_start,
        end: answer.vma_end,
        writable: true,
        shared: true,
        offset: answer.vma_offset,
        inode: Inode { device: (answer.dev_major, answer.dev_minor), number: answer.inode },
        path: String::new(),
    }
}

fn query(maps: &File, from: u64) -> Result<procmap_query, Errno> {
    let question = procmap_query {
        size: size_of::<procmap_query>() as u64,
        query_flags: WRITABLE_SHARED_FILES,
        query_addr: from,
        vma_start: 0,
        vma_end: 0,
        vma_flags: 0,
        vma_page_size: 0,
        vma_offset: 0,
        inode: 0,
        dev_major: 0,
        dev_minor: 0,
        vma_name_size: 0,
        build_id_size: 0,
        vma_name_addr: 0,
        build_id_addr: 0,
    };
    // SAFETY: the question has its own size in it and names no other buffer.
    unsafe { ioctl(maps, Query(question)) }
}

struct Query(procmap_query);

// SAFETY: PROCMAP_QUERY is _IOWR('f', 17, struct procmap_query); the pointer given is to exactly that struct.
unsafe impl Ioctl for Query {
    type Output = procmap_query;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        opcode::read_write::<procmap_query>(b'f', 17)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, answer: *mut c_void) -> rustix::io::Result<procmap_query> {
        // SAFETY: rustix hands back the pointer from `as_ptr`.
        Ok(unsafe { answer.cast::<procmap_query>().read() })
    }
}
