//! A passthrough device in memory: it keeps the contract of the kernel's, and fails where it is told to.
//!
//! For the simulated world and for tests of whoever moves devices, on machines without any. It never stands in for a
//! device that a guest has. A clone is the same device: one goes to the mover, the other looks on.
//!
//! ```
//! use vmferry_vfio::{Features, FakeDevice, MigState, MigratableDevice};
//! let looker_on = FakeDevice::new("eth1", Features { p2p: true, pre_copy: false });
//! let mut device = looker_on.clone();
//! looker_on.fail(MigState::Stop, MigState::Error);
//! assert!(device.set_state(MigState::StopCopy).is_err());
//! assert_eq!(looker_on.at(), MigState::Error);
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::VfioError;
use crate::device::{Bitmap, DataFile, DataRead, DmaLog, MigratableDevice, Migration, PrecopyInfo};
use crate::dma::{IovaRange, PAGE_BYTES};
use crate::error::Left;
use crate::state::{Features, MigState};

/// Opens every record of a fake's state.
const MAGIC: u32 = 0x6661_6b65;
const HEADER_BYTES: usize = 8;

/// A device in memory.
#[derive(Clone, Debug)]
pub struct FakeDevice {
    name: String,
    migration: Migration,
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug)]
struct Inner {
    at: MigState,
    memory: Vec<u8>,
    faults: BTreeMap<MigState, MigState>,
    reset_fails: bool,
    asked: Vec<MigState>,
    resets: u32,
    /// The file that is alive.
    file: u64,
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    /// What the last record held.
    recorded: Option<Vec<u8>>,
}

impl FakeDevice {
    /// A device that works and holds nothing.
    #[must_use]
    pub fn new(name: &str, features: Features) -> FakeDevice {
        FakeDevice::with(name, Migration::V2(features))
    }

    /// A device that cannot be moved.
    #[must_use]
    pub fn unmovable(name: &str, why: &str) -> FakeDevice {
        FakeDevice::with(name, Migration::NotMigratable(why.to_owned()))
    }

    fn with(name: &str, migration: Migration) -> FakeDevice {
        let inner = Inner {
            at: MigState::Running,
            memory: Vec::new(),
            faults: BTreeMap::new(),
            reset_fails: false,
            asked: Vec::new(),
            resets: 0,
            file: 0,
            outgoing: Vec::new(),
            incoming: Vec::new(),
            recorded: None,
        };
        FakeDevice { name: name.to_owned(), migration, inner: Arc::new(Mutex::new(inner)) }
    }

    /// The guest changes what the device holds.
    pub fn hold(&self, bytes: &[u8]) {
        self.inner().memory = bytes.to_vec();
    }

    /// What it holds.
    #[must_use]
    pub fn held(&self) -> Vec<u8> {
        self.inner().memory.clone()
    }

    /// Where it is.
    #[must_use]
    pub fn at(&self) -> MigState {
        self.inner().at
    }

    /// The next step into `to` fails, once, and leaves the device in `left`.
    pub fn fail(&self, to: MigState, left: MigState) {
        self.inner().faults.insert(to, left);
    }

    /// Resets fail from now on.
    pub fn fail_resets(&self) {
        self.inner().reset_fails = true;
    }

    /// Every state that it was asked for, in order.
    #[must_use]
    pub fn asked(&self) -> Vec<MigState> {
        self.inner().asked.clone()
    }

    /// How often it was reset.
    #[must_use]
    pub fn resets(&self) -> u32 {
        self.inner().resets
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn features(&self) -> Result<Features, VfioError> {
        match &self.migration {
            Migration::V2(features) => Ok(*features),
            Migration::NotMigratable(why) => {
                Err(VfioError::NotMigratable { device: self.name.clone(), why: why.clone() })
            }
        }
    }
}

impl MigratableDevice for FakeDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn migration(&self) -> &Migration {
        &self.migration
    }

    fn state(&self) -> Result<MigState, VfioError> {
        self.features().map(|_| self.at())
    }

    fn set_state(&mut self, to: MigState) -> Result<Option<Box<dyn DataFile>>, VfioError> {
        let features = self.features()?;
        let mut inner = self.inner();
        let from = inner.at;
        inner.asked.push(to);
        let outcome = inner.walk(features, to);
        let (left, generation) = (inner.at, inner.file);
        drop(inner);
        match outcome {
            Ok(()) if features.brings_file(from, to) => {
                Ok(Some(Box::new(FakeFile { device: self.clone(), generation })))
            }
            Ok(()) => Ok(None),
            Err(source) => Err(VfioError::StateRefused {
                device: self.name.clone(),
                from,
                to,
                left: Left::In(left),
                source,
            }),
        }
    }

    fn reset(&mut self) -> Result<(), VfioError> {
        let mut inner = self.inner();
        inner.resets += 1;
        if inner.reset_fails {
            let refused = VfioError::refused(format!("device `{}` cannot be reset", self.name));
            return Err(refused(io::Error::from_raw_os_error(libc::EIO)));
        }
        inner.at = MigState::Running;
        inner.memory.clear();
        inner.close();
        Ok(())
    }

    fn stop_copy_bytes(&self) -> Result<u64, VfioError> {
        self.features().map(|_| (self.inner().memory.len() + HEADER_BYTES) as u64)
    }
}

impl Inner {
    fn walk(&mut self, features: Features, to: MigState) -> io::Result<()> {
        let path = features.path(self.at, to).ok_or(io::Error::from_raw_os_error(libc::EINVAL))?;
        for next in path {
            if let Some(left) = self.faults.remove(&next) {
                self.leave_in(left);
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            self.step(next)?;
            self.at = next;
        }
        Ok(())
    }

    /// Where a failed step leaves it.
    fn leave_in(&mut self, left: MigState) {
        self.at = left;
        if !left.has_data() {
            self.close();
        }
    }

    fn step(&mut self, next: MigState) -> io::Result<()> {
        let pre_copied = matches!(self.at, MigState::PreCopy | MigState::PreCopyP2p);
        if self.at == MigState::Resuming {
            self.memory = load(&self.incoming).ok_or(io::Error::from_raw_os_error(libc::EINVAL))?;
        }
        match next {
            MigState::StopCopy if pre_copied => self.record(),
            MigState::PreCopy | MigState::PreCopyP2p if pre_copied => {}
            MigState::StopCopy | MigState::PreCopy | MigState::PreCopyP2p => {
                self.close();
                self.record();
            }
            MigState::Resuming
            | MigState::Error
            | MigState::Stop
            | MigState::Running
            | MigState::RunningP2p => self.close(),
        }
        Ok(())
    }

    fn close(&mut self) {
        self.file += 1;
        self.outgoing.clear();
        self.incoming.clear();
        self.recorded = None;
    }

    /// Puts what is held into the stream, when it is not the last thing there.
    fn record(&mut self) {
        if self.recorded.as_ref() == Some(&self.memory) {
            return;
        }
        let len = u32::try_from(self.memory.len()).unwrap_or(u32::MAX);
        self.outgoing.extend_from_slice(&MAGIC.to_le_bytes());
        self.outgoing.extend_from_slice(&len.to_le_bytes());
        self.outgoing.extend_from_slice(&self.memory);
        self.recorded = Some(self.memory.clone());
    }
}

/// The last record of whole ones; `None` when there is none, or more than records.
fn load(mut stream: &[u8]) -> Option<Vec<u8>> {
    let mut last = None;
    while !stream.is_empty() {
        let (head, rest) = stream.split_at_checked(HEADER_BYTES)?;
        let (magic, len) = head.split_at(4);
        let len = usize::try_from(u32::from_le_bytes(len.try_into().ok()?)).ok()?;
        let (body, rest) = rest.split_at_checked(len)?;
        last = (magic == MAGIC.to_le_bytes()).then(|| body.to_vec());
        last.as_ref()?;
        stream = rest;
    }
    last
}

struct FakeFile {
    device: FakeDevice,
    generation: u64,
}

impl FakeFile {
    /// The device, while this file is its live one; as a driver's file that was disabled says ENODEV.
    fn live(&self) -> io::Result<MutexGuard<'_, Inner>> {
        let inner = self.device.inner();
        if inner.file == self.generation {
            Ok(inner)
        } else {
            Err(io::Error::from_raw_os_error(libc::ENODEV))
        }
    }
}

impl DataFile for FakeFile {
    fn read(&mut self, into: &mut [u8]) -> io::Result<DataRead> {
        let mut inner = self.live()?;
        if matches!(inner.at, MigState::PreCopy | MigState::PreCopyP2p) && inner.outgoing.is_empty() {
            inner.record();
        }
        let count = into.len().min(inner.outgoing.len());
        let bytes: Vec<u8> = inner.outgoing.drain(..count).collect();
        into[..count].copy_from_slice(&bytes);
        Ok(if count > 0 { DataRead::Bytes(count) } else { DataRead::Empty })
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut inner = self.live()?;
        if inner.at != MigState::Resuming {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        inner.incoming.extend_from_slice(bytes);
        let wrong = inner.incoming.iter().zip(MAGIC.to_le_bytes()).any(|(byte, magic)| *byte != magic);
        if wrong { Err(io::Error::from_raw_os_error(libc::EFAULT)) } else { Ok(()) }
    }

    fn precopy_info(&mut self) -> io::Result<PrecopyInfo> {
        let inner = self.live()?;
        if !matches!(inner.at, MigState::PreCopy | MigState::PreCopyP2p) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let is_newer = inner.recorded.as_ref() != Some(&inner.memory);
        let dirty_bytes = if is_newer { (inner.memory.len() + HEADER_BYTES) as u64 } else { 0 };
        Ok(PrecopyInfo { initial_bytes: inner.outgoing.len() as u64, dirty_bytes })
    }

    fn duplicate(&self) -> Option<io::Result<OwnedFd>> {
        None
    }
}

/// A log of DMA in memory. A clone is the same log.
#[derive(Clone, Debug, Default)]
pub struct FakeLog(Arc<Mutex<LogInner>>);

#[derive(Debug, Default)]
struct LogInner {
    is_on: bool,
    written: BTreeSet<u64>,
    start_fails: bool,
    reports_until_failure: Option<u32>,
    is_short: bool,
    everything: bool,
}

impl FakeLog {
    /// A device writes to the page of `iova`.
    pub fn write(&self, iova: u64) {
        self.inner().written.insert(iova / PAGE_BYTES);
    }

    /// It will not start.
    pub fn fail_start(&self) {
        self.inner().start_fails = true;
    }

    /// After `good` more reports, one fails.
    pub fn fail_report(&self, good: u32) {
        self.inner().reports_until_failure = Some(good);
    }

    /// Reports are too short from now on.
    pub fn shorten_reports(&self) {
        self.inner().is_short = true;
    }

    /// It knows nothing but what is mapped.
    pub fn call_everything_dirty(&self) {
        self.inner().everything = true;
    }

    /// Whether it logs.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.inner().is_on
    }

    fn inner(&self) -> MutexGuard<'_, LogInner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DmaLog for FakeLog {
    fn start(&mut self, _ranges: &[IovaRange]) -> io::Result<()> {
        let mut inner = self.inner();
        if inner.start_fails {
            return Err(io::Error::from_raw_os_error(libc::ENOTTY));
        }
        inner.is_on = true;
        inner.written.clear();
        Ok(())
    }

    fn report(&mut self, range: IovaRange) -> io::Result<Bitmap> {
        let mut inner = self.inner();
        match inner.reports_until_failure {
            Some(0) => {
                inner.reports_until_failure = None;
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            Some(left) => inner.reports_until_failure = Some(left - 1),
            None => {}
        }
        if inner.is_short {
            return Ok(Vec::new());
        }
        let words = usize::try_from(range.pages().div_ceil(64)).map_err(io::Error::other)?;
        let mut bitmap = vec![if inner.everything { u64::MAX } else { 0 }; words];
        let (first, last) = (range.iova / PAGE_BYTES, range.end().div_ceil(PAGE_BYTES));
        let told: Vec<u64> = inner.written.range(first..last).copied().collect();
        for page in told {
            inner.written.remove(&page);
            let bit = page - first;
            if let Some(word) = usize::try_from(bit / 64).ok().and_then(|at| bitmap.get_mut(at)) {
                *word |= 1 << (bit % 64);
            }
        }
        Ok(bitmap)
    }

    fn stop(&mut self) -> io::Result<()> {
        self.inner().is_on = false;
        Ok(())
    }
}
