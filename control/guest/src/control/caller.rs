//! The asking end of a control socket.

use std::fmt::Debug;
use std::io::ErrorKind;
use std::marker::PhantomData;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Line;
use crate::GuestError;

/// Verifying or saving some gigabytes takes seconds; who is silent for longer has hung.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// What every control socket may answer.
pub(crate) trait Answer: DeserializeOwned + Debug {
    /// Whether it says that an order was carried out.
    fn is_done(&self) -> bool;
    /// The reason, when it is a refusal.
    fn refusal(&self) -> Option<&str>;
}

/// Asks a process that answers with `A`.
#[derive(Debug)]
pub(crate) struct Caller<A> {
    /// "the workload 'a'"
    who: String,
    line: Line,
    answer: PhantomData<A>,
}

impl<A: Answer> Caller<A> {
    /// Finds `what` of this name at `path`; `start` is the command that would have started it.
    pub(crate) fn connect(path: &Path, what: &str, name: &str, start: &str) -> Result<Self, GuestError> {
        let stream = UnixStream::connect(path).map_err(|error| {
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) {
                return GuestError::mistake(format!(
                    "no {what} '{name}' runs here: start one with '{start}'"
                ));
            }
            let sentence =
                format!("the control socket of {what} '{name}' cannot be reached; run as its user");
            GuestError::refused(sentence)(error)
        })?;
        let timeout = stream.set_read_timeout(Some(ANSWER_TIMEOUT));
        timeout.map_err(GuestError::refused("the socket takes no timeout"))?;
        Ok(Self { who: format!("the {what} '{name}'"), line: Line::new(stream), answer: PhantomData })
    }

    /// Asks, and takes the answer as it is.
    pub(crate) fn ask(&mut self, request: &impl Serialize) -> Result<A, GuestError> {
        self.line.send(request).map_err(|error| {
            // Nobody has the other end: not a byte of the request was taken.
            if error.kind() == ErrorKind::BrokenPipe {
                return GuestError::Ended(format!("{} has ended", self.who));
            }
            self.lost("it takes no command", &error)
        })?;
        self.reply()
    }

    /// Asks for something to be done.
    pub(crate) fn order(&mut self, request: &impl Serialize) -> Result<(), GuestError> {
        let reply = self.ask(request)?;
        if reply.is_done() { Ok(()) } else { Err(self.unexpected(&reply)) }
    }

    /// The same, with raw bytes behind the request.
    pub(crate) fn order_with(&mut self, request: &impl Serialize, bytes: &[u8]) -> Result<(), GuestError> {
        let sent = self.line.send(request).and_then(|()| self.line.send_bytes(bytes));
        sent.map_err(|error| self.lost("it takes no state", &error))?;
        let reply = self.reply()?;
        if reply.is_done() { Ok(()) } else { Err(self.unexpected(&reply)) }
    }

    /// Raw bytes that an answer announced.
    pub(crate) fn bytes(&mut self, len: u64, max: u64) -> Result<Vec<u8>, GuestError> {
        let bytes = self.line.receive_bytes(len, max);
        bytes.map_err(|error| self.lost("what it announced did not come", &error))
    }

    /// An answer that is none to what was asked.
    pub(crate) fn unexpected(&self, reply: &A) -> GuestError {
        let who = &self.who;
        match reply.refusal() {
            Some(why) => GuestError::misbehaved(format!("{who} refused: {why}")),
            None => GuestError::misbehaved(format!("{who} answered beside the point: {reply:?}")),
        }
    }

    fn reply(&mut self) -> Result<A, GuestError> {
        match self.line.receive() {
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(GuestError::misbehaved(format!("{} has ended", self.who))),
            Err(error) => Err(self.lost("it does not answer", &error)),
        }
    }

    fn lost(&self, what: &str, error: &std::io::Error) -> GuestError {
        GuestError::misbehaved(format!("{} is lost: {what} ({error})", self.who))
    }
}
