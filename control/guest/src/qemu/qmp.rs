//! One QMP connection: commands with ids, events kept in order, descriptors passed along.
//!
//! QEMU serves one client per QMP socket and lets a second one wait without a word, so the greeting has a deadline
//! and a sentence of its own. What must never happen: an answer taken for another command's; every command carries
//! an id, and an answer with a foreign id ends the connection.

use std::collections::VecDeque;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, sockopt::PeerCredentials};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::{Value, json};

use crate::GuestError;
use crate::clock::Deadline;

/// QEMU greets at once, or is serving somebody else.
const GREETING_TIMEOUT: Duration = Duration::from_secs(3);
/// No command that we send runs longer than this in a healthy QEMU (`stop` waits for the guest's disks).
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The longest line of a sane QEMU; `query-pci` of a large guest stays far below it.
const LINE_BYTES_MAX: usize = 8 << 20;
/// Events nobody asked for are dropped from the oldest on.
const EVENTS_MAX: usize = 256;

/// A connection to QEMU's monitor.
#[derive(Debug)]
pub(crate) struct Qmp {
    stream: UnixStream,
    name: String,
    unread: Vec<u8>,
    events: VecDeque<Value>,
    last_id: u64,
}

/// A command that was sent and not yet answered.
#[derive(Debug)]
#[must_use = "its answer must be read"]
pub(crate) struct Pending {
    id: u64,
    command: &'static str,
}

/// QEMU's answer to a command it did not carry out.
#[derive(Debug)]
pub(crate) enum QmpFailure {
    /// QEMU answered with an error.
    Refused(String),
    /// There was no answer.
    Lost(GuestError),
}

impl From<QmpFailure> for GuestError {
    fn from(failure: QmpFailure) -> GuestError {
        match failure {
            QmpFailure::Refused(sentence) => GuestError::GuestMisbehaved(sentence),
            QmpFailure::Lost(error) => error,
        }
    }
}

impl Qmp {
    /// Connects, and waits for the greeting.
    pub(crate) fn connect(path: &Path) -> Result<Qmp, GuestError> {
        let name = path.display().to_string();
        let stream = dial(path).map_err(|error| connect_refused(&name, error))?;
        let mut qmp = Qmp { stream, name, unread: Vec::new(), events: VecDeque::new(), last_id: 0 };
        let greeting = qmp.read_message(Deadline::after(GREETING_TIMEOUT)).map_err(|error| {
            if matches!(error, GuestError::GuestMisbehaved(_)) { busy(&qmp.name) } else { error }
        })?;
        if greeting.get("QMP").is_none() {
            return Err(GuestError::mistake(format!(
                "{} is no QMP socket: it answered {greeting}",
                qmp.name
            )));
        }
        qmp.execute("qmp_capabilities", Value::Null)?;
        Ok(qmp)
    }

    /// Ends this connection and makes another one. QEMU serves one client: it must see the end of the old one first.
    pub(crate) fn redial(&mut self, path: &Path) -> Result<(), GuestError> {
        // It may be down already.
        let _ = self.stream.shutdown(Shutdown::Both);
        *self = Qmp::connect(path)?;
        Ok(())
    }

    /// The process at the other end, as the kernel knows it; 0 when it lives in another PID namespace.
    pub(crate) fn peer(&self) -> i32 {
        nix::sys::socket::getsockopt(&self.stream, PeerCredentials).map_or(0, |credentials| credentials.pid())
    }

    /// Runs a command and waits for its answer.
    pub(crate) fn execute(&mut self, command: &'static str, arguments: Value) -> Result<Value, QmpFailure> {
        let pending = self.send(command, arguments, None)?;
        self.answer(pending)
    }

    /// Sends a command without waiting, with a descriptor when one is given.
    pub(crate) fn send(
        &mut self,
        command: &'static str,
        arguments: Value,
        descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<Pending, QmpFailure> {
        self.last_id += 1;
        let id = self.last_id;
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let mut line = message.to_string();
        line.push('\n');
        let rights: Vec<RawFd> = descriptor.iter().map(AsRawFd::as_raw_fd).collect();
        let mut sent = 0;
        if !rights.is_empty() {
            let control = [ControlMessage::ScmRights(&rights)];
            let bytes = [IoSlice::new(line.as_bytes())];
            sent = sendmsg::<()>(self.stream.as_raw_fd(), &bytes, &control, MsgFlags::MSG_NOSIGNAL, None)
                .map_err(|errno| QmpFailure::Lost(self.lost(command, &errno.into())))?;
        }
        self.stream
            .write_all(&line.as_bytes()[sent..])
            .map_err(|error| QmpFailure::Lost(self.lost(command, &error)))?;
        Ok(Pending { id, command })
    }

    /// Waits for the answer to a command.
    #[expect(clippy::needless_pass_by_value, reason = "an answer can be had once")]
    pub(crate) fn answer(&mut self, pending: Pending) -> Result<Value, QmpFailure> {
        let deadline = Deadline::after(ANSWER_TIMEOUT);
        loop {
            let mut message = self.read_message(deadline).map_err(QmpFailure::Lost)?;
            if message.get("event").is_some() {
                self.keep_event(message);
                continue;
            }
            if message.get("id").and_then(Value::as_u64) != Some(pending.id) {
                return Err(QmpFailure::Lost(GuestError::misbehaved(format!(
                    "QEMU at {} answered another command than `{}`: {message}; restart the move",
                    self.name, pending.command
                ))));
            }
            if let Some(error) = message.get("error") {
                let words = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given");
                return Err(QmpFailure::Refused(format!("QEMU refused `{}`: {words}", pending.command)));
            }
            return Ok(message.get_mut("return").map(Value::take).unwrap_or_default());
        }
    }

    /// Runs a command of the human monitor.
    pub(crate) fn human(&mut self, line: &str) -> Result<String, QmpFailure> {
        let answer = self.execute("human-monitor-command", json!({ "command-line": line }))?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Forgets the events that came so far.
    pub(crate) fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Waits for an event named `name` whose data `wanted` turns into an answer.
    pub(crate) fn wait_event<T>(
        &mut self,
        name: &str,
        timeout: Duration,
        mut wanted: impl FnMut(&Value) -> Option<T>,
    ) -> Result<T, GuestError> {
        let deadline = Deadline::after(timeout);
        loop {
            if let Some(answer) = self.find_event(name, &mut wanted) {
                return Ok(answer);
            }
            let message = self.read_message(deadline)?;
            self.keep_event(message);
        }
    }

    /// The oldest event that is kept, or the next one that comes within `wait`; none when none does.
    pub(crate) fn next_event(&mut self, wait: Duration) -> Result<Option<Value>, GuestError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        if !self.unread.contains(&b'\n') && !self.is_readable(wait)? {
            return Ok(None);
        }
        self.read_message(Deadline::after(ANSWER_TIMEOUT)).map(Some)
    }

    fn is_readable(&self, wait: Duration) -> Result<bool, GuestError> {
        let timeout = PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, timeout) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(self.lost("poll", &errno.into())),
        }
    }

    /// Looks through the kept events; those up to the one that is wanted are forgotten.
    fn find_event<T>(&mut self, name: &str, wanted: &mut impl FnMut(&Value) -> Option<T>) -> Option<T> {
        while let Some(event) = self.events.pop_front() {
            let found = if event["event"] == name { wanted(&event["data"]) } else { None };
            if found.is_some() {
                return found;
            }
        }
        None
    }

    fn keep_event(&mut self, event: Value) {
        if self.events.len() == EVENTS_MAX {
            self.events.pop_front();
        }
        self.events.push_back(event);
    }

    fn read_message(&mut self, deadline: Deadline) -> Result<Value, GuestError> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.unread[searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=searched + end).collect();
                return serde_json::from_slice(&line).map_err(|error| self.no_json(&error));
            }
            searched = self.unread.len();
            if searched > LINE_BYTES_MAX {
                return Err(GuestError::misbehaved(format!("QEMU at {} sent an endless line", self.name)));
            }
            self.fill(deadline)?;
        }
    }

    fn fill(&mut self, deadline: Deadline) -> Result<(), GuestError> {
        let silent = || {
            GuestError::misbehaved(format!(
                "QEMU at {} gives no answer; look whether its process hangs (a disk or network that stalls)",
                self.name
            ))
        };
        let left = deadline.left().ok_or_else(silent)?;
        self.stream.set_read_timeout(Some(left)).map_err(|error| self.lost("read", &error))?;
        let mut bytes = [0; 16 << 10];
        match self.stream.read(&mut bytes) {
            Ok(0) => Err(GuestError::misbehaved(format!(
                "QEMU at {} closed its monitor: the VMM ended, or its socket was reopened",
                self.name
            ))),
            Ok(count) => {
                self.unread.extend_from_slice(&bytes[..count]);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Err(silent())
            }
            Err(error) => Err(self.lost("read", &error)),
        }
    }

    fn no_json(&self, error: &serde_json::Error) -> GuestError {
        GuestError::misbehaved(format!("QEMU at {} sent no JSON: {error}; check the socket", self.name))
    }

    fn lost(&self, what: &str, error: &std::io::Error) -> GuestError {
        GuestError::misbehaved(format!(
            "the monitor of QEMU at {} failed at `{what}`: {error}; look whether the VMM still runs",
            self.name
        ))
    }
}

/// Connects with a deadline: behind a client and one more in the queue, a plain `connect` would wait for ever.
fn dial(path: &Path) -> std::io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(GREETING_TIMEOUT))?;
    connect(&socket, &address)?;
    set_socket_timeout(&socket, Timeout::Send, Some(ANSWER_TIMEOUT))?;
    Ok(UnixStream::from(socket))
}

fn busy(name: &str) -> GuestError {
    GuestError::mistake(format!(
        "QEMU does not greet on {name}: another client (libvirt, a script) holds this QMP socket, and QEMU serves \
         one at a time; give QEMU a second one with `-qmp unix:/PATH/vmferry.qmp,server=on,wait=off`"
    ))
}

fn connect_refused(name: &str, error: std::io::Error) -> GuestError {
    let kind = error.kind();
    if kind == ErrorKind::NotFound {
        return GuestError::mistake(format!(
            "there is no socket {name}; start QEMU with `-qmp unix:{name},server=on,wait=off`, or name its QMP socket"
        ));
    }
    if kind == ErrorKind::ConnectionRefused {
        return GuestError::mistake(format!(
            "nobody listens on {name}: its QEMU has ended; start the guest, or name the QMP socket of one that runs"
        ));
    }
    if kind == ErrorKind::WouldBlock {
        return busy(name);
    }
    GuestError::HostRefused {
        what: format!("cannot connect to {name}; run vmferry as root or as the user of the VMM"),
        source: error,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    /// Greets, and answers each line by `answer`, until the client hangs up.
    fn serve(listener: &UnixListener, answer: &mut dyn FnMut(&Value) -> Vec<Value>) {
        let (mut stream, _) = listener.accept().unwrap();
        writeln!(stream, "{}", json!({ "QMP": {} })).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap()).lines();
        for line in lines.map_while(Result::ok) {
            let command: Value = serde_json::from_str(&line).unwrap();
            let answers = match command["execute"].as_str() {
                Some("qmp_capabilities") => vec![json!({ "return": {}, "id": command["id"] })],
                _ => answer(&command),
            };
            answers.iter().for_each(|answer| writeln!(stream, "{answer}").unwrap());
        }
    }

    /// A monitor and a connection to it.
    fn monitor(mut answer: impl FnMut(&Value) -> Vec<Value> + Send + 'static) -> (tempfile::TempDir, Qmp) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        thread::spawn(move || serve(&listener, &mut answer));
        let qmp = Qmp::connect(&path).unwrap();
        (folder, qmp)
    }

    #[test]
    fn events_between_command_and_answer_are_kept() {
        let (_folder, mut qmp) = monitor(|command| {
            vec![
                json!({ "event": "STOP" }),
                json!({ "event": "MIGRATION", "data": { "status": "active" } }),
                json!({ "event": "MIGRATION", "data": { "status": "completed" } }),
                json!({ "return": 7, "id": command["id"] }),
            ]
        });
        assert_eq!(qmp.execute("stop", Value::Null).unwrap(), 7);
        let end = qmp.wait_event("MIGRATION", Duration::from_secs(1), |data| {
            (data["status"] == "completed").then(|| data["status"].clone())
        });
        assert_eq!(end.unwrap(), "completed");
    }

    #[test]
    fn a_foreign_id_ends_the_connection() {
        let (_folder, mut qmp) = monitor(|_| vec![json!({ "return": {}, "id": 4711 })]);
        assert!(matches!(qmp.execute("cont", Value::Null), Err(QmpFailure::Lost(_))));
    }

    #[test]
    fn a_connection_that_went_wrong_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        // Serves one client after the other, as QEMU does; the first one gets wrong answers.
        thread::spawn(move || {
            serve(&listener, &mut |_| vec![json!({ "return": {}, "id": 4711 })]);
            serve(&listener, &mut |command| vec![json!({ "return": {}, "id": command["id"] })]);
        });
        let mut qmp = Qmp::connect(&path).unwrap();
        assert!(qmp.execute("cont", Value::Null).is_err());
        qmp.redial(&path).unwrap();
        qmp.execute("cont", Value::Null).unwrap();
    }

    #[test]
    fn an_error_carries_qemus_words() {
        let (_folder, mut qmp) = monitor(|command| {
            vec![json!({ "error": { "class": "GenericError", "desc": "no" }, "id": command["id"] })]
        });
        let Err(QmpFailure::Refused(sentence)) = qmp.execute("cont", Value::Null) else {
            panic!("not refused")
        };
        assert_eq!(sentence, "QEMU refused `cont`: no");
    }

    #[test]
    fn a_socket_that_is_held_by_another_client_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("qmp");
        let _listener = UnixListener::bind(&path).unwrap();
        let sentence = Qmp::connect(&path).unwrap_err().to_string();
        assert!(sentence.contains("another client") && sentence.contains("-qmp unix:"), "{sentence}");
    }

    #[test]
    fn a_socket_without_a_vmm_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let sentence = Qmp::connect(&folder.path().join("qmp")).unwrap_err().to_string();
        assert!(sentence.contains("there is no socket"), "{sentence}");
    }
}
