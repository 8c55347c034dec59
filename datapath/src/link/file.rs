//! A link to a file: one way, for streams that are kept.
//!
//! ```text
//!   slot ─ write ─► file (locked by its writer) ─ read ─► arrived()
//! ```
//!
//! What was submitted is in the file when `submit` returns. A reader may follow a file that is still being written: the
//! writer holds a lock on it, which the kernel takes away also when the writer is killed, so the reader knows a file
//! that ends from one that goes on. Nothing travels back. What must never happen: the end of a file taken for the end of
//! a stream whose writer is still there.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::ring::errno_of;
use super::{Breaker, Link, LinkPlan, LinkTrouble};
use crate::error::LinkFault;

/// How often a reader looks whether the file grew.
const LOOK: Duration = Duration::from_millis(2);

/// Which way a file is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Out,
    In,
}

/// One end of a link through a file.
pub struct FileLink {
    file: File,
    way: Way,
    slots: Vec<Vec<u8>>,
    received: Vec<u8>,
    head: usize,
    tail: usize,
    severed: Arc<AtomicBool>,
}

impl FileLink {
    fn over(file: File, way: Way) -> FileLink {
        let severed = Arc::default();
        FileLink { file, way, slots: Vec::new(), received: Vec::new(), head: 0, tail: 0, severed }
    }

    /// The end that writes: a new file, which must not exist yet.
    pub fn create(path: &Path) -> std::io::Result<FileLink> {
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok(FileLink::over(file, Way::Out))
    }

    /// The end that reads.
    pub fn open(path: &Path) -> std::io::Result<FileLink> {
        Ok(FileLink::over(File::open(path)?, Way::In))
    }

    fn check(&self) -> Result<(), LinkTrouble> {
        if self.severed.load(Ordering::Acquire) {
            return Err(LinkTrouble::Lost(LinkFault::Closed));
        }
        Ok(())
    }

    /// Whether the writer is gone, by its lock.
    fn is_complete(&self) -> Result<bool, LinkTrouble> {
        match flock(&self.file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(false),
            Err(errno) => Err(LinkTrouble::Lost(LinkFault::Failed(errno))),
        }
    }

    /// Reads what is there and fits; how much that was.
    fn read(&mut self) -> Result<usize, LinkTrouble> {
        if self.head > 0 {
            self.received.copy_within(self.head..self.tail, 0);
            (self.head, self.tail) = (0, self.tail - self.head);
        }
        let got = self.file.read(&mut self.received[self.tail..]);
        let got = got.map_err(|error| LinkTrouble::Lost(LinkFault::Failed(errno_of(&error))))?;
        self.tail += got;
        Ok(got)
    }
}

impl Link for FileLink {
    fn prepare(&mut self, plan: LinkPlan) -> Result<(), LinkTrouble> {
        self.slots = vec![vec![0; plan.slot_bytes]; plan.send_slots];
        self.received = vec![0; plan.receive_bytes];
        Ok(())
    }

    fn breaker(&self) -> Result<Box<dyn Breaker>, LinkTrouble> {
        Ok(Box::new(FileBreaker(Arc::clone(&self.severed))))
    }

    fn free_slot(&self) -> Option<usize> {
        (self.way == Way::Out && !self.slots.is_empty()).then_some(0)
    }

    fn slot_mut(&mut self, slot: usize) -> &mut [u8] {
        self.slots.get_mut(slot).map_or(&mut [], Vec::as_mut_slice)
    }

    fn submit(&mut self, slot: usize, len: usize) -> Result<(), LinkTrouble> {
        self.check()?;
        let bytes = self.slots.get(slot).and_then(|slot| slot.get(..len)).unwrap_or_default();
        self.file.write_all(bytes).map_err(|error| LinkTrouble::Refused {
            service: "write the stream's file",
            fix: "make room on its file system",
            errno: errno_of(&error),
        })
    }

    fn unsent(&self) -> usize {
        0
    }

    fn arrived(&mut self) -> &mut [u8] {
        &mut self.received[self.head..self.tail]
    }

    fn consume(&mut self, len: usize) {
        self.head = self.tail.min(self.head + len);
    }

    fn expect_bytes(&mut self, _more: usize) {}

    fn progress(&mut self, wait: Duration) -> Result<bool, LinkTrouble> {
        self.check()?;
        if self.way == Way::Out {
            std::thread::sleep(wait.min(LOOK));
            return Ok(false);
        }
        // The lock is looked at first: what the writer wrote before it let go is then in the file.
        let complete = self.is_complete()?;
        let full = self.tail - self.head == self.received.len();
        if full || self.read()? > 0 {
            return Ok(!full);
        }
        if complete {
            return Err(LinkTrouble::Lost(LinkFault::Closed));
        }
        std::thread::sleep(wait.min(LOOK));
        Ok(false)
    }

    fn name(&self) -> &'static str {
        "file"
    }
}

struct FileBreaker(Arc<AtomicBool>);

impl Breaker for FileBreaker {
    fn sever(&self) {
        self.0.store(true, Ordering::Release);
    }
}
