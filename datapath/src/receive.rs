//! The receiving half: everything that arrives is hostile until its tag was checked.
//!
//! ```text
//!   link ──► lane thread ──► guest RAM            lane 0 ──► StateStream ──► the VMM
//! ```
//!
//! Discard the target's memory before starting: a zero page on a page that nobody wrote is then no work at all.

use std::sync::Arc;

use crate::error::DataError;
use crate::frame::{Credit, FrameFault};
use crate::guest_ram::GuestRam;
use crate::lane::{Crew, Fate, LaneEnd};
use crate::limits::{CREDIT_SLOTS, RECEIVE_BYTES};
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
    state: Arc<StatePipe>,
}

/// The buffers of a receiving lane's link. Credit is all that it sends.
pub(crate) const RECEIVE_LINK: LinkPlan =
    LinkPlan { send_slots: CREDIT_SLOTS, slot_bytes: 4096, receive_bytes: RECEIVE_BYTES };

impl Receiver {
    /// Starts a pinned thread for each lane; every buffer is allocated and registered when this returns.
    pub fn start(
        ram: Arc<GuestRam>,
        lanes: Vec<LaneEnd>,
        cipher: Cipher,
    ) -> Result<(Receiver, StateStream), DataError> {
        let populated = ram.populated()?;
        let (written, state) = (Arc::new(Written::new(&populated)), StatePipe::new());
        let mut endings = Vec::with_capacity(lanes.len());
        let (all, pipe) = (&mut endings, Arc::clone(&state));
        let crew = Crew::muster(lanes, cipher, RECEIVE_LINK, move |number| {
            let (ram, written, ending) = (Arc::clone(&ram), Arc::clone(&written), Arc::new(Ending::new()));
            all.push(Arc::clone(&ending));
            let pipe = Arc::clone(&pipe);
            move |kit| {
                let fate = Arc::clone(&kit.fate);
                let state = (number == 0).then(|| Arc::clone(&pipe));
                let lane = ReceiveLane::new(kit, ram, written, ending, state);
                lane.and_then(ReceiveLane::run).inspect_err(|failure| end_state(&pipe, &fate, failure))
            }
        })?;
        let stream = StateStream(Arc::clone(&state));
        Ok((Receiver { crew, endings, state }, stream))
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
        self.state.end(Err(self.crew.fate.cause()));
        self.crew.disband();
    }
}

/// Whoever reads the state must not wait for a transfer that is over.
fn end_state(pipe: &StatePipe, fate: &Fate, failure: &DataError) {
    fate.fail(failure.clone());
    pipe.end(Err(fate.cause()));
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.abort();
    }
}
