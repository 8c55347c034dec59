//! The guest's serial console: commands go in, one marked line comes back.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::de::DeserializeOwned;
use vmferry_workload::Report;

use crate::RigError;
use crate::answer::{ANSWER_PREFIX, GuestCpus, GuestGap, GuestStatus, NetStatus};

/// Lines of the kernel that are kept to explain a failure.
const KERNEL_LINES_KEPT_MAX: usize = 64;
/// How long a command may take: verifying a gigabyte under emulation takes seconds.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A guest's console.
#[derive(Debug)]
pub struct Console {
    stream: UnixStream,
    answers: Receiver<String>,
    kernel: Arc<Mutex<Vec<String>>>,
}

impl Console {
    /// Takes over a serial line.
    pub fn open(stream: UnixStream) -> Result<Self, RigError> {
        let reader = stream.try_clone().map_err(RigError::host("cannot share the console"))?;
        let (send, answers) = channel();
        let kernel = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&kernel);
        std::thread::spawn(move || {
            let mut reader = BufReader::new(reader);
            let mut bytes = Vec::new();
            while let Ok(1..) = reader.read_until(b'\n', &mut bytes) {
                let line = String::from_utf8_lossy(&bytes).trim().to_owned();
                bytes.clear();
                match line.split_once(ANSWER_PREFIX) {
                    Some((_, answer)) => drop(send.send(answer.to_owned())),
                    None => keep(&sink, line),
                }
            }
        });
        Ok(Self { stream, answers, kernel })
    }

    /// Sends a command line and waits for its answer.
    pub fn ask(&mut self, command: &str) -> Result<String, RigError> {
        while self.answers.try_recv().is_ok() {}
        let line = format!("{command}\n");
        self.stream.write_all(line.as_bytes()).map_err(RigError::host("the guest's console is closed"))?;
        let answer = self.answer(command, ANSWER_TIMEOUT)?;
        match answer.split_once(' ').unwrap_or((&answer, "")) {
            ("ok", rest) => Ok(rest.to_owned()),
            (_, rest) => Err(RigError::Guest(format!("the guest refused '{command}': {rest}"))),
        }
    }

    /// Waits until the init says that its workload runs.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<(), RigError> {
        while !self.answer("the booting guest", timeout)?.starts_with("ready") {}
        Ok(())
    }

    /// What the guest knows about itself.
    pub fn status(&mut self) -> Result<GuestStatus, RigError> {
        self.ask_json("status")
    }

    /// What the guest sent over its network, and what came back.
    pub fn net(&mut self) -> Result<NetStatus, RigError> {
        self.ask_json("net")
    }

    /// What each of its processors has done.
    pub fn cpus(&mut self) -> Result<GuestCpus, RigError> {
        self.ask_json("cpus")
    }

    /// Verifies every page of the workload now.
    pub fn verify(&mut self) -> Result<Report, RigError> {
        self.ask_json("verify")
    }

    /// The longest gap between two beats by the guest's own clock since the last time.
    pub fn gap(&mut self) -> Result<GuestGap, RigError> {
        self.ask_json("gap")
    }

    /// What the kernel said, newest last.
    #[must_use]
    pub fn kernel_lines(&self) -> Vec<String> {
        self.kernel.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn ask_json<T: DeserializeOwned>(&mut self, command: &str) -> Result<T, RigError> {
        let answer = self.ask(command)?;
        serde_json::from_str(&answer).map_err(|error| {
            RigError::Guest(format!("the guest's answer to '{command}' is no JSON: {error}"))
        })
    }

    fn answer(&self, what: &str, timeout: Duration) -> Result<String, RigError> {
        self.answers.recv_timeout(timeout).map_err(|error| match error {
            RecvTimeoutError::Timeout => {
                let what = format!("'{what}' on the console (kernel: {:?})", self.kernel_lines());
                RigError::Timeout { what, after_ms: timeout.as_millis() }
            }
            RecvTimeoutError::Disconnected => {
                RigError::Guest(format!("the VMM ended (kernel: {:?})", self.kernel_lines()))
            }
        })
    }
}

fn keep(sink: &Mutex<Vec<String>>, line: String) {
    let mut lines = sink.lock().unwrap_or_else(PoisonError::into_inner);
    if line.is_empty() {
        return;
    }
    if lines.len() == KERNEL_LINES_KEPT_MAX {
        lines.remove(0);
    }
    lines.push(line);
}
