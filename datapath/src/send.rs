//! The sending half: pages, zero pages and device state, over all lanes.
//!
//! ```text
//!   send(pages) ── chunk % lanes ──► bounded queue ──► lane thread ──► link
//!   StateFeed ─── stream % lanes ──► bounded queue ────────┘  at most one piece after each chunk
//! ```
//!
//! The caller's thread only sorts chunks onto lanes. It asks `go_on` every few milliseconds, and is never blocked
//! for longer by a stuck peer. What must never happen: a page on two lanes; the lane follows from the address.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::{RecvTimeoutError, SendTimeoutError, Sender as Queue, bounded};
use serde::{Deserialize, Serialize};

use crate::error::DataError;
use crate::guest_ram::GuestRam;
use crate::lane::{Crew, LaneEnd};
use crate::limits::{
    CREDIT_BYTES, DEVICE_STREAMS_MAX, LANE_ORDERS, SEND_SLOTS, SLOT_BYTES, STATE_ORDERS, TICK, WINDOW_BYTES,
};
use crate::link::LinkPlan;
use crate::meter::{Meter, MeterReader};
use crate::page_set::PageSet;
use crate::seal::Cipher;

pub(crate) mod body;
mod feed;
pub(crate) mod lane;
mod pacer;
mod placing;
mod urgent;

pub use feed::StateFeed;
pub use urgent::UrgentSender;

use body::{BodyMaker, SentHashes};
use feed::StateOrder;
use lane::{Batch, Order, SendLane};
use urgent::Taken;

/// Whether bodies are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Never.
    Off,
    /// With zstd, kept for each record only where it is smaller.
    Zstd {
        /// zstd's level.
        level: i32,
    },
}

/// How to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SendPlan {
    /// How records are sealed.
    pub cipher: Cipher,
    /// Whether bodies are compressed.
    pub compression: Compression,
    /// Remember a hash of each page sent, 8 bytes a page: for guests with O_DIRECT disks.
    pub keep_hashes: bool,
    /// Bytes per second on the wire, all lanes together.
    pub rate_limit: Option<u64>,
}

/// What one lane carried: compared over the control channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneTotals {
    /// The lane.
    pub lane: u16,
    /// Records, END included.
    pub records: u64,
    /// Bytes on the wire.
    pub bytes: u64,
}

/// Sends pages and device state over all lanes.
pub struct Sender {
    queues: Vec<Queue<Order>>,
    state_queues: Vec<Queue<StateOrder>>,
    vmm_state: Option<StateFeed>,
    crew: Crew,
    ram: Arc<GuestRam>,
    hashes: Option<Arc<SentHashes>>,
    rate: Arc<AtomicU64>,
    compressing: Arc<AtomicBool>,
    cipher: Cipher,
    /// Once the urgent path is open: which pages a path has taken.
    taken: Option<Arc<Taken>>,
    ended: bool,
}

/// The buffers of a sending lane's link.
pub(crate) const SEND_LINK: LinkPlan =
    LinkPlan { send_slots: SEND_SLOTS, slot_bytes: SLOT_BYTES, receive_bytes: CREDIT_BYTES };

/// A lane's share of a limit, never zero, which would mean none.
fn share(limit: Option<u64>, lanes: usize) -> u64 {
    limit.map_or(0, |limit| (limit / lanes.max(1) as u64).max(1))
}

impl Sender {
    /// Starts a pinned thread for each lane; every buffer is allocated and registered when this returns.
    pub fn start(ram: Arc<GuestRam>, lanes: Vec<LaneEnd>, plan: SendPlan) -> Result<Sender, DataError> {
        Sender::start_on(ram, lanes, plan, SEND_LINK)
    }

    /// The same, with links of these buffers.
    fn start_on(
        ram: Arc<GuestRam>,
        lanes: Vec<LaneEnd>,
        plan: SendPlan,
        link: LinkPlan,
    ) -> Result<Sender, DataError> {
        let hashes = plan.keep_hashes.then(|| Arc::new(SentHashes::new(ram.layout())));
        let rate = Arc::new(AtomicU64::new(share(plan.rate_limit, lanes.len())));
        let compressing = Arc::new(AtomicBool::new(true));
        let (mut queues, mut state_queues) = (Vec::with_capacity(lanes.len()), Vec::new());
        let crew = Crew::muster(lanes, plan.cipher, link, |_| {
            let (queue, orders) = bounded(LANE_ORDERS);
            queues.push(queue);
            let (queue, states) = bounded(STATE_ORDERS);
            state_queues.push(queue);
            let (ram, rate, hashes) = (Arc::clone(&ram), Arc::clone(&rate), hashes.clone());
            let compressing = Arc::clone(&compressing);
            move |kit| {
                let body = BodyMaker::new(plan.compression, hashes, compressing)?;
                SendLane::new(kit, ram, body, rate, WINDOW_BYTES, states).run(&orders)
            }
        })?;
        let mut sender = Sender {
            queues,
            state_queues,
            vmm_state: None,
            crew,
            ram,
            hashes,
            rate,
            compressing,
            cipher: plan.cipher,
            taken: None,
            ended: false,
        };
        sender.vmm_state = Some(sender.feed(0)?);
        Ok(sender)
    }

    /// Sends the pages of a set. `go_on` is asked every few milliseconds; after `Ok(false)`, when it said no, some
    /// of the pages were sent and the caller must take all of them for unsent.
    pub fn send(&mut self, pages: &PageSet, go_on: &mut dyn FnMut() -> bool) -> Result<bool, DataError> {
        self.only_rest()?;
        self.deal(pages, Order::Pages, go_on)
    }

    /// Tells the target that the pages of a set are zero, without reading them.
    pub fn send_zero(&mut self, pages: &PageSet) -> Result<(), DataError> {
        self.only_rest()?;
        self.deal(pages, Order::Zero, &mut || true).map(|_| ())
    }

    /// Beside an urgent path a page is sent by whoever takes it, or an older copy could come after a newer one.
    fn only_rest(&self) -> Result<(), DataError> {
        if self.taken.is_none() {
            Ok(())
        } else {
            Err(DataError::Bug("pages were sent past the urgent path"))
        }
    }

    /// Returns when the receiver has taken in everything that was sent.
    pub fn flush(&mut self) -> Result<(), DataError> {
        self.flush_while(&mut || true).map(|_| ())
    }

    /// The same, but `Ok(false)` as soon as `go_on`, asked every few milliseconds, says no.
    pub fn flush_while(&mut self, go_on: &mut dyn FnMut() -> bool) -> Result<bool, DataError> {
        self.ask_all(Order::Sync, go_on)
    }

    /// Sends bytes of the VMM's own state, stream 0, on lane 0.
    pub fn send_state(&mut self, bytes: &[u8]) -> Result<(), DataError> {
        self.vmm_state()?.send(bytes, &mut || true).map(|_| ())
    }

    /// The VMM's own state is complete.
    pub fn end_state(&mut self) -> Result<(), DataError> {
        self.vmm_state()?.end()
    }

    /// The feed of device stream `stream`, 1 to [`DEVICE_STREAMS_MAX`], to be asked for once. It works beside
    /// everything else that is sent.
    pub fn device_feed(&self, stream: u16) -> Result<StateFeed, DataError> {
        match usize::from(stream) {
            1..=DEVICE_STREAMS_MAX => self.feed(stream),
            _ => Err(DataError::Bug("a device stream past the limit was asked for")),
        }
    }

    fn feed(&self, stream: u16) -> Result<StateFeed, DataError> {
        let lane = usize::from(stream) % self.state_queues.len().max(1);
        let queue = self.state_queues.get(lane).ok_or_else(|| self.crew.fate.cause())?;
        Ok(StateFeed::new(stream, queue.clone(), Arc::clone(&self.crew.fate)))
    }

    fn vmm_state(&mut self) -> Result<&mut StateFeed, DataError> {
        if self.ended {
            return Err(DataError::Bug("something was sent after the end"));
        }
        self.vmm_state.as_mut().ok_or(DataError::Bug("the VMM's state has no feed"))
    }

    /// Ends every lane, and gives what each carried. Nothing may be sent afterwards: every feed was ended before.
    pub fn finish(&mut self) -> Result<Vec<LaneTotals>, DataError> {
        self.ask_all(Order::End, &mut || true)?;
        self.ended = true;
        let numbered = (0_u16..).zip(&self.crew.gauges);
        Ok(numbered
            .map(|(lane, g)| LaneTotals { lane, records: g.records.get(), bytes: g.wire_bytes.get() })
            .collect())
    }

    /// With `keep_hashes`: which of the pages differ from what was last sent of them. Without: all of them. Call
    /// it while the guest is paused and after `flush`. Reads the pages: keep holes out.
    pub fn changed_since_sent(&self, pages: &PageSet) -> PageSet {
        self.hashes.as_ref().map_or_else(|| pages.clone(), |hashes| hashes.changed(&self.ram, pages))
    }

    /// What was sent so far.
    pub fn meter(&self) -> Meter {
        Meter::read(&self.crew.gauges)
    }

    /// The first failure of any lane.
    pub fn failure(&self) -> Option<DataError> {
        self.crew.fate.failure()
    }

    /// Changes the rate limit, all lanes together.
    pub fn set_rate_limit(&self, bytes_per_s: Option<u64>) {
        self.rate.store(share(bytes_per_s, self.queues.len()), Ordering::Relaxed);
    }

    /// A handle that reads the meters while a set is being sent.
    pub fn meter_reader(&self) -> MeterReader {
        MeterReader::new(self.crew.gauges.clone())
    }

    /// Turns the compression of the plan off and on again, from the next record on; without one in the plan it does
    /// nothing. Shared, so that it can be turned while a set is being sent.
    pub fn compression_switch(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.compressing)
    }

    /// Closes every link and ends every lane at once, also when the peer is stuck.
    pub fn abort(&mut self) {
        self.queues.clear();
        self.state_queues.clear();
        self.crew.disband();
    }

    /// Deals the chunks of a set to their lanes.
    fn deal(
        &mut self,
        pages: &PageSet,
        order: impl Fn(Batch) -> Order,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<bool, DataError> {
        let lanes = self.queues.len().max(1);
        let mut hands = vec![Batch::EMPTY; lanes];
        for (chunk, word) in pages.iter_chunks() {
            let lane = usize::try_from(chunk.0 % lanes as u64).unwrap_or(0);
            if !hands[lane].push(chunk, word) {
                continue;
            }
            let full = std::mem::replace(&mut hands[lane], Batch::EMPTY);
            if !self.order(lane, order(full), go_on)? {
                return Ok(false);
            }
        }
        for (lane, hand) in hands.into_iter().enumerate().filter(|(_, hand)| !hand.is_empty()) {
            if !self.order(lane, order(hand), go_on)? {
                return Ok(false);
            }
        }
        Ok(go_on())
    }

    /// Queues one order, as soon as there is room.
    fn order(
        &self,
        lane: usize,
        mut order: Order,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<bool, DataError> {
        if self.ended {
            return Err(DataError::Bug("something was sent after the end"));
        }
        let queue = self.queues.get(lane).ok_or_else(|| self.crew.fate.cause())?;
        loop {
            if self.crew.fate.is_stopped() {
                return Err(self.crew.fate.cause());
            }
            order = match queue.send_timeout(order, TICK) {
                Ok(()) => return Ok(true),
                Err(SendTimeoutError::Disconnected(_)) => return Err(self.crew.fate.cause()),
                Err(SendTimeoutError::Timeout(order)) => order,
            };
            if !go_on() {
                return Ok(false);
            }
        }
    }

    /// Gives every lane an order, and waits until each has answered.
    fn ask_all(
        &mut self,
        ask: fn(Queue<()>) -> Order,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<bool, DataError> {
        let (done, answers) = bounded(self.queues.len());
        for lane in 0..self.queues.len() {
            if !self.order(lane, ask(done.clone()), go_on)? {
                return Ok(false);
            }
        }
        drop(done);
        let mut missing = self.queues.len();
        while missing > 0 {
            match answers.recv_timeout(TICK) {
                Ok(()) => missing -= 1,
                Err(RecvTimeoutError::Disconnected) => return Err(self.crew.fate.cause()),
                // An order may lie in the queue of a lane that ended: its answer would be waited for forever.
                Err(RecvTimeoutError::Timeout) if self.crew.fate.is_stopped() => {
                    return Err(self.crew.fate.cause());
                }
                Err(RecvTimeoutError::Timeout) if !go_on() => return Ok(false),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        if self.queues.is_empty() { Err(self.crew.fate.cause()) } else { Ok(true) }
    }
}
