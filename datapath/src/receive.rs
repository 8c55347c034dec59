//! The receiving half: everything that arrives is hostile until its tag was checked.
//!
//! ```text
//!   link ──► lane thread ──► guest RAM
//!                  └── state stream s, on lane s % lanes ──► bounded pipe ──► StateStream ──► VMM, device
//! ```
//!
//! Discard the target's memory before starting: a zero page on a page that nobody wrote is then no work at all.

use std::sync::Arc;

use crate::error::DataError;
use crate::frame::{Credit, FrameFault};
use crate::guest_ram::GuestRam;
use crate::lane::{Crew, Fate, LaneEnd};
use crate::limits::{
    CREDIT_SLOTS, DEVICE_PIPE_BYTES, DEVICE_STREAMS_MAX, RECEIVE_BYTES, STATE_PIPE_BYTES,
    URGENT_RECEIVE_BYTES,
};
use crate::link::LinkPlan;
use crate::meter::Meter;
use crate::seal::Cipher;
use crate::send::LaneTotals;

pub(crate) mod lane;
mod state_pipe;

pub use state_pipe::StateStream;

use lane::{Ending, ReceiveLane, Written};
use state_pipe::StatePipe;

/// Takes in pages and device state from all lanes.
pub struct Receiver {
    crew: Crew,
    endings: Vec<Arc<Ending>>,
    states: StatePipes,
    ram: Arc<GuestRam>,
    written: Arc<Written>,
    cipher: Cipher,
}

/// The pipes of all state streams, by number.
pub(crate) type StatePipes = Arc<[Arc<StatePipe>]>;

/// The buffers of a receiving lane's link. Credit is all that it sends.
pub(crate) const RECEIVE_LINK: LinkPlan =
    LinkPlan { send_slots: CREDIT_SLOTS, slot_bytes: 4096, receive_bytes: RECEIVE_BYTES };
/// The same of the urgent path.
const URGENT_LINK: LinkPlan = LinkPlan { receive_bytes: URGENT_RECEIVE_BYTES, ..RECEIVE_LINK };

impl Receiver {
    /// Starts a pinned thread for each lane; every buffer is allocated and registered when this returns.
    pub fn start(
        ram: Arc<GuestRam>,
        lanes: Vec<LaneEnd>,
        cipher: Cipher,
    ) -> Result<(Receiver, StateStream), DataError> {
        let (receiver, mut streams) = Receiver::start_with_devices(ram, lanes, cipher, 0)?;
        Ok((receiver, streams.remove(0)))
    }

    /// The same for a guest with so many devices, at most [`DEVICE_STREAMS_MAX`], whose states travel beside the
    /// VMM's own: stream 0 is the VMM's, the devices' follow. Each must be read by somebody, since a full pipe holds
    /// its lane.
    pub fn start_with_devices(
        ram: Arc<GuestRam>,
        lanes: Vec<LaneEnd>,
        cipher: Cipher,
        devices: usize,
    ) -> Result<(Receiver, Vec<StateStream>), DataError> {
        if devices > DEVICE_STREAMS_MAX {
            return Err(DataError::Bug("more device streams than the limit were asked for"));
        }
        let populated = ram.populated()?;
        let device_pipes = (0..devices).map(|_| StatePipe::new(DEVICE_PIPE_BYTES));
        let states: StatePipes =
            std::iter::once(StatePipe::new(STATE_PIPE_BYTES)).chain(device_pipes).collect();
        let streams = states.iter().map(|pipe| StateStream(Arc::clone(pipe))).collect();
        let written = Arc::new(Written::new(&populated));
        Ok((Receiver::start_on(ram, written, states, (lanes, RECEIVE_LINK), cipher)?, streams))
    }

    /// Takes in what [`Sender::open_urgent`](crate::Sender::open_urgent) sends, beside the lanes, over a link of its own.
    /// Device state is refused on it.
    pub fn open_urgent(&self, end: LaneEnd) -> Result<Receiver, DataError> {
        let (ram, written) = (Arc::clone(&self.ram), Arc::clone(&self.written));
        Receiver::start_on(ram, written, Arc::new([]), (vec![end], URGENT_LINK), self.cipher)
    }

    fn start_on(
        ram: Arc<GuestRam>,
        written: Arc<Written>,
        states: StatePipes,
        (lanes, link): (Vec<LaneEnd>, LinkPlan),
        cipher: Cipher,
    ) -> Result<Receiver, DataError> {
        let mut endings = Vec::with_capacity(lanes.len());
        let (all, pipes) = (&mut endings, Arc::clone(&states));
        let (own_ram, own_written) = (Arc::clone(&ram), Arc::clone(&written));
        let crew = Crew::muster(lanes, cipher, link, move |_| {
            let (ram, written, ending) = (Arc::clone(&ram), Arc::clone(&written), Arc::new(Ending::new()));
            all.push(Arc::clone(&ending));
            let pipes = Arc::clone(&pipes);
            move |kit| {
                let fate = Arc::clone(&kit.fate);
                let lane = ReceiveLane::new(kit, ram, written, ending, Arc::clone(&pipes));
                lane.and_then(ReceiveLane::run).inspect_err(|failure| end_states(&pipes, &fate, failure))
            }
        })?;
        Ok(Receiver { crew, endings, states, ram: own_ram, written: own_written, cipher })
    }

    /// Returns when every lane has ended with exactly these totals. `Ok(false)` as soon as `go_on`, asked every
    /// few milliseconds, says no.
    pub fn wait_complete(
        &mut self,
        totals: &[LaneTotals],
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<bool, DataError> {
        while !self.endings.iter().all(|ending| ending.get().is_some()) {
            if self.crew.fate.is_stopped() {
                return Err(self.crew.fate.cause());
            }
            if !go_on() {
                return Ok(false);
            }
            self.crew.fate.wait_tick();
        }
        for (lane, ending) in (0_u16..).zip(&self.endings) {
            let got = ending.get().copied().unwrap_or_default();
            let mut of_lane = totals.iter().filter(|totals| totals.lane == lane);
            let expected =
                of_lane.next().map_or(Credit::default(), |t| Credit { records: t.records, bytes: t.bytes });
            if expected != got || of_lane.next().is_some() || totals.len() != self.endings.len() {
                let fault = FrameFault::TotalsDiffer { expected: expected.records, got: got.records };
                return Err(DataError::PeerMisbehaved { lane, fault });
            }
        }
        Ok(true)
    }

    /// What was taken in so far.
    pub fn meter(&self) -> Meter {
        Meter::read(&self.crew.gauges)
    }

    /// The first failure of any lane.
    pub fn failure(&self) -> Option<DataError> {
        self.crew.fate.failure()
    }

    /// Closes every link and ends every lane at once.
    pub fn abort(&mut self) {
        self.crew.fate.stop();
        self.states.iter().for_each(|pipe| pipe.end(Err(self.crew.fate.cause())));
        self.crew.disband();
    }
}

/// Whoever reads a state must not wait for a transfer that is over.
fn end_states(pipes: &[Arc<StatePipe>], fate: &Fate, failure: &DataError) {
    fate.fail(failure.clone());
    pipes.iter().for_each(|pipe| pipe.end(Err(fate.cause())));
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.abort();
    }
}
