//! The states of passed-through devices on their way out: a pump for each, beside everything that the lanes carry.
//!
//! ```text
//!   round 1 ─► start ─► pre-copy while rounds run ─► pause ─► drain, beside the last pages ─► every stream ended
//!                 └──────────────┴───────────────────────┴─► dropped: the guest is about to run on here
//! ```
//!
//! What must never happen: a pump that still reads a device while its guest is resumed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmferry_datapath::limits::STATE_PIECE_BYTES;
use vmferry_datapath::{ByteLen, Sender, StateFeed};
use vmferry_guest::{DeviceFacts, DeviceMigration, DeviceStream, GuestError, SourceGuest, StateRead};
use vmferry_session::{DeviceDrain, DeviceReport};

use super::hands::Stopped;

/// How long a pump sleeps when its device has nothing.
const IDLE: Duration = Duration::from_millis(2);
/// Between two looks at what a device has left, while it has bytes.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long a round waits for devices that still pre-copy: rounds of an idle guest would be over in no time.
const SETTLE_MAX: Duration = Duration::from_millis(200);
/// Between two looks of whoever waits for the pumps.
const WAIT_STEP: Duration = Duration::from_micros(200);
/// After the pause, a device that gives no byte for so long never will.
const STALL_MAX: Duration = Duration::from_secs(30);

/// The pumps of all devices that have a stream; none before round 1.
#[derive(Default)]
pub(super) struct DevicePumps {
    pumps: Vec<Pump>,
    words: Arc<Words>,
}

/// What the pumps are told.
#[derive(Default)]
struct Words {
    stop: AtomicBool,
    paused: AtomicBool,
}

struct Pump {
    name: String,
    gauge: Arc<Gauge>,
    thread: Option<JoinHandle<()>>,
}

/// What a pump tells.
#[derive(Default)]
struct Gauge {
    expected: AtomicU64,
    at_most: AtomicU64,
    pre_copied: AtomicU64,
    in_blackout: AtomicU64,
    idles: AtomicU64,
    ended: AtomicBool,
    failure: Mutex<Option<Stopped>>,
}

impl DevicePumps {
    /// Starts to pre-copy every device that has a stream.
    pub(super) fn start(guest: &mut dyn SourceGuest, sender: &Sender) -> Result<Self, Stopped> {
        let mut all = Self::default();
        if !guest.devices().iter().any(DeviceFacts::has_stream) {
            return Ok(all);
        }
        let mut streams = guest.device_streams()?;
        let expected = guest.devices().iter().filter(|device| device.has_stream()).count();
        if streams.len() != expected {
            return Err(
                GuestError::Bug(format!("{} device streams came, not {expected}", streams.len())).into()
            );
        }
        // Both hosts number the streams by name: their adapters may list devices in different orders.
        streams.sort_by(|one, other| one.name().cmp(other.name()));
        for (number, stream) in (1_u16..).zip(streams) {
            let feed = sender.device_feed(number)?;
            all.pumps.push(Pump::start(stream, feed, &all.words)?);
        }
        Ok(all)
    }

    /// Waits a little while devices still pre-copy. `Ok(false)` when `go_on` said no.
    pub(super) fn settle(&self, go_on: &mut dyn FnMut() -> bool) -> Result<bool, Stopped> {
        let before: Vec<u64> =
            self.pumps.iter().map(|pump| pump.gauge.idles.load(Ordering::Acquire)).collect();
        let began = clock();
        let settled = |(pump, before): (&Pump, &u64)| pump.gauge.idles.load(Ordering::Acquire) > *before;
        while began.elapsed() < SETTLE_MAX && !self.pumps.iter().zip(&before).all(settled) {
            self.failure()?;
            if !go_on() {
                return Ok(false);
            }
            std::thread::sleep(WAIT_STEP);
        }
        self.failure().map(|()| true)
    }

    /// The guest is about to be paused: what leaves from now on leaves in the blackout.
    pub(super) fn pausing(&self) {
        self.words.paused.store(true, Ordering::Release);
        self.pumps.iter().for_each(Pump::wake);
    }

    /// After the pause: returns when every stream has ended.
    pub(super) fn drain(&self, go_on: &mut dyn FnMut() -> bool) -> Result<Vec<DeviceDrain>, Stopped> {
        let sent =
            || self.pumps.iter().map(|pump| pump.gauge.in_blackout.load(Ordering::Relaxed)).sum::<u64>();
        let (mut moved, mut moved_at) = (sent(), clock());
        while let Some(pump) = self.pumps.iter().find(|pump| !pump.gauge.ended.load(Ordering::Acquire)) {
            self.failure()?;
            if !go_on() {
                return Err(Stopped::Interrupted);
            }
            if sent() != moved {
                (moved, moved_at) = (sent(), clock());
            }
            if moved_at.elapsed() > STALL_MAX {
                return Err(Stopped::Guest(GuestError::GuestMisbehaved(format!(
                    "device `{}` gave no byte of its state for {} s after the guest was paused",
                    pump.name,
                    STALL_MAX.as_secs()
                ))));
            }
            std::thread::sleep(WAIT_STEP);
        }
        self.failure()?;
        Ok(self.drained())
    }

    /// What left so far, in the order of the streams.
    pub(super) fn drained(&self) -> Vec<DeviceDrain> {
        let bytes = |count: &AtomicU64| ByteLen(count.load(Ordering::Relaxed));
        let drain = |pump: &Pump| DeviceDrain {
            name: pump.name.clone(),
            pre_copied: bytes(&pump.gauge.pre_copied),
            in_blackout: bytes(&pump.gauge.in_blackout),
        };
        self.pumps.iter().map(drain).collect()
    }

    /// What every device would add to the blackout now, those without a stream too.
    pub(super) fn reports(&self, devices: &[DeviceFacts]) -> Vec<DeviceReport> {
        let mut reports: Vec<DeviceReport> = devices.iter().map(|device| self.report(device)).collect();
        reports.sort_by(|one, other| one.name.cmp(&other.name));
        reports
    }

    fn report(&self, device: &DeviceFacts) -> DeviceReport {
        let pump = self.pumps.iter().find(|pump| pump.name == device.name);
        let bytes = |of: fn(&Gauge) -> &AtomicU64| {
            pump.map_or(ByteLen(0), |pump| ByteLen(of(&pump.gauge).load(Ordering::Relaxed)))
        };
        DeviceReport {
            name: device.name.clone(),
            pre_copies: matches!(device.migration, DeviceMigration::PreCopy { .. }),
            expected: bytes(|gauge| &gauge.expected),
            at_most: bytes(|gauge| &gauge.at_most),
            pinned: device.pinned,
            has_stream: device.has_stream(),
        }
    }

    /// Ends every pump, finished or not: its device is not read after this.
    pub(super) fn stop(&mut self) {
        self.words.stop.store(true, Ordering::Release);
        self.pumps.iter().for_each(Pump::wake);
        for pump in &mut self.pumps {
            pump.thread.take().map(JoinHandle::join);
        }
    }

    fn failure(&self) -> Result<(), Stopped> {
        let failed = |pump: &Pump| pump.gauge.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(stopped) = self.pumps.iter().find_map(failed) {
            return Err(stopped);
        }
        let vanished = |pump: &&Pump| {
            pump.thread.as_ref().is_some_and(JoinHandle::is_finished)
                && !pump.gauge.ended.load(Ordering::Acquire)
        };
        let bug =
            |pump: &Pump| GuestError::Bug(format!("the pump of device `{}` ended without a word", pump.name));
        self.pumps.iter().find(vanished).map_or(Ok(()), |pump| Err(bug(pump).into()))
    }
}

impl Drop for DevicePumps {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Pump {
    fn start(
        mut stream: Box<dyn DeviceStream>,
        mut feed: StateFeed,
        words: &Arc<Words>,
    ) -> Result<Self, Stopped> {
        let gauge = Arc::new(Gauge::default());
        gauge.look(stream.as_mut())?;
        let name = stream.name().to_owned();
        let (told, words) = (Arc::clone(&gauge), Arc::clone(words));
        let work = move || match pump(stream.as_mut(), &mut feed, &told, &words) {
            Ok(()) => told.ended.store(true, Ordering::Release),
            Err(stopped) => {
                *told.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(stopped);
            }
        };
        let thread = std::thread::Builder::new().name(format!("device {name}")).spawn(work);
        let thread = thread.map_err(|source| GuestError::HostRefused {
            what: "no thread could be started for a device's state; raise the limit of processes (ulimit -u)"
                .into(),
            source,
        })?;
        Ok(Self { name, gauge, thread: Some(thread) })
    }

    fn wake(&self) {
        self.thread.iter().for_each(|thread| thread.thread().unpark());
    }
}

impl Gauge {
    fn look(&self, stream: &mut dyn DeviceStream) -> Result<(), GuestError> {
        let left = stream.remaining()?;
        self.expected.store(left.expected.0, Ordering::Relaxed);
        self.at_most.store(left.at_most.0.max(left.expected.0), Ordering::Relaxed);
        Ok(())
    }
}

/// Brings one device's state to its lane, until its end.
fn pump(
    stream: &mut dyn DeviceStream,
    feed: &mut StateFeed,
    gauge: &Gauge,
    words: &Words,
) -> Result<(), Stopped> {
    let mut piece = vec![0; STATE_PIECE_BYTES];
    let mut looked = clock();
    let stop = || words.stop.load(Ordering::Acquire);
    while !stop() {
        let paused = words.paused.load(Ordering::Acquire);
        match stream.read(&mut piece)? {
            StateRead::Bytes(count) => {
                let bytes = piece.get(..count).ok_or_else(|| too_much(stream.name()))?;
                if !feed.send(bytes, &mut || !stop())? {
                    return Err(Stopped::Interrupted);
                }
                let counter = if paused { &gauge.in_blackout } else { &gauge.pre_copied };
                counter.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                if !paused && looked.elapsed() > LOOK_EVERY {
                    gauge.look(stream)?;
                    looked = clock();
                }
            }
            StateRead::Idle => {
                gauge.look(stream)?;
                gauge.idles.fetch_add(1, Ordering::Release);
                std::thread::park_timeout(IDLE);
            }
            StateRead::End if !words.paused.load(Ordering::Acquire) => {
                return Err(Stopped::Guest(GuestError::GuestMisbehaved(format!(
                    "device `{}` ended its state while the guest still runs",
                    stream.name()
                ))));
            }
            StateRead::End => return Ok(feed.end()?),
        }
    }
    Err(Stopped::Interrupted)
}

fn too_much(name: &str) -> Stopped {
    Stopped::Guest(GuestError::Bug(format!("device `{name}` gave more bytes than it was asked for")))
}

#[expect(clippy::disallowed_methods, reason = "a driver measures what its hands do")]
fn clock() -> Instant {
    Instant::now()
}
