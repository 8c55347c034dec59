//! The micro-VM process: it owns the machine and answers on the control socket until its guest ends or it is told to quit.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmferry_datapath::{ByteLen, PageSet, TrackError};
use vmferry_kvm::GuestEnd;
use vmferry_vfio::{Chunk, VfioError};

use super::devices::Devices;
use super::microvm::{HeldLog, MicroVm, SAVED_BYTES_MAX, now};
use super::wire::{Reply, Request};
use super::{DEVICE_CHUNK_MAX, MicroVmArgs, socket_path};
use crate::control::{Line, Socket};
use crate::{GuestError, StateEstimate};

/// How soon the end of a guest ends the process.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Runs a micro-VM until its guest ends, or until it is told to quit, which a completed move does.
pub fn run(args: &MicroVmArgs) -> Result<(), GuestError> {
    let socket = Socket::listen(&socket_path(&args.name)?, &format!("a micro-VM '{}'", args.name))?;
    let vm = Arc::new(Mutex::new(MicroVm::start(args)?));
    let (quit, quitting) = channel();
    let shared = Arc::clone(&vm);
    socket.serve(move |line| {
        let devices = Arc::clone(lock(&shared).devices());
        let vm = Arc::clone(&shared);
        Client { line, vm, devices, log: None, pre_copies: false, loaded: false, quit: quit.clone() }.serve();
    })?;
    loop {
        match quitting.recv_timeout(LOOK_EVERY) {
            Ok(()) => return Ok(()),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(GuestError::misbehaved("the control socket broke: start the micro-VM again"));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        match lock(&vm).end() {
            None => {}
            Some(GuestEnd::Reset) => return Ok(()),
            Some(GuestEnd::Crashed(why)) => {
                return Err(GuestError::misbehaved(format!("the guest crashed: {why}")));
            }
        }
    }
}

fn lock(vm: &Mutex<MicroVm>) -> MutexGuard<'_, MicroVm> {
    vm.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection, and the log that it asked for.
struct Client {
    line: Line,
    vm: Arc<Mutex<MicroVm>>,
    /// Beside the machine's lock: a state leaves while the machine is brought to rest.
    devices: Arc<Devices>,
    log: Option<HeldLog>,
    /// Whether devices pre-copy for this connection.
    pre_copies: bool,
    /// Whether this connection brought a guest in.
    loaded: bool,
    quit: Sender<()>,
}

impl Drop for Client {
    /// A sender that died leaves its guest's devices as they were. One that is at rest waits for the guardian. A receiver
    /// that died before Commit leaves a guest that can never run here: this micro-VM waits for the next.
    fn drop(&mut self) {
        if self.pre_copies {
            self.devices.end_pre_copy();
        }
        if self.loaded {
            self.vm().discard_loaded();
        }
    }
}

impl Client {
    fn serve(mut self) {
        while let Ok(Some(request)) = self.line.receive::<Request>() {
            if self.handle(&request).is_err() {
                return;
            }
        }
    }

    fn vm(&self) -> MutexGuard<'_, MicroVm> {
        lock(&self.vm)
    }

    fn handle(&mut self, request: &Request) -> std::io::Result<()> {
        let reply = match request {
            Request::Save => {
                let saved = self.vm().save();
                return self.give(saved);
            }
            Request::Harvest => {
                let harvest = self.harvest(HeldLog::collect);
                return self.give(harvest);
            }
            Request::Pinned => {
                let pinned = self.harvest(|log, set| {
                    log.pin(set);
                    Ok(())
                });
                return self.give(pinned);
            }
            Request::ReadDevice { device, max } => return self.read_device(*device, *max),
            Request::WriteDevice { device, len } => return self.write_device(*device, *len),
            Request::Load { len, age_us } => return self.load(*len, Duration::from_micros(*age_us)),
            Request::PreCopy => self.pre_copy(),
            Request::EndPreCopy => {
                self.devices.end_pre_copy();
                Reply::Done
            }
            Request::Remaining { device } => remaining(&self.devices, *device),
            Request::ExpectDevice { device } => answer(self.devices.expect(*device)),
            Request::FinishDevice { device } => answer(self.devices.finish(*device)),
            Request::Quit => Reply::Done,
            Request::Attach => self.attach(),
            Request::Describe => Reply::Identity(self.vm().identity()),
            Request::Pause => self.vm().pause(),
            Request::Resume => self.vm().resume(),
            Request::Run => self.vm().run_loaded(),
            Request::Discard => self.vm().discard(),
            Request::Status => Reply::Status(self.vm().status()),
            Request::Stop => self.vm().stop(),
            Request::Start => self.vm().start_again(),
        };
        self.line.send(&reply)?;
        if *request == Request::Quit {
            let _ = self.quit.send(());
        }
        Ok(())
    }

    fn attach(&mut self) -> Reply {
        // An older log of this connection ends first.
        self.log = None;
        let tracked = self.vm().track();
        match tracked {
            Ok(log) => {
                self.log = Some(log);
                Reply::Done
            }
            Err(refusal) => refusal,
        }
    }

    fn pre_copy(&mut self) -> Reply {
        let begun = self.devices.pre_copy();
        self.pre_copies = begun.is_ok();
        answer(begun)
    }

    fn read_device(&mut self, device: usize, max: u64) -> std::io::Result<()> {
        let len = usize::try_from(max.min(DEVICE_CHUNK_MAX)).unwrap_or(0);
        let mut bytes = vec![0; len];
        let reply = match self.devices.read(device, &mut bytes) {
            Ok(Chunk::Bytes(count)) => {
                self.line.send(&Reply::Bytes { len: count as u64 })?;
                return self.line.send_bytes(&bytes[..count]);
            }
            Ok(Chunk::Idle) => Reply::Idle,
            Ok(Chunk::End) => Reply::End,
            Err(error) => Reply::Refused(error.to_string()),
        };
        self.line.send(&reply)
    }

    fn write_device(&mut self, device: usize, len: u64) -> std::io::Result<()> {
        let bytes = self.line.receive_bytes(len, DEVICE_CHUNK_MAX)?;
        let reply = answer(self.devices.write(device, &bytes));
        self.line.send(&reply)
    }

    /// Without the machine's lock: a harvest and a pause may go on side by side.
    fn harvest(
        &mut self,
        read: impl FnOnce(&mut HeldLog, &mut PageSet) -> Result<(), TrackError>,
    ) -> Result<Vec<u8>, Reply> {
        let layout = self.vm().memory().layout().clone();
        let Some(held) = &mut self.log else {
            return Err(Reply::Refused("this connection tracks nothing: attach first".to_owned()));
        };
        let mut set = PageSet::new(&layout);
        read(held, &mut set).map_err(|error| Reply::Refused(error.to_string()))?;
        Ok(set.words().iter().flat_map(|word| word.to_le_bytes()).collect())
    }

    fn give(&mut self, bytes: Result<Vec<u8>, Reply>) -> std::io::Result<()> {
        match bytes {
            Err(refusal) => self.line.send(&refusal),
            Ok(bytes) => {
                self.line.send(&Reply::Bytes { len: bytes.len() as u64 })?;
                self.line.send_bytes(&bytes)
            }
        }
    }

    fn load(&mut self, len: u64, age: Duration) -> std::io::Result<()> {
        let saved_at = now().saturating_sub(age);
        let bytes = self.line.receive_bytes(len, SAVED_BYTES_MAX)?;
        let reply = self.vm().load(&bytes, saved_at);
        self.loaded = reply == Reply::Done;
        self.line.send(&reply)
    }
}

fn answer(done: Result<(), VfioError>) -> Reply {
    done.map_or_else(|error| Reply::Refused(error.to_string()), |()| Reply::Done)
}

fn remaining(devices: &Devices, device: usize) -> Reply {
    match devices.remaining(device) {
        Ok(remaining) => Reply::Remaining(StateEstimate {
            expected: ByteLen(remaining.expected()),
            at_most: ByteLen(remaining.at_most()),
        }),
        Err(error) => Reply::Refused(error.to_string()),
    }
}
