//! What a passthrough device is to whoever moves it.
//!
//! Two implementations: [`crate::Passthrough`], the kernel's, and [`crate::FakeDevice`]. Both keep one contract, in
//! [`crate::contract`]. What must never happen: a device that answers "migratable" because nobody asked; the answer of
//! a device without migration is its reason.

use std::io;
use std::os::fd::OwnedFd;

use crate::VfioError;
use crate::state::{Features, MigState};

/// Whether a device can move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Migration {
    /// By the states of version 2.
    V2(Features),
    /// It cannot; the reason is a sentence that says what to do.
    NotMigratable(String),
}

/// What a stop right now would still have to move of a device's state, as the device sees it before it stops.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrecopyInfo {
    /// What must move before the stop pays off.
    pub initial_bytes: u64,
    /// What changed since it was read.
    pub dirty_bytes: u64,
}

/// A device that is passed through to a guest.
pub trait MigratableDevice: Send {
    /// The operator's name for it.
    fn name(&self) -> &str;

    /// Whether it can move.
    fn migration(&self) -> &Migration;

    /// Where it is: asked, never remembered.
    fn state(&self) -> Result<MigState, VfioError>;

    /// Asks it to go to `to`; the file through which its state is read or written comes when the state has a new one.
    /// A device that was pre-copying keeps its file through the stop. On failure the error says where it is.
    fn set_state(&mut self, to: MigState) -> Result<Option<Box<dyn DataFile>>, VfioError>;

    /// The only way out of ERROR: the device is RUNNING and as after power-on, and its data files are dead.
    fn reset(&mut self) -> Result<(), VfioError>;

    /// How many bytes a stop right now would move (`MIG_DATA_SIZE`).
    fn stop_copy_bytes(&self) -> Result<u64, VfioError>;
}

/// What a read of a device's state gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataRead {
    /// So many bytes, at least one.
    Bytes(usize),
    /// The device has nothing to give: a pause while it pre-copies (`ENOMSG`; mtty gives zero bytes instead), the end
    /// once it is stopped.
    Empty,
    /// It has more, but had not got it ready within [`READ_WAIT_MS`].
    NotYet,
}

/// The file through which a device's state leaves or arrives.
///
/// The kernel's is made non-blocking as it is born: vfio-ioctls 0.10 keeps it private, behind a mutex and blocking, so
/// that a `GET_PRECOPY_INFO` waits for a read and a read for the device. A read waits up to [`READ_WAIT_MS`] for a
/// device that has more but not now, so that its caller can look elsewhere.
pub trait DataFile: Send {
    /// Reads what is there.
    fn read(&mut self, into: &mut [u8]) -> io::Result<DataRead>;
    /// Writes all of it, for a device that is RESUMING.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// What is still to be read; only while the device pre-copies.
    fn precopy_info(&mut self) -> io::Result<PrecopyInfo>;
    /// The same file again, for another process; `None` where it is no kernel file.
    fn duplicate(&self) -> Option<io::Result<OwnedFd>>;
}

/// How long a read waits for a device, in milliseconds.
pub const READ_WAIT_MS: u16 = 200;

/// The pages that a device's log calls dirty, one bit a page, the first page's lowest.
pub type Bitmap = Vec<u64>;

/// A log of what devices wrote by DMA: the device's own, or the IOMMU driver's.
pub trait DmaLog: Send {
    /// Starts to log writes to these ranges.
    fn start(&mut self, ranges: &[crate::dma::IovaRange]) -> io::Result<()>;
    /// What was written in `range` since the last report, which it forgets.
    fn report(&mut self, range: crate::dma::IovaRange) -> io::Result<Bitmap>;
    /// Stops; a log that never started is stopped already.
    fn stop(&mut self) -> io::Result<()>;
}

impl DmaLog for Box<dyn DmaLog> {
    fn start(&mut self, ranges: &[crate::dma::IovaRange]) -> io::Result<()> {
        self.as_mut().start(ranges)
    }

    fn report(&mut self, range: crate::dma::IovaRange) -> io::Result<Bitmap> {
        self.as_mut().report(range)
    }

    fn stop(&mut self) -> io::Result<()> {
        self.as_mut().stop()
    }
}
