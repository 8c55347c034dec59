//! The states of passed-through devices on their way in: a loader for each, all at the same time.
//!
//! ```text
//!   StateStream ─► sink.write, as it arrives, while the source still runs ─► end of the stream ─► sink.flush: loaded
//! ```
//!
//! What must never happen: Ready while a device has refused its state. A refusal is told to the machine at once, by the
//! device's name, and ends the move before Commit.

use std::io::{self, Read, Write};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use vmferry_datapath::StateStream;
use vmferry_datapath::limits::STATE_PIECE_BYTES;
use vmferry_guest::{DeviceFacts, TargetGuest};
use vmferry_session::{DeviceTimes, SessionError, TargetEvent};

use crate::blame;
use crate::report::DeviceLine;

/// Between two looks of whoever waits for the loaders.
const WAIT_STEP: Duration = Duration::from_micros(200);
/// How long a loader that is in its device may take to come back when the move is over.
const LEAVE_MAX: Duration = Duration::from_secs(2);

/// The loaders of all devices that have a stream.
#[derive(Default)]
pub(super) struct DeviceLoaders {
    loaders: Vec<Loader>,
}

struct Loader {
    name: String,
    outcome: Arc<OnceLock<Outcome>>,
    thread: JoinHandle<()>,
}

/// How a device's state came in, or why it did not.
type Outcome = Result<LoadedDevice, SessionError>;

/// A device that has its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LoadedDevice {
    pub(super) name: String,
    pub(super) bytes: u64,
    /// From the last byte until it had loaded it.
    pub(super) load: Duration,
}

/// How many streams a guest's devices have.
pub(super) fn stream_count(guest: &dyn TargetGuest) -> usize {
    guest.devices().iter().filter(|device| device.has_stream()).count()
}

impl DeviceLoaders {
    /// Starts to feed every device; `streams` are those behind the VMM's own, in order.
    pub(super) fn start(
        guest: &mut dyn TargetGuest,
        streams: Vec<StateStream>,
        post: &Sender<TargetEvent>,
    ) -> Result<Self, SessionError> {
        let mut all = Self::default();
        if streams.is_empty() {
            return Ok(all);
        }
        let sinks = guest.device_sinks().map_err(|e| blame::guest_error(&e))?;
        let names = guest.devices().iter().filter(|device| device.has_stream());
        let mut named: Vec<(String, _)> =
            names.map(|device: &DeviceFacts| device.name.clone()).zip(sinks).collect();
        if named.len() != streams.len() {
            return Err(SessionError::Bug(format!("{} devices take {} states", named.len(), streams.len())));
        }
        named.sort_by(|one, other| one.0.cmp(&other.0));
        for ((name, sink), stream) in named.into_iter().zip(streams) {
            all.loaders.push(Loader::start(name, sink, stream, post.clone())?);
        }
        Ok(all)
    }

    /// Waits until every device has its state. `go_on` is asked every now and then.
    pub(super) fn finish(&self, go_on: &mut dyn FnMut() -> bool) -> Result<Vec<LoadedDevice>, SessionError> {
        while !self.loaders.iter().all(|loader| loader.outcome.get().is_some()) {
            if !go_on() {
                return Err(SessionError::Cancelled);
            }
            std::thread::sleep(WAIT_STEP);
        }
        self.loaders.iter().filter_map(|loader| loader.outcome.get().cloned()).collect()
    }

    /// The move is over and the lanes are closed: no loader may be in its device while the guest is torn down.
    pub(super) fn leave(&mut self) {
        let began = clock();
        for loader in self.loaders.drain(..) {
            while !loader.thread.is_finished() && began.elapsed() < LEAVE_MAX {
                std::thread::sleep(WAIT_STEP);
            }
            if loader.thread.is_finished() {
                // A loader that panicked has told the panic hook.
                let _ = loader.thread.join();
            } else {
                tracing::warn!("device `{}` does not come back from its state", loader.name);
            }
        }
    }
}

impl Loader {
    fn start(
        name: String,
        mut sink: Box<dyn Write + Send>,
        mut stream: StateStream,
        post: Sender<TargetEvent>,
    ) -> Result<Self, SessionError> {
        let outcome = Arc::new(OnceLock::new());
        let (tell, device) = (Arc::clone(&outcome), name.clone());
        let work = move || {
            let loaded = load(&device, sink.as_mut(), &mut stream);
            // Nothing more is read: a lane must not wait at a full pipe while the refusal is on its way.
            drop(stream);
            let refused = match &loaded {
                Err(error @ SessionError::HostRefused(_)) => Some(error.clone()),
                Ok(_) | Err(_) => None,
            };
            let _ = tell.set(loaded);
            if let Some(error) = refused {
                let _ = post.send(TargetEvent::LanesFailed(error));
            }
        };
        let thread = std::thread::Builder::new().name(format!("device {name}")).spawn(work);
        let thread =
            thread.map_err(|e| SessionError::HostRefused(format!("no thread for a device's state: {e}")))?;
        Ok(Self { name, outcome, thread })
    }
}

/// Feeds one device, from the first byte of its state to its word that it has loaded it.
fn load(name: &str, sink: &mut dyn Write, stream: &mut StateStream) -> Outcome {
    let refused = |error: io::Error| {
        let why = error.to_string();
        SessionError::HostRefused(format!("device `{name}` refused its state: {}", why.trim_end_matches('.')))
    };
    let mut piece = vec![0; STATE_PIECE_BYTES];
    let mut bytes = 0;
    loop {
        let count = match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) => {
                return Err(SessionError::LinkLost(format!(
                    "the state of device `{name}` did not arrive: {error}"
                )));
            }
        };
        sink.write_all(piece.get(..count).unwrap_or_default()).map_err(refused)?;
        bytes += count as u64;
    }
    let began = clock();
    sink.flush().map_err(refused)?;
    Ok(LoadedDevice { name: name.to_owned(), bytes, load: began.elapsed() })
}

/// For this side's report.
pub(super) fn lines(devices: &[DeviceFacts], loaded: &[LoadedDevice]) -> Vec<DeviceLine> {
    let line = |device: &DeviceFacts| {
        let loaded = loaded.iter().find(|loaded| loaded.name == device.name);
        DeviceLine {
            name: device.name.clone(),
            what: device.what.clone(),
            received_bytes: loaded.map(|loaded| loaded.bytes),
            load_ms: loaded.map(|loaded| loaded.load.as_secs_f64() * 1e3),
            ..DeviceLine::default()
        }
    };
    devices.iter().map(line).collect()
}

/// For the source's report and its next prediction; `after` is how long the devices took longer than the VMM.
pub(super) fn times(after: Duration, loaded: &[LoadedDevice]) -> DeviceTimes {
    if loaded.is_empty() {
        return DeviceTimes::default();
    }
    let micros = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
    let load_us: Vec<u32> = loaded.iter().map(|device| micros(device.load)).collect();
    DeviceTimes::new(u64::from(micros(after)), &load_us)
}

#[expect(clippy::disallowed_methods, reason = "a driver measures what its devices do")]
fn clock() -> Instant {
    Instant::now()
}
