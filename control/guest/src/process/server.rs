//! The workload process: it owns the machine and answers on the control socket until it is told to quit.

use std::os::fd::AsRawFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmferry_datapath::limits::STATE_PIECE_BYTES;

use super::machine::Machine;
use super::state::state_bytes_max;
use super::wire::{Identity, Reply, Request};
use super::{WorkloadArgs, socket_path};
use crate::GuestError;
use crate::control::{Line, Socket};

/// Runs the embedded guest until it is told to quit, which a completed move does.
pub fn run(args: &WorkloadArgs) -> Result<(), GuestError> {
    if args.pages() == 0 {
        return Err(GuestError::mistake(format!(
            "--ram {} is less than a page: give at least 4KiB",
            args.ram
        )));
    }
    args.check_devices()?;
    let socket = Socket::listen(&socket_path(&args.name)?, &format!("a workload '{}'", args.name))?;
    let machine = if args.incoming {
        Machine::waiting(args.pages(), &args.device)?
    } else {
        Machine::running(args.pages(), args.plans()?, &args.device)?
    };
    let (quit, quitting) = channel();
    let machine = Arc::new(Mutex::new(machine));
    socket.serve(move |line| {
        Client { line, machine: Arc::clone(&machine), quit: quit.clone() }.serve();
    })?;
    quitting.recv().map_err(|_| GuestError::misbehaved("the control socket broke: start the workload again"))
}

struct Client {
    line: Line,
    machine: Arc<Mutex<Machine>>,
    quit: Sender<()>,
}

impl Client {
    fn serve(mut self) {
        while let Ok(Some(request)) = self.line.receive::<Request>() {
            if self.handle(&request).is_err() {
                return;
            }
        }
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handle(&mut self, request: &Request) -> std::io::Result<()> {
        let reply = match request {
            Request::Save => return self.save(),
            Request::Load { len } => return self.load(*len),
            Request::DeviceRead { name, max } => return self.read_device(name, *max),
            Request::DeviceWrite { name, len } => return self.write_device(name, *len),
            Request::DeviceOpen { name } => self.machine().devices().open(name),
            Request::DeviceRemaining { name } => self.machine().devices().remaining(name),
            Request::DeviceFinish { name } => self.machine().devices().finish(name),
            Request::Quit => Reply::Done,
            Request::Describe => Reply::Identity(identity(&self.machine())),
            Request::Pause => self.machine().pause(),
            Request::Resume => self.machine().resume(),
            Request::Run => self.machine().run_loaded(),
            Request::Discard => self.machine().discard(),
            Request::Throttle { percent } => self.machine().throttle(*percent),
            Request::Status => Reply::Status(self.machine().status()),
            Request::Verify => self.machine().verify(),
            Request::Set { key, value } => self.machine().set(key, value),
            Request::Stop => self.machine().stop(),
            Request::Start => self.machine().start(),
        };
        self.line.send(&reply)?;
        if *request == Request::Quit {
            let _ = self.quit.send(());
        }
        Ok(())
    }

    fn save(&mut self) -> std::io::Result<()> {
        let saved = self.machine().save();
        match saved {
            Err(refusal) => self.line.send(&refusal),
            Ok(bytes) => {
                self.line.send(&Reply::Bytes { len: bytes.len() as u64 })?;
                self.line.send_bytes(&bytes)
            }
        }
    }

    fn read_device(&mut self, name: &str, max: u64) -> std::io::Result<()> {
        let max = usize::try_from(max).unwrap_or(usize::MAX).min(STATE_PIECE_BYTES);
        let (reply, bytes) = self.machine().devices().read(name, max);
        self.line.send(&reply)?;
        self.line.send_bytes(&bytes)
    }

    fn write_device(&mut self, name: &str, len: u64) -> std::io::Result<()> {
        let bytes = self.line.receive_bytes(len, STATE_PIECE_BYTES as u64)?;
        let reply = self.machine().devices().write(name, &bytes);
        self.line.send(&reply)
    }

    fn load(&mut self, len: u64) -> std::io::Result<()> {
        let max = state_bytes_max(self.machine().pages());
        let bytes = self.line.receive_bytes(len, max)?;
        let reply = self.machine().load(&bytes);
        self.line.send(&reply)
    }
}

fn identity(machine: &Machine) -> Identity {
    Identity {
        pid: i32::try_from(std::process::id()).unwrap_or(0),
        memory_fd: machine.memory().as_raw_fd(),
        pages: machine.pages(),
        phase: machine.phase(),
        devices: machine.device_plans(),
    }
}
