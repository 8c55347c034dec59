//! A QEMU guest that runs here.
//!
//! ```text
//!   open ─► attach ─► pause ─► save_state ─► (Commit) ─► retire
//!                       └──────────┴─► resume: stream closed, migrate_cancel, cont
//! ```
//!
//! What can be done while the guest runs is done in `attach`: capabilities, parameters, and the socket that QEMU
//! will write its state to is already inside of it.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use vmferry_datapath::{Access, ByteLen, DirtyLog, GuestRam, PageSet};

use super::blocks::{self, FoundRam};
use super::devices;
use super::facts;
use super::failover::{Pairs, SourceFailover, bring_back};
use super::migration::{self, Borrowed, Mark};
use super::qmp::{Qmp, QmpFailure};
use super::stream::{Preface, RelayFault, relay};
use crate::attach::{self, BlockPlace, Watch};
use crate::failover::{FailoverOptions, Primary};
use crate::throttle::Throttle;
use crate::{Description, DeviceFacts, DeviceStream, GuestError, SourceGuest};

/// The name under which QEMU keeps its end of the state socket.
const STATE_NAME: &str = "vmferry-state";

/// A running QEMU guest.
pub struct QemuSource {
    socket: PathBuf,
    qmp: Qmp,
    description: Description,
    ram: Arc<GuestRam>,
    places: Vec<BlockPlace>,
    vmm: i32,
    direct_io_nodes: Vec<String>,
    devices: Vec<DeviceFacts>,
    was_running: bool,
    watch: Option<Watch>,
    borrowed: Option<Borrowed>,
    state: Option<UnixStream>,
    throttle: Throttle,
    failover: SourceFailover,
}

impl QemuSource {
    /// Connects to QEMU and looks at the guest, without touching it.
    pub fn open(socket: &Path, failover: FailoverOptions) -> Result<QemuSource, GuestError> {
        let mut qmp = Qmp::connect(socket)?;
        let was_running = must_be_movable(&mut qmp)?;
        let failover = SourceFailover::new(failover);
        let pairs = Pairs::find(&mut qmp)?;
        let leaving = failover.will_leave(&mut qmp, &pairs)?;
        if leaving.is_empty() {
            // What blocks a migration may leave with the primaries; it is looked at again when they are gone.
            migration::refuse_blockers(&mut qmp)?;
        }
        refuse_asleep(was_running, &leaving)?;
        let found = blocks::find(&mut qmp, false)?;
        let away: Vec<String> = leaving.iter().map(|primary| primary.options.id().to_owned()).collect();
        let standbys = pairs.standbys_with(&leaving);
        let mut description = facts::describe(&mut qmp, socket, &found, &standbys, &away)?;
        description.notes.extend(leaving.iter().map(announce));
        let direct_io_nodes = facts::direct_io_nodes(&mut qmp)?;
        let devices = devices::passed_through(&mut qmp, &found.layout, &away)?;
        let throttle = Throttle::of(found.vmm, facts::processor_threads(&mut qmp)?);
        let FoundRam { layout, files, places, vmm, in_stream: _ } = found;
        let ram = Arc::new(GuestRam::map(layout, files, Access::ReadOnly)?);
        Ok(QemuSource {
            socket: socket.to_path_buf(),
            qmp,
            description,
            ram,
            places,
            vmm,
            direct_io_nodes,
            devices,
            was_running,
            watch: None,
            borrowed: None,
            state: None,
            throttle,
            failover,
        })
    }

    /// Undoes the failover; a failure is told, because who asks for it has no other way out.
    fn undo_failover(&mut self) {
        let (notes, failed) = self.failover.undo(&mut self.qmp);
        for error in &failed {
            tracing::warn!("{error}");
        }
        self.description.notes.extend(notes);
        self.description.notes.extend(failed.iter().map(|error| format!("WARNING: {error}")));
    }

    /// Gives QEMU its end of the socket that the state will come through.
    fn arm(&mut self) -> Result<(), GuestError> {
        if self.state.is_some() {
            return Ok(());
        }
        let (ours, theirs) = UnixStream::pair().map_err(GuestError::refused("cannot make a socket pair"))?;
        ours.set_read_timeout(Some(migration::STATE_TIMEOUT))
            .map_err(GuestError::refused("cannot set a deadline"))?;
        let pending = self.qmp.send("getfd", json!({ "fdname": STATE_NAME }), Some(theirs.as_fd()))?;
        self.qmp.answer(pending)?;
        self.state = Some(ours);
        Ok(())
    }

    fn wake(&mut self) -> Result<(), GuestError> {
        migration::cancel(&mut self.qmp)?;
        if self.was_running {
            self.qmp.execute("cont", Value::Null)?;
        }
        Ok(())
    }

    fn mark(&self) -> Mark {
        if self.was_running { Mark::WasRunning } else { Mark::WasPaused }
    }

    fn borrow_settings(&mut self) -> Result<(), GuestError> {
        if self.borrowed.is_none() {
            let mark = self.mark();
            self.borrowed = Some(migration::borrow(&mut self.qmp, mark)?);
        }
        Ok(())
    }
}

impl SourceGuest for QemuSource {
    fn description(&self) -> &Description {
        &self.description
    }

    fn ram(&self) -> Arc<GuestRam> {
        Arc::clone(&self.ram)
    }

    fn devices(&self) -> &[DeviceFacts] {
        &self.devices
    }

    /// None: QEMU carries what it passes through inside its own state.
    fn device_streams(&mut self) -> Result<Vec<Box<dyn DeviceStream>>, GuestError> {
        Ok(Vec::new())
    }

    fn attach(&mut self) -> Result<Box<dyn DirtyLog>, GuestError> {
        // While the guest runs, and before a page is read: what a primary writes by DMA no tracker sees.
        let notes = self.failover.begin(&mut self.qmp)?;
        self.description.notes.extend(notes);
        migration::refuse_blockers(&mut self.qmp)?;
        // Looked at again: a device may have come or gone since the guest was opened.
        self.devices = devices::passed_through(&mut self.qmp, self.ram.layout(), &[])?;
        DeviceFacts::refuse_unmovable(&self.devices)?;
        let tracked = attach::track(self.vmm, self.ram.layout(), &self.places)?;
        self.borrow_settings()?;
        self.arm()?;
        self.description.notes.extend_from_slice(tracked.watch.notes());
        self.watch = Some(tracked.watch);
        Ok(tracked.log)
    }

    fn pinned(&self) -> PageSet {
        if !self.devices.is_empty() {
            // Their DMA passes the page tables by, and QEMU does not tell where it goes.
            return PageSet::full(self.ram.layout());
        }
        self.watch.as_ref().map_or_else(|| PageSet::new(self.ram.layout()), |watch| watch.pinned().clone())
    }

    fn direct_io_nodes(&self) -> &[String] {
        &self.direct_io_nodes
    }

    fn new_writers(&mut self) -> Result<Vec<String>, GuestError> {
        self.watch.as_mut().map_or_else(|| Ok(Vec::new()), Watch::new_writers)
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        // Both at once: the second answer tells whether the guest really stands.
        let stop = self.qmp.send("stop", Value::Null, None)?;
        let look = self.qmp.send("query-status", Value::Null, None)?;
        self.qmp.answer(stop)?;
        let status = self.qmp.answer(look)?;
        match status["status"].as_str() {
            Some("paused") => {
                if let Some(watch) = &mut self.watch {
                    watch.look_ahead();
                }
                Ok(())
            }
            other => Err(GuestError::misbehaved(format!(
                "the guest is `{}` instead of paused: it ended or crashed by itself, so there is nothing to move",
                other.unwrap_or("unknown")
            ))),
        }
    }

    fn save_state(&mut self, into: &mut dyn Write) -> Result<ByteLen, GuestError> {
        self.borrow_settings()?;
        self.arm()?;
        let carried = self.failover.traffic(&mut self.qmp)?;
        self.description.notes.extend(carried);
        let preface = Preface { was_running: self.was_running }.to_bytes();
        into.write_all(&preface).map_err(GuestError::Relay)?;
        self.qmp.forget_events();
        self.qmp.execute("migrate", json!({ "uri": format!("fd:{STATE_NAME}") }))?;
        let Some(mut state) = self.state.take() else {
            return Err(GuestError::Bug("the state socket is gone".into()));
        };
        let relayed = match relay(&mut state, into) {
            Ok(relayed) => relayed,
            Err(RelayFault::Write(error)) => return Err(GuestError::Relay(error)),
            Err(RelayFault::Read(error)) => {
                return Err(GuestError::misbehaved(format!(
                    "QEMU stopped writing its device state: {error}"
                )));
            }
        };
        migration::wait_completed(&mut self.qmp, "save the device state")?;
        Ok(ByteLen(relayed.0 + preface.len() as u64))
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.state = None;
        self.wake().or_else(|error| {
            // A connection in an unknown state must not keep a guest asleep: once more, on a fresh one.
            tracing::warn!("{error}; trying again on a new connection");
            self.qmp.redial(&self.socket)?;
            self.wake()
        })
    }

    fn set_throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.throttle.set(percent)
    }

    fn detach(&mut self) {
        self.watch = None;
        if let Err(error) = self.throttle.set(0) {
            tracing::warn!("{error}");
        }
        if self.state.take().is_some() {
            let _ = self.qmp.execute("closefd", json!({ "fdname": STATE_NAME }));
        }
        self.undo_failover();
        let Some(borrowed) = self.borrowed.take() else { return };
        if let Err(error) = borrowed.give_back(&mut self.qmp) {
            tracing::warn!("QEMU's migration settings could not be put back: {error}");
        }
    }

    fn retire(&mut self) -> Result<(), GuestError> {
        self.borrowed = None;
        self.failover.close();
        self.throttle.set(0)?;
        end(&mut self.qmp)
    }
}

impl Drop for QemuSource {
    fn drop(&mut self) {
        self.detach();
    }
}

/// A guest that is paused gives nothing up.
fn refuse_asleep(was_running: bool, leaving: &[Primary]) -> Result<(), GuestError> {
    let Some(first) = leaving.first().filter(|_| !was_running) else { return Ok(()) };
    Err(GuestError::mistake(format!(
        "this guest is paused and cannot be asked for `{}`, which cannot migrate: let it run (cont) and try again, or \
         unplug `{0}` while it runs (device_del)",
        first.options.id()
    )))
}

fn announce(primary: &Primary) -> String {
    format!(
        "failover: `{}` ({}) cannot migrate: the guest is asked to give it up, and runs over `{}` meanwhile",
        primary.options.id(),
        primary.options.driver(),
        primary.standby.id
    )
}

/// Tells QEMU to end. One that is gone already has done so.
pub(crate) fn end(qmp: &mut Qmp) -> Result<(), GuestError> {
    match qmp.execute("quit", Value::Null) {
        Ok(_) | Err(QmpFailure::Lost(_)) => Ok(()),
        Err(refused @ QmpFailure::Refused(_)) => Err(refused.into()),
    }
}

/// Running or paused by its owner, and nobody moves it already; whether it runs.
fn must_be_movable(qmp: &mut Qmp) -> Result<bool, GuestError> {
    let moving = migration::status(qmp)?;
    if !migration::is_idle(&moving) {
        return Err(GuestError::mistake(format!(
            "this QEMU is already migrating (status `{moving}`); wait for that migration, or end it with migrate_cancel"
        )));
    }
    let status = qmp.execute("query-status", Value::Null)?;
    match status["status"].as_str().unwrap_or("unknown") {
        "running" => Ok(true),
        "paused" | "suspended" => match migration::read_mark(qmp)? {
            // A vmferry died after it had paused the guest, and nobody rescued it.
            Mark::WasRunning => Ok(true),
            Mark::Free | Mark::WasPaused => Ok(false),
        },
        "inmigrate" => Err(GuestError::mistake(
            "this QEMU waits for a guest to come in (-incoming): it is a target; name the QEMU that runs the guest",
        )),
        "postmigrate" => Err(GuestError::mistake(
            "this guest was moved away already (status `postmigrate`); if it does not run elsewhere, give QEMU the \
             command `cont` first",
        )),
        "prelaunch" => Err(GuestError::mistake(
            "this guest was never started (QEMU's -S): there is nothing to move; give QEMU the command `cont` first",
        )),
        other => Err(GuestError::mistake(format!(
            "this guest is `{other}`, which is neither running nor paused; start it before it is moved"
        ))),
    }
}

/// Makes a guest run again after its sender died before Commit.
pub fn rescue(socket: &Path) -> Result<(), GuestError> {
    let mut qmp = Qmp::connect(socket)?;
    let mark = migration::read_mark(&mut qmp)?;
    migration::cancel(&mut qmp)?;
    let throttle = Throttle::of(qmp.peer(), facts::processor_threads(&mut qmp)?);
    throttle.rescue()?;
    let status = qmp.execute("query-status", Value::Null)?;
    let stands = matches!(status["status"].as_str(), Some("paused" | "postmigrate" | "finish-migrate"));
    if stands && mark == Mark::WasRunning {
        qmp.execute("cont", Value::Null)?;
    }
    if mark != Mark::Free {
        Borrowed::of_the_dead().give_back(&mut qmp)?;
    }
    bring_back(&mut qmp)
}
