//! A QEMU that waits for a guest.
//!
//! `prepare` does what can be done while the source still runs: QEMU already listens on our socket when the state
//! comes. It is also told to `stop`, which in a QEMU that waits means: do not start by yourself, whatever the stream
//! says. What must never happen: a target that runs before `run`.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use vmferry_datapath::{Access, ByteLen, GuestRam};

use super::blocks::{self, FoundRam};
use super::devices;
use super::facts;
use super::failover::{Pairs, TargetFailover};
use super::migration::{self, Borrowed, Mark};
use super::qmp::{Qmp, QmpFailure};
use super::source::end;
use super::stream::{Preface, RelayFault, relay};
use crate::failover::DeviceOptions;
use crate::{Description, DeviceFacts, GuestError, TargetGuest};

/// The name under which QEMU keeps its end of the state socket.
const STATE_NAME: &str = "vmferry-state";

/// A QEMU started with `-incoming defer`.
pub struct QemuTarget {
    qmp: Qmp,
    description: Description,
    ram: Arc<GuestRam>,
    devices: Vec<DeviceFacts>,
    state: Option<UnixStream>,
    borrowed: Option<Borrowed>,
    runs_next: bool,
    failover: TargetFailover,
    settled: bool,
}

impl QemuTarget {
    /// Connects to a QEMU that was started with `-incoming defer`.
    ///
    /// `primaries` are this host's devices for the guest's standbys; they are plugged when the guest runs here.
    pub fn open(socket: &Path, primaries: &[DeviceOptions]) -> Result<QemuTarget, GuestError> {
        let mut qmp = Qmp::connect(socket)?;
        must_be_waiting(&mut qmp)?;
        let found = blocks::find(&mut qmp, true)?;
        let pairs = Pairs::find(&mut qmp)?;
        let failover = TargetFailover::new(primaries, &pairs)?;
        let description = facts::describe(&mut qmp, socket, &found, pairs.standbys(), &[])?;
        let devices = devices::passed_through(&mut qmp, &found.layout, &[])?;
        let FoundRam { layout, files, .. } = found;
        let ram = Arc::new(GuestRam::map(layout, files, Access::ReadWrite)?);
        Ok(QemuTarget {
            qmp,
            description,
            ram,
            devices,
            state: None,
            borrowed: None,
            runs_next: false,
            failover,
            settled: false,
        })
    }

    fn listen(&mut self) -> Result<(), GuestError> {
        let (ours, theirs) = UnixStream::pair().map_err(GuestError::refused("cannot make a socket pair"))?;
        ours.set_write_timeout(Some(migration::STATE_TIMEOUT))
            .map_err(GuestError::refused("cannot set a deadline"))?;
        let pending = self.qmp.send("getfd", json!({ "fdname": STATE_NAME }), Some(theirs.as_fd()))?;
        self.qmp.answer(pending)?;
        let uri = format!("fd:{STATE_NAME}");
        // With exit-on-error (QEMU 9.1) a refused state leaves QEMU there to say why.
        match self.qmp.execute("migrate-incoming", json!({ "uri": uri, "exit-on-error": false })) {
            Err(QmpFailure::Refused(_)) => {
                self.qmp.execute("migrate-incoming", json!({ "uri": uri }))?;
            }
            other => {
                other?;
            }
        }
        self.state = Some(ours);
        Ok(())
    }
}

impl TargetGuest for QemuTarget {
    fn description(&self) -> &Description {
        &self.description
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    fn devices(&self) -> &[DeviceFacts] {
        &self.devices
    }

    /// None: QEMU loads what it passes through from its own state.
    fn device_sinks(&mut self) -> Result<Vec<Box<dyn Write + Send>>, GuestError> {
        Ok(Vec::new())
    }

    fn prepare(&mut self) -> Result<(), GuestError> {
        self.borrowed = Some(migration::borrow(&mut self.qmp, Mark::WasRunning)?);
        self.qmp.execute("stop", Value::Null)?;
        self.listen()
    }

    fn load_state(&mut self, from: &mut dyn Read, _age: Duration) -> Result<ByteLen, GuestError> {
        const WHAT: &str =
            "load the device state (was it started with the same machine and devices as the source?)";
        let Some(mut state) = self.state.take() else {
            return Err(GuestError::Bug("state came before the target was prepared".into()));
        };
        let mut preface = [0; 8];
        from.read_exact(&mut preface).map_err(GuestError::Relay)?;
        let preface = Preface::from_bytes(preface).ok_or_else(|| {
            GuestError::misbehaved(
                "the device state does not begin as QEMU's does; send a QEMU guest to a QEMU target",
            )
        })?;
        self.qmp.forget_events();
        let relayed = match relay(from, &mut state) {
            Ok(relayed) => relayed,
            Err(RelayFault::Read(error)) => return Err(GuestError::Relay(error)),
            Err(RelayFault::Write(_)) => return Err(migration::why_failed(&mut self.qmp, WHAT)),
        };
        // A state that was cut short must not keep QEMU waiting for the rest.
        let _ = state.shutdown(Shutdown::Write);
        migration::wait_completed(&mut self.qmp, WHAT)?;
        let status = self.qmp.execute("query-status", Value::Null)?;
        if status["status"] != "paused" {
            return Err(GuestError::misbehaved(format!(
                "the target QEMU is {} instead of paused",
                status["status"]
            )));
        }
        self.runs_next = preface.was_running;
        Ok(ByteLen(relayed.0 + 8))
    }

    fn run(&mut self) -> Result<(), GuestError> {
        if !self.runs_next {
            return Ok(());
        }
        self.qmp.execute("cont", Value::Null)?;
        Ok(())
    }

    fn settle(&mut self) -> Result<(), GuestError> {
        let given_back = self.borrowed.take().map_or(Ok(()), |borrowed| borrowed.give_back(&mut self.qmp));
        if !std::mem::replace(&mut self.settled, true) {
            let notes = self.failover.finish(&mut self.qmp, self.runs_next);
            self.description.notes.extend(notes);
        }
        given_back
    }

    fn discard(&mut self) {
        self.state = None;
        if let Err(error) = end(&mut self.qmp) {
            tracing::warn!("the target QEMU could not be ended: {error}");
        }
    }
}

fn must_be_waiting(qmp: &mut Qmp) -> Result<(), GuestError> {
    const FIX: &str =
        "start a fresh QEMU with the source's options, its own memory file, and -incoming defer";
    let status = qmp.execute("query-status", Value::Null)?;
    let status = status["status"].as_str().unwrap_or("unknown").to_owned();
    if status != "inmigrate" {
        return Err(GuestError::mistake(format!(
            "the target QEMU does not wait for a guest, it is `{status}`; {FIX}"
        )));
    }
    match migration::status(qmp)?.as_str() {
        "none" => Ok(()),
        other => Err(GuestError::mistake(format!(
            "the target QEMU already receives from somebody (status `{other}`); {FIX}"
        ))),
    }
}
