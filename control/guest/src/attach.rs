//! Dirty tracking of a running process from outside.
//!
//! ```text
//!   every process that maps the RAM's inode, shared and writable
//!      │ ptrace one thread for under 1 ms: userfaultfd(), UFFDIO_API, UFFDIO_REGISTER per area
//!      │ pidfd_getfd takes the userfaultfd out, close() runs inside, registers and signal mask as before
//!      ▼
//!   we hold the only descriptor: when we die, the kernel lifts the protection
//! ```
//!
//! What must never happen: a thread left with our registers in it. Every path out of an injection, errors
//! included, restores and detaches; and the injection runs in a process of its own, so that a `kill -9` of vmferry
//! cannot fall into the middle of it.

mod halt;
mod helper;
mod inject;
mod kernel;
pub(crate) mod maps;
mod query;
mod refusal;
mod seccomp;
mod tracee;
mod writers;

use std::fs::{File, OpenOptions};
use std::thread::JoinHandle;

use vmferry_datapath::{
    CombinedLog, DepartingLog, DirtyLog, PageIndex, PageSet, PagemapLog, RamLayout, SoftDirtyLog, WatchedArea,
};

pub use kernel::{kernel_support, soft_dirty_support};

use crate::GuestError;
use halt::ThreadHalt;
use inject::InjectFault;
use writers::add_pages;
pub(crate) use writers::{Writer, process_name};

/// A file, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Inode {
    /// Major and minor number of its file system's device.
    pub device: (u32, u32),
    /// Its number there.
    pub number: u64,
}

/// The place of one RAM block: a piece of a file, and where it lies in the flat page space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockPlace {
    /// The file.
    pub inode: Inode,
    /// The block's first byte in the file.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
    /// Its first page in the flat page space.
    pub first_page: PageIndex,
}

/// Tracking as it was begun.
pub struct Tracked {
    /// The dirty pages of all tracked processes. Dropping it ends the tracking.
    pub log: Box<dyn DirtyLog>,
    /// Who writes, and what of it is not covered.
    pub watch: Watch,
}

/// Knows the writers of a guest's memory.
#[derive(Debug)]
pub struct Watch {
    blocks: Vec<BlockPlace>,
    looking: Option<JoinHandle<Result<Found, GuestError>>>,
    known: Vec<Writer>,
    pinned: PageSet,
    notes: Vec<String>,
}

impl Watch {
    /// Pages that no tracker covers.
    #[must_use]
    pub fn pinned(&self) -> &PageSet {
        &self.pinned
    }

    /// What an operator should know: fallbacks in use, writers that are not tracked.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Begins to look again while the caller does something else: the next [`Watch::new_writers`] takes what is found.
    /// Reading all mappings of a busy host takes milliseconds that a blackout does not have.
    pub fn look_ahead(&mut self) {
        let blocks = self.blocks.clone();
        self.looking = Some(std::thread::spawn(move || look_everywhere(&blocks)));
    }

    /// Looks again: the names of writers that appeared since. Their pages are pinned from now on.
    pub fn new_writers(&mut self) -> Result<Vec<String>, GuestError> {
        let ahead = self.looking.take().and_then(|looking| looking.join().ok());
        let (writers, _) = ahead.unwrap_or_else(|| look_everywhere(&self.blocks))?;
        let mut names = Vec::new();
        for now in writers {
            let known = self.known.iter_mut().find(|known| known.process == now.process);
            let news = known.as_ref().map_or_else(|| now.areas.clone(), |known| known.lacks(&now));
            if news.is_empty() {
                continue;
            }
            add_pages(&news, &mut self.pinned);
            names.push(now.name());
            match known {
                Some(known) => known.areas.extend(news),
                None => self.known.push(now),
            }
        }
        Ok(names)
    }
}

/// Tracks every process that maps `blocks` for writing; `vmm` must be among them and must be trackable. Another
/// process that cannot be tracked is noted and its pages are pinned.
pub fn track(vmm: i32, layout: &RamLayout, blocks: &[BlockPlace]) -> Result<Tracked, GuestError> {
    track_by(&Method::choose()?, vmm, layout, blocks, None)
}

/// [`track`] by soft-dirty bits, also where the kernel has better: on Linux 6.7 and newer only a test wants that.
pub fn track_by_soft_dirty(
    vmm: i32,
    layout: &RamLayout,
    blocks: &[BlockPlace],
) -> Result<Tracked, GuestError> {
    if !soft_dirty_support() {
        return Err(GuestError::mistake("this kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)"));
    }
    track_by(&Method::SoftDirty("they were asked for".into()), vmm, layout, blocks, None)
}

/// [`track`] for a VMM that tells by its `own` log what it and its guest write: only the others are tracked from outside.
pub fn track_beside(
    vmm: i32,
    layout: &RamLayout,
    blocks: &[BlockPlace],
    own: Box<dyn DirtyLog>,
) -> Result<Tracked, GuestError> {
    track_by(&Method::choose()?, vmm, layout, blocks, Some(own))
}

fn track_by(
    method: &Method,
    vmm: i32,
    layout: &RamLayout,
    blocks: &[BlockPlace],
    mut own: Option<Box<dyn DirtyLog>>,
) -> Result<Tracked, GuestError> {
    let (writers, hidden) = look_everywhere(blocks)?;
    if !writers.iter().any(|writer| writer.process == vmm) {
        return Err(GuestError::misbehaved(format!(
            "{} no longer maps the guest's memory for writing; it ended, or changed its memory",
            process_name(vmm)
        )));
    }
    let mut watch = Watch {
        blocks: blocks.to_vec(),
        looking: None,
        known: writers,
        pinned: PageSet::new(layout),
        notes: method.notes(),
    };
    if hidden > 0 {
        watch.notes.push(format!(
            "{hidden} processes of other users could not be looked at; run vmferry as root to be sure that none of \
             them writes the guest's memory"
        ));
    }
    let mut logs = Vec::new();
    for writer in &watch.known {
        let told = own.take_if(|_| writer.process == vmm);
        match told.map_or_else(|| method.track(writer), Ok) {
            Ok(log) if writer.process == vmm => logs.push(log),
            Ok(log) => {
                let mut pages = PageSet::new(layout);
                add_pages(&writer.areas, &mut pages);
                logs.push(Box::new(DepartingLog::new(log, pages)));
            }
            Err(InjectFault::Gone) if writer.process != vmm && !inject::is_there(writer.process) => {}
            Err(fault) if writer.process == vmm => return Err(refusal::explain(vmm, fault)),
            Err(fault) => {
                add_pages(&writer.areas, &mut watch.pinned);
                let why = refusal::explain(writer.process, fault);
                watch
                    .notes
                    .push(format!("pages that {} writes travel in the blackout: {why}", writer.name()));
            }
        }
    }
    let log: Box<dyn DirtyLog> = match logs.len() {
        1 => logs.remove(0),
        _ => Box::new(CombinedLog(logs)),
    };
    Ok(Tracked { log, watch })
}

/// All writers, and how many processes could not be looked at.
type Found = (Vec<Writer>, usize);

fn look_everywhere(blocks: &[BlockPlace]) -> Result<Found, GuestError> {
    Writer::look_everywhere(blocks)
        .map_err(GuestError::refused("cannot read /proc; mount it, without hidepid"))
}

/// How dirty pages are found, the same for all writers.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Method {
    /// Asynchronous write protection and `PAGEMAP_SCAN`.
    Scan,
    /// Soft-dirty bits, with the reason.
    SoftDirty(String),
}

impl Method {
    fn choose() -> Result<Method, GuestError> {
        match kernel_support() {
            Ok(_) => Ok(Method::Scan),
            Err(why) if soft_dirty_support() => Ok(Method::SoftDirty(why)),
            Err(why) => Err(GuestError::HostRefused {
                what: format!(
                    "{why}, and this kernel has no soft-dirty bits either (CONFIG_MEM_SOFT_DIRTY): nothing here can \
                     tell which pages a guest writes; boot Linux 6.7 or newer"
                ),
                source: std::io::ErrorKind::Unsupported.into(),
            }),
        }
    }

    fn notes(&self) -> Vec<String> {
        match self {
            Method::Scan => Vec::new(),
            Method::SoftDirty(why) => vec![format!(
                "dirty pages by soft-dirty bits, because {why}: the guest is held for about 10 ms a GiB in each round"
            )],
        }
    }

    fn track(&self, writer: &Writer) -> Result<Box<dyn DirtyLog>, InjectFault> {
        let pagemap = proc_file(writer.process, "pagemap", false)?;
        let areas: Vec<WatchedArea> = writer.areas.clone();
        Ok(match self {
            Method::Scan => {
                let descriptor = helper::inject_apart(writer.process, &writer.ranges())?;
                Box::new(PagemapLog::new(pagemap, descriptor, areas))
            }
            Method::SoftDirty(_) => {
                let clear_refs = proc_file(writer.process, "clear_refs", true)?;
                Box::new(SoftDirtyLog::new(
                    pagemap,
                    clear_refs,
                    areas,
                    Box::new(ThreadHalt::of(writer.process)),
                ))
            }
        })
    }
}

fn proc_file(process: i32, name: &str, writable: bool) -> Result<File, InjectFault> {
    let opened = OpenOptions::new().read(!writable).write(writable).open(format!("/proc/{process}/{name}"));
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => InjectFault::Gone,
        errno => InjectFault::NotPermitted(errno.unwrap_or(libc::EPERM)),
    })
}
