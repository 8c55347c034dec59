//! One sending lane: orders in, records out.
//!
//! ```text
//!   orders ─► find zero pages ─► record ─► seal into the open slot ─► submit when it is full or nothing is left
//!   states ─► a piece a chunk ──────┘
//!                                                    ◄─ credits: at most WINDOW_BYTES ahead of the receiver
//! ```
//!
//! The lane decides nothing about pages: it sends what it is ordered to, in that order. What must never happen: a
//! later copy of a page in front of an earlier one; so a run of zero chunks that is being gathered is written out
//! before any other record.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError, select};

use super::body::BodyMaker;
use super::feed::StateOrder;
use super::pacer::Pacer;
use super::placing::ToldZero;
use super::urgent::Taken;
use crate::error::{DataError, LinkFault};
use crate::frame::{ChunkRecord, Credit, FrameFault, HEADER_BYTES, Record, TAG_BYTES, first_record};
use crate::guest_ram::GuestRam;
use crate::lane::LaneKit;
use crate::limits::{IDLE, ORDER_CHUNKS, RDMA_PLACED_UNTOLD, STALL_MAX, TICK};
use crate::page::ChunkIndex;
use crate::seal::Source;

/// A slot with less room than this is sent rather than filled further.
const ROOM_MIN: usize = 64 << 10;

/// Some chunks, each with the pages that are meant.
#[derive(Clone, Copy)]
pub(crate) struct Batch {
    chunks: [(u64, u64); ORDER_CHUNKS],
    len: usize,
}

impl Batch {
    pub(crate) const EMPTY: Batch = Batch { chunks: [(0, 0); ORDER_CHUNKS], len: 0 };

    /// Adds a chunk; whether the batch is full now.
    pub(crate) fn push(&mut self, chunk: ChunkIndex, pages: u64) -> bool {
        if let Some(place) = self.chunks.get_mut(self.len) {
            *place = (chunk.0, pages);
            self.len += 1;
        }
        self.len == ORDER_CHUNKS
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn iter(&self) -> impl Iterator<Item = (ChunkIndex, u64)> + '_ {
        self.chunks[..self.len].iter().map(|&(chunk, pages)| (ChunkIndex(chunk), pages))
    }
}

/// What a lane is told to do.
pub(crate) enum Order {
    /// Send these pages.
    Pages(Batch),
    /// Send those of these pages that no path has taken.
    Rest(Batch, Arc<Taken>),
    /// Tell that these pages are zero, without reading them.
    Zero(Batch),
    /// Answer when the receiver has everything.
    Sync(Sender<()>),
    /// Nothing follows; answer as above.
    End(Sender<()>),
}

/// A lane at work.
pub(crate) struct SendLane {
    kit: LaneKit,
    ram: Arc<GuestRam>,
    body: BodyMaker,
    /// Bytes per second for this lane, zero for no limit.
    rate: Arc<AtomicU64>,
    pacer: Pacer,
    window: u64,
    /// Device state, which travels beside the pages.
    states: Receiver<StateOrder>,
    /// The slot being filled, and how far it is.
    open: Option<(usize, usize)>,
    /// Zero chunks that are not written out yet: the first, and how many.
    zero_run: Option<(ChunkIndex, u64)>,
    told_zero: ToldZero,
    /// Bytes that were placed and not told of.
    untold: u64,
    sent_bytes: u64,
    credit: Credit,
    ended: bool,
}

impl SendLane {
    pub(crate) fn new(
        kit: LaneKit,
        ram: Arc<GuestRam>,
        body: BodyMaker,
        rate: Arc<AtomicU64>,
        window: u64,
        states: Receiver<StateOrder>,
    ) -> SendLane {
        let chunks = ram.layout().chunk_count();
        let told_zero = ToldZero::new(kit.link.places(), chunks, kit.lanes);
        SendLane {
            kit,
            ram,
            body,
            rate,
            pacer: Pacer::default(),
            window,
            states,
            open: None,
            zero_run: None,
            told_zero,
            untold: 0,
            sent_bytes: 0,
            credit: Credit::default(),
            ended: false,
        }
    }

    /// Obeys until nobody is left to order.
    pub(crate) fn run(mut self, orders: &Receiver<Order>) -> Result<(), DataError> {
        loop {
            self.state_turn()?;
            let order = match orders.try_recv() {
                Ok(order) => order,
                Err(TryRecvError::Disconnected) => return Ok(()),
                Err(TryRecvError::Empty) => match self.rest(orders)? {
                    Rest::Work(order) => order,
                    Rest::Idle => continue,
                    Rest::Over => return Ok(()),
                },
            };
            self.obey(order)?;
        }
    }

    /// Sends what is gathered and waits for an order.
    fn rest(&mut self, orders: &Receiver<Order>) -> Result<Rest, DataError> {
        self.settle()?;
        let states = &self.states;
        let woken = self.kit.gauge.waiting(|| {
            select! {
                recv(orders) -> order => order.map_or(Woken::Over, Woken::Order),
                recv(states) -> piece => piece.map_or(Woken::Over, Woken::State),
                default(IDLE) => Woken::Late,
            }
        });
        match woken {
            Woken::Order(order) => Ok(Rest::Work(order)),
            Woken::State(piece) => self.send_state(&piece).map(|()| Rest::Idle),
            Woken::Over => Ok(Rest::Over),
            Woken::Late => self.look().map(|()| Rest::Idle),
        }
    }

    /// At most one piece of state: what it may have while pages wait. Whether there was one.
    fn state_turn(&mut self) -> Result<bool, DataError> {
        match self.states.try_recv() {
            Ok(piece) => self.send_state(&piece).map(|()| true),
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => Ok(false),
        }
    }

    /// Takes in credit without waiting. After the end, a peer that closes is an honest one.
    fn look(&mut self) -> Result<(), DataError> {
        match self.kit.progress(Duration::ZERO) {
            Ok(_) => self.take_credit(),
            Err(DataError::LinkLost { fault: LinkFault::Closed, .. }) if self.ended => {
                std::thread::sleep(TICK);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    pub(crate) fn obey(&mut self, order: Order) -> Result<(), DataError> {
        match order {
            Order::Pages(batch) => batch.iter().try_for_each(|(chunk, pages)| {
                self.send_chunk(chunk, pages)?;
                self.state_turn().map(|_| ())
            }),
            Order::Rest(batch, taken) => batch.iter().try_for_each(|(chunk, pages)| {
                match taken.take(chunk, pages) {
                    0 => {}
                    left => self.send_chunk(chunk, left)?,
                }
                self.state_turn().map(|_| ())
            }),
            Order::Zero(batch) => batch.iter().try_for_each(|(chunk, pages)| self.send_zero(chunk, pages)),
            Order::Sync(done) => self.send_last(&Record::Sync, &done),
            Order::End(done) => {
                self.send_last(&Record::End, &done)?;
                self.ended = true;
                Ok(())
            }
        }
    }

    fn send_chunk(&mut self, chunk: ChunkIndex, pages: u64) -> Result<(), DataError> {
        let data = self.ram.data_pages(chunk, pages);
        if data == 0 {
            return self.send_zero(chunk, pages);
        }
        self.write_zero_run()?;
        self.kit.gauge.data_pages.add(u64::from(data.count_ones()));
        self.kit.gauge.zero_pages.add(u64::from((pages & !data).count_ones()));
        if self.kit.link.places() {
            return self.place_chunk(chunk, pages, data);
        }
        let body_len = data.count_ones() * 4096;
        let mut record = ChunkRecord { chunk, present: pages, data, body_len, compressed: false };
        let (slot, filled) = self.room_for(HEADER_BYTES + body_len as usize + TAG_BYTES)?;
        let room = self.kit.link.slot_mut(slot).get_mut(filled + HEADER_BYTES..).unwrap_or_default();
        // The lane keeps its own hold of the memory, so that a source can borrow it while the lane is changed.
        let ram = Arc::clone(&self.ram);
        let source = self.body.make(&ram, &mut record, room);
        if let Some(hashes) = self.body.hashes() {
            hashes.keep_zero(chunk, pages & !data);
        }
        self.emit(&Record::Chunk(record), source)
    }

    /// Writes the pages straight into the target's guest, and tells of them behind.
    fn place_chunk(&mut self, chunk: ChunkIndex, pages: u64, data: u64) -> Result<(), DataError> {
        if self.told_zero.holds(chunk, data) {
            self.send_and_hear(&Record::Sync)?;
        }
        let number = self.kit.number;
        while !self.kit.link.place(chunk, data).map_err(|trouble| self.blame(trouble.on_lane(number)))? {
            self.wait()?;
        }
        if let Some(hashes) = self.body.hashes() {
            hashes.keep_pages(&self.ram, chunk, data);
            hashes.keep_zero(chunk, pages & !data);
        }
        let record = Record::Placed { chunk, present: pages, data };
        let placed = record.placed_bytes();
        self.kit.gauge.wire_bytes.add(placed);
        self.sent_bytes += placed;
        self.untold += placed;
        self.told_zero.add(chunk, pages & !data);
        self.emit(&record, Source::InPlace)?;
        if self.untold >= RDMA_PLACED_UNTOLD { self.ship() } else { Ok(()) }
    }

    fn send_zero(&mut self, chunk: ChunkIndex, pages: u64) -> Result<(), DataError> {
        let pages = pages & self.ram.layout().valid_pages(chunk);
        if pages == 0 {
            return Ok(());
        }
        if let Some(hashes) = self.body.hashes() {
            hashes.keep_zero(chunk, pages);
        }
        self.kit.gauge.zero_pages.add(u64::from(pages.count_ones()));
        self.told_zero.add(chunk, pages);
        if pages != self.ram.layout().valid_pages(chunk) {
            self.write_zero_run()?;
            let record = ChunkRecord { chunk, present: pages, data: 0, body_len: 0, compressed: false };
            return self.emit(&Record::Chunk(record), Source::InPlace);
        }
        match &mut self.zero_run {
            Some((first, count)) if first.0 + *count * self.kit.lanes == chunk.0 => *count += 1,
            _ => {
                self.write_zero_run()?;
                self.zero_run = Some((chunk, 1));
            }
        }
        Ok(())
    }

    fn write_zero_run(&mut self) -> Result<(), DataError> {
        match self.zero_run.take() {
            Some((first, count)) => self.write(&Record::ZeroRun { first, count }, Source::InPlace),
            None => Ok(()),
        }
    }

    fn send_state(&mut self, order: &StateOrder) -> Result<(), DataError> {
        let StateOrder { stream, bytes } = order;
        let stream = *stream;
        if self.ended {
            return Err(DataError::Bug("device state was sent after the end"));
        }
        if bytes.is_empty() {
            return self.emit(&Record::StateEnd { stream }, Source::InPlace);
        }
        // Before the bytes are put where the record will be: written later, it would shift that place.
        self.write_zero_run()?;
        let len =
            u32::try_from(bytes.len()).map_err(|_| DataError::Bug("a piece of device state was too long"))?;
        let (slot, filled) = self.room_for(HEADER_BYTES + bytes.len() + TAG_BYTES)?;
        let start = filled + HEADER_BYTES;
        let room = self.kit.link.slot_mut(slot).get_mut(start..start + bytes.len());
        room.ok_or(DataError::Bug("a piece of device state was too long"))?.copy_from_slice(bytes);
        self.kit.gauge.state_bytes.add(bytes.len() as u64);
        self.emit(&Record::State { stream, len }, Source::InPlace)
    }

    /// Sends a record that asks for credit, and answers when the receiver has taken in all there is.
    fn send_last(&mut self, record: &Record, done: &Sender<()>) -> Result<(), DataError> {
        while self.state_turn()? {}
        self.send_and_hear(record)?;
        // Nobody may be left to hear it.
        let _ = done.send(());
        Ok(())
    }

    /// Sends a record that asks for credit, and waits until the receiver has taken in all there is.
    fn send_and_hear(&mut self, record: &Record) -> Result<(), DataError> {
        self.emit(record, Source::InPlace)?;
        self.settle()?;
        while self.credit.records < self.kit.sealer.records() || self.kit.link.unsent() > 0 {
            self.wait()?;
        }
        self.told_zero.clear();
        Ok(())
    }

    /// Writes a record behind everything before it.
    fn emit(&mut self, record: &Record, source: Source<'_>) -> Result<(), DataError> {
        self.write_zero_run()?;
        self.write(record, source)
    }

    fn write(&mut self, record: &Record, source: Source<'_>) -> Result<(), DataError> {
        let (slot, filled) = self.room_for(HEADER_BYTES + record.body_len() + TAG_BYTES)?;
        let buffer = self.kit.link.slot_mut(slot).get_mut(filled..).unwrap_or_default();
        let len = self.kit.sealer.seal(record, source, buffer)?;
        let room = buffer.len() - len;
        self.kit.gauge.records.add(1);
        self.kit.gauge.wire_bytes.add(len as u64);
        self.sent_bytes += len as u64;
        self.open = Some((slot, filled + len));
        if room < ROOM_MIN { self.ship() } else { Ok(()) }
    }

    /// The open slot, with room for so many bytes; how far it is filled.
    fn room_for(&mut self, len: usize) -> Result<(usize, usize), DataError> {
        if let Some((slot, filled)) = self.open {
            if self.kit.link.slot_mut(slot).len() >= filled + len {
                return Ok((slot, filled));
            }
            self.ship()?;
        }
        loop {
            if let Some(slot) = self.kit.link.free_slot() {
                self.open = Some((slot, 0));
                return Ok((slot, 0));
            }
            self.wait()?;
        }
    }

    /// Sends everything that is gathered.
    pub(crate) fn settle(&mut self) -> Result<(), DataError> {
        self.write_zero_run()?;
        self.ship()
    }

    /// Hands the open slot to the link, within the window and the rate.
    fn ship(&mut self) -> Result<(), DataError> {
        let Some((slot, filled)) = self.open.take().filter(|(_, filled)| *filled > 0) else { return Ok(()) };
        while self.sent_bytes.saturating_sub(self.credit.bytes) > self.window {
            self.wait()?;
        }
        let placed = usize::try_from(std::mem::take(&mut self.untold)).unwrap_or(usize::MAX);
        self.pace(filled.saturating_add(placed))?;
        let number = self.kit.number;
        self.kit.link.submit(slot, filled).map_err(|trouble| self.blame(trouble.on_lane(number)))?;
        self.take_credit()
    }

    /// After `stop`, every link error is the stop.
    fn blame(&self, error: DataError) -> DataError {
        if self.kit.fate.is_stopped() { self.kit.fate.cause() } else { error }
    }

    fn pace(&mut self, bytes: usize) -> Result<(), DataError> {
        let rate = self.rate.load(Ordering::Relaxed);
        if rate == 0 {
            return Ok(());
        }
        let start = self.kit.gauge.now();
        let due = start + self.pacer.book(start, bytes as u64, rate);
        loop {
            let left = due.saturating_sub(self.kit.gauge.now());
            if left.is_zero() {
                return Ok(());
            }
            self.kit.gauge.waiting(|| std::thread::sleep(left.min(TICK)));
            self.kit.progress(Duration::ZERO)?;
            self.take_credit()?;
        }
    }

    /// Waits for the link to move. A peer that takes in nothing for too long is given up.
    fn wait(&mut self) -> Result<(), DataError> {
        let before = (self.credit, self.kit.link.unsent());
        let start = self.kit.gauge.now();
        loop {
            let moved = self.kit.progress(TICK)?;
            self.take_credit()?;
            if moved || (self.credit, self.kit.link.unsent()) != before {
                return Ok(());
            }
            if self.kit.gauge.now().saturating_sub(start) > STALL_MAX {
                return Err(DataError::LinkLost { lane: self.kit.number, fault: LinkFault::Stalled });
            }
        }
    }

    fn take_credit(&mut self) -> Result<(), DataError> {
        let lane = self.kit.number;
        self.take_records().map_err(|fault| DataError::PeerMisbehaved { lane, fault })
    }

    fn take_records(&mut self) -> Result<(), FrameFault> {
        let (link, opener) = (&mut self.kit.link, &mut self.kit.opener);
        while let Some(framed) = first_record(link.arrived(), opener.tag_bytes())? {
            opener.open(&framed, link.arrived())?;
            let Record::Credit(credit) = framed.record else {
                return Err(FrameFault::Unexpected(framed.record.kind()));
            };
            let sealed = self.kit.sealer.records();
            let grows = credit.records >= self.credit.records && credit.bytes >= self.credit.bytes;
            if !grows || credit.records > sealed || credit.bytes > self.sent_bytes {
                return Err(FrameFault::BadCredit);
            }
            self.credit = credit;
            link.consume(framed.len);
        }
        Ok(())
    }
}

#[expect(
    clippy::large_enum_variant,
    reason = "an order passes through once, and a box would be an allocation"
)]
enum Rest {
    Work(Order),
    Idle,
    Over,
}

#[expect(
    clippy::large_enum_variant,
    reason = "an order passes through once, and a box would be an allocation"
)]
enum Woken {
    Order(Order),
    State(StateOrder),
    Over,
    Late,
}
