//! What every guest can do, whatever runs it.
//!
//! Source and target are two traits: no method of one side exists on the other, so a driver cannot resume a target
//! or load state into a source. What must never happen: `resume` or `run` on both sides of one move. The order is
//! the session's business; these traits only make each step possible, and make every step before Commit undoable.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmferry_datapath::{ByteLen, DirtyLog, GuestRam, PageSet, RamLayout};

use crate::{DeviceFacts, DeviceStream, GuestError};

/// What negotiation has to know about a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// The adapter: `qemu`, `kvm` or `process`.
    pub kind: String,
    /// The guest's own name, for people.
    pub name: String,
    /// What both sides must have in common: machine, cpus, cpu model…
    pub facts: BTreeMap<String, String>,
    /// The RAM blocks whose pages the lanes carry.
    pub layout: RamLayout,
    /// What an operator should know: the VMM's version, blocks that travel in the device state, fallbacks in use.
    pub notes: Vec<String>,
}

/// A guest that runs here and is to run elsewhere.
pub trait SourceGuest: Send {
    /// What it is.
    fn description(&self) -> &Description;
    /// Its memory, mapped for reading.
    fn ram(&self) -> Arc<GuestRam>;
    /// What is passed through to it. Where the device list is not known until `attach`, this list grows by it.
    fn devices(&self) -> &[DeviceFacts];
    /// After `attach`: the states of the devices that have a stream ([`DeviceFacts::has_stream`]), one for each, in the
    /// order of `devices`. From here on a device that can pre-copy does so, until `pause` or `detach`.
    fn device_streams(&mut self) -> Result<Vec<Box<dyn DeviceStream>>, GuestError>;
    /// Starts to track every writer. The first harvest of the log returns every page that is not known to be clean.
    /// Writers that cannot be tracked are in [`SourceGuest::pinned`] afterwards. Dropping the log ends the tracking.
    fn attach(&mut self) -> Result<Box<dyn DirtyLog>, GuestError>;
    /// Pages that no tracker covers: they travel after the guest was paused.
    fn pinned(&self) -> PageSet;
    /// Block nodes with O_DIRECT: their reads are written into guest memory after the dirty bit was seen.
    fn direct_io_nodes(&self) -> &[String];
    /// Writers that appeared after [`SourceGuest::attach`], by name; checked again in the blackout. Their pages are
    /// in [`SourceGuest::pinned`] from then on.
    fn new_writers(&mut self) -> Result<Vec<String>, GuestError>;
    /// Stops the guest and its devices (devices to P2P, processors paused, devices stopped, in this order); after this
    /// nobody writes its memory. What the devices' logs had to tell comes out of the log's next harvest, and what
    /// nobody can tell is in [`SourceGuest::pinned`].
    fn pause(&mut self) -> Result<(), GuestError>;
    /// Writes the device state of the paused guest.
    fn save_state(&mut self, into: &mut dyn Write) -> Result<ByteLen, GuestError>;
    /// Undoes `pause` and `save_state`, finished or not; devices run again too. Never called after Commit. A guest that its owner had
    /// paused before the move stays paused.
    fn resume(&mut self) -> Result<(), GuestError>;
    /// Takes `percent` of the guest's CPU time away; 0 gives all of it back.
    fn set_throttle(&mut self, percent: u8) -> Result<(), GuestError>;
    /// Leaves no trace in the VMM: throttle lifted, devices out of pre-copy, capabilities as before. Any number of times.
    fn detach(&mut self);
    /// After Commit: ends the source VMM.
    fn retire(&mut self) -> Result<(), GuestError>;
}

/// A VMM that waits here for a guest.
pub trait TargetGuest: Send {
    /// What it is.
    fn description(&self) -> &Description;
    /// Its memory, mapped for writing.
    fn ram(&self) -> Arc<GuestRam>;
    /// What is passed through to it.
    fn devices(&self) -> &[DeviceFacts];
    /// After `prepare`: where the states of the devices that have a stream go, one sink for each, in the order of
    /// `devices`. Each is fed by a thread of its own, while the source still runs and while `load_state` works.
    /// `flush` says that the state is complete, and returns when the device has loaded it; an error is the device's
    /// refusal, in a sentence.
    fn device_sinks(&mut self) -> Result<Vec<Box<dyn Write + Send>>, GuestError>;
    /// Makes the VMM ready to receive. What its RAM holds by then (firmware that a reset put there, preallocated pages)
    /// may stay: the receiver overwrites or zeroes every page that is there, and keeps the preallocation that way.
    fn prepare(&mut self) -> Result<(), GuestError>;
    /// Feeds the VMM its own state, stream 0, which was saved at least `age` ago: a VMM that has no better clock to go by
    /// lets the guest's clocks go on from there. Returns when it holds all of it and the guest is paused.
    fn load_state(&mut self, from: &mut dyn Read, age: Duration) -> Result<ByteLen, GuestError>;
    /// After Commit only: the guest runs here. One that was paused by its owner on the source stays paused. After
    /// [`GuestError::Ended`] it surely never ran here; after any other error nobody knows.
    fn run(&mut self) -> Result<(), GuestError>;
    /// After the source was told that the guest runs: gives the VMM's settings back. Any number of times.
    fn settle(&mut self) -> Result<(), GuestError>;
    /// Tears down what was received; the VMM may be ended by it.
    fn discard(&mut self);
}
