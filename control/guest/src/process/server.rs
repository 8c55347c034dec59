//! The workload process: it owns the machine and answers on the control socket until it is told to quit.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::machine::Machine;
use super::state::state_bytes_max;
use super::wire::{Identity, Line, Reply, Request};
use super::{WorkloadArgs, socket_path};
use crate::GuestError;

/// Runs the embedded guest until it is told to quit, which a completed move does.
pub fn run(args: &WorkloadArgs) -> Result<(), GuestError> {
    if args.pages() == 0 {
        return Err(GuestError::mistake(format!(
            "--ram {} is less than a page: give at least 4KiB",
            args.ram
        )));
    }
    let socket = Socket::listen(&args.name)?;
    let machine = if args.incoming {
        Machine::waiting(args.pages())?
    } else {
        Machine::running(args.pages(), args.plans()?)?
    };
    let (quit, quitting) = channel();
    let machine = Arc::new(Mutex::new(machine));
    let listener =
        socket.listener.try_clone().map_err(GuestError::refused("the control socket cannot be shared"))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let client =
                Client { line: Line::new(stream), machine: Arc::clone(&machine), quit: quit.clone() };
            std::thread::spawn(move || client.serve());
        }
    });
    quitting.recv().map_err(|_| GuestError::misbehaved("the control socket broke: start the workload again"))
}

/// The socket; its file vanishes with it.
struct Socket {
    path: PathBuf,
    listener: UnixListener,
}

impl Socket {
    fn listen(name: &str) -> Result<Self, GuestError> {
        let path = socket_path(name)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        private_folder(folder)?;
        if UnixStream::connect(&path).is_ok() {
            return Err(GuestError::mistake(format!(
                "a workload '{name}' runs already: choose another --name"
            )));
        }
        let _ = fs::remove_file(&path);
        let what = format!("cannot listen on {}", path.display());
        let listener = UnixListener::bind(&path).map_err(GuestError::refused(what))?;
        Ok(Self { path, listener })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Whoever can reach the socket can read the memory: the folder must be the user's own.
fn private_folder(folder: &Path) -> Result<(), GuestError> {
    let what = format!("cannot create {}", folder.display());
    match fs::DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            return Err(GuestError::refused(what)(error));
        }
        Ok(()) | Err(_) => {}
    }
    let found = fs::symlink_metadata(folder).map_err(GuestError::refused(what))?;
    if found.is_dir() && found.uid() == rustix::process::getuid().as_raw() && found.mode() & 0o022 == 0 {
        return Ok(());
    }
    let sentence =
        format!("{} is not a folder of yours alone: remove it, or set XDG_RUNTIME_DIR", folder.display());
    Err(GuestError::mistake(sentence))
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
    }
}
