//! A device's state on its way out of the source, and into the target.
//!
//! ```text
//!   RUNNING  PRE_COPY                    STOP_COPY            target: RESUMING            STOP, RUNNING
//!      ├────── Bytes, Idle, Bytes, Idle ──── Bytes … End ───► write … write ── finish ────────►
//!      │ begin                          │ stopped                             loaded, or refused
//! ```
//!
//! The end is known from the device being stopped, never from a read alone: while it pre-copies, "nothing" is a pause.
//! What must never happen: a state that was cut off taken for a whole one; [`StateSink::finish`] is the only way to
//! RUNNING, and it is the device that checks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::VfioError;
use crate::device::{DataFile, DataRead, MigratableDevice};
use crate::state::MigState;

/// What one read of a device's state gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// So many bytes, at least one.
    Bytes(usize),
    /// Nothing right now, more may come.
    Idle,
    /// All of it was read.
    End,
}

/// What a stop right now would still have to move.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Remaining {
    /// The device's estimate of what it gives once stopped (`MIG_DATA_SIZE`).
    pub stop_copy_bytes: u64,
    /// What pre-copy has not read yet.
    pub precopy_bytes: u64,
}

impl Remaining {
    /// What is expected: the larger one, as drivers count pre-copied state in either, both, or neither.
    #[must_use]
    pub fn expected(self) -> u64 {
        self.stop_copy_bytes.max(self.precopy_bytes)
    }

    /// What it can be at most.
    #[must_use]
    pub fn at_most(self) -> u64 {
        self.stop_copy_bytes.saturating_add(self.precopy_bytes)
    }
}

/// One device's state as it leaves the source. Read by one thread, while another stops the device.
pub struct StateStream {
    device: String,
    file: Box<dyn DataFile>,
    stopped: Arc<AtomicBool>,
}

/// Tells a [`StateStream`] that its device stopped.
#[derive(Clone, Debug)]
pub struct StopMark(Arc<AtomicBool>);

impl StopMark {
    /// The device is in STOP_COPY.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl StateStream {
    /// The state of a device that pre-copies; the mark is set when it stops.
    #[must_use]
    pub fn pre_copying(device: &str, file: Box<dyn DataFile>) -> (StateStream, StopMark) {
        let stopped = Arc::new(AtomicBool::new(false));
        let stream = StateStream { device: device.to_owned(), file, stopped: Arc::clone(&stopped) };
        (stream, StopMark(stopped))
    }

    /// The state of a device that is in STOP_COPY.
    #[must_use]
    pub fn stopped(device: &str, file: Box<dyn DataFile>) -> StateStream {
        StateStream { device: device.to_owned(), file, stopped: Arc::new(AtomicBool::new(true)) }
    }

    /// The operator's name for the device.
    #[must_use]
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The next bytes. Waits a fifth of a second at most.
    pub fn read(&mut self, into: &mut [u8]) -> Result<Chunk, VfioError> {
        // Looked at first: bytes that come with the stop are read before an end is believed.
        let stopped = self.stopped.load(Ordering::Acquire);
        let lost = |source| VfioError::DataLost { device: self.device.clone(), source };
        match self.file.read(into).map_err(lost)? {
            DataRead::Bytes(count) => Ok(Chunk::Bytes(count)),
            DataRead::Empty if stopped => Ok(Chunk::End),
            DataRead::Empty | DataRead::NotYet => Ok(Chunk::Idle),
        }
    }

    /// What pre-copy has not read yet; nothing is known of it once the device stopped.
    pub fn precopy_bytes(&mut self) -> Result<u64, VfioError> {
        if self.stopped.load(Ordering::Acquire) {
            return Ok(0);
        }
        let lost = |source| VfioError::DataLost { device: self.device.clone(), source };
        let info = self.file.precopy_info().map_err(lost)?;
        Ok(info.initial_bytes.saturating_add(info.dirty_bytes))
    }

    /// The rest, into memory: for devices whose state is small.
    pub fn read_to_end(&mut self) -> Result<Vec<u8>, VfioError> {
        let (mut state, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
        loop {
            match self.read(&mut buffer)? {
                Chunk::Bytes(count) => state.extend_from_slice(&buffer[..count]),
                Chunk::Idle => {}
                Chunk::End => return Ok(state),
            }
        }
    }
}

/// One device's state as it arrives at the target: the device is RESUMING as long as this lives.
pub struct StateSink<D: MigratableDevice> {
    device: D,
    file: Box<dyn DataFile>,
}

/// A device that was given a state and did not take it, and why. It was reset: it has no state, and can be asked again.
#[derive(Debug)]
pub struct Refused<D> {
    /// The device.
    pub device: D,
    /// What it said.
    pub error: VfioError,
}

/// A device that stands still with its state loaded.
#[derive(Debug)]
pub struct Loaded<D>(D);

impl<D: MigratableDevice> StateSink<D> {
    /// Makes a device ready to be written. It is reset first: whatever it held is not part of what comes.
    pub fn open(mut device: D) -> Result<StateSink<D>, Refused<D>> {
        let opened = device.reset().and_then(|()| device.set_state(MigState::Resuming));
        match opened {
            Ok(Some(file)) => Ok(StateSink { device, file }),
            Ok(None) => {
                let error = VfioError::Bug("a device that is RESUMING came without a file".into());
                Err(Refused { device, error })
            }
            Err(error) => Err(Refused { device, error }),
        }
    }

    /// The operator's name for the device.
    pub fn device(&self) -> &str {
        self.device.name()
    }

    /// Writes what came. A driver may refuse at once what it would not load.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), VfioError> {
        let device = self.device.name().to_owned();
        self.file.write_all(bytes).map_err(|source| VfioError::DataRefused { device, source })
    }

    /// All of it came: the device loads it and stands still, or refuses it and is reset.
    pub fn finish(self) -> Result<Loaded<D>, Refused<D>> {
        let StateSink { mut device, file } = self;
        let loaded = device.set_state(MigState::Stop);
        drop(file);
        match loaded {
            Ok(_) => Ok(Loaded(device)),
            Err(error) => Err(give_back(device, refused(error))),
        }
    }

    /// It will not come: the device is reset.
    pub fn abandon(self, why: VfioError) -> Refused<D> {
        give_back(self.device, why)
    }
}

impl<D: MigratableDevice> Loaded<D> {
    /// It will not run: the device is reset without having worked for a moment.
    pub fn abandon(self, why: VfioError) -> Refused<D> {
        give_back(self.0, why)
    }

    /// Lets the device work, before the vCPUs do. A device that does not start is reset.
    pub fn run(self) -> Result<D, Refused<D>> {
        let Loaded(mut device) = self;
        match device.set_state(MigState::Running) {
            Ok(_) => Ok(device),
            Err(error) => Err(give_back(device, error)),
        }
    }
}

/// The refusal to load is about the bytes, not about the arc.
fn refused(error: VfioError) -> VfioError {
    if let VfioError::StateRefused { device, source, .. } = error {
        return VfioError::DataRefused { device, source };
    }
    error
}

fn give_back<D: MigratableDevice>(mut device: D, error: VfioError) -> Refused<D> {
    match device.reset() {
        Ok(()) => Refused { device, error },
        Err(back) => {
            let error = VfioError::NotUndone { cause: Box::new(error), back: vec![back] };
            Refused { device, error }
        }
    }
}
