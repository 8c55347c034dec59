//! One receiving lane: bytes in, pages written.
//!
//! ```text
//!   link ─► arrived bytes ─► whole record? ─► open in place ─► check against the layout ─► write to the guest
//!                                                        credit ─► link
//! ```
//!
//! What must never happen: a byte that was not authenticated reaching the guest. A record is opened in the link's
//! private buffer; only when its tag was right, and all its pages exist, is it copied.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use zstd::bulk::Decompressor;

use super::StatePipes;
use super::state_pipe::StatePipe;
use crate::error::{DataError, LinkFault};
use crate::frame::{ChunkRecord, Credit, FrameFault, Framed, Kind, Record, first_record, missing};
use crate::guest_ram::{GuestRam, RamError};
use crate::lane::LaneKit;
use crate::limits::{CREDIT_EVERY_BYTES, IDLE};
use crate::page::{CHUNK_BYTES, ChunkIndex};
use crate::page_set::PageSet;
use crate::seal::Source;

/// Which pages of the target may hold something: one word a chunk, for the chunk's lane and the urgent path. Each page of it
/// is looked at and set by one of them only.
pub(crate) struct Written(Vec<AtomicU64>);

impl Written {
    pub(crate) fn new(populated: &PageSet) -> Written {
        Written(populated.words().iter().map(|word| AtomicU64::new(*word)).collect())
    }

    fn word(&self, chunk: ChunkIndex) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(chunk.0).ok()?)
    }
}

/// How a lane ended: what it took in. Set once.
pub(crate) type Ending = std::sync::OnceLock<Credit>;

/// A lane at work.
pub(crate) struct ReceiveLane {
    kit: LaneKit,
    ram: Arc<GuestRam>,
    written: Arc<Written>,
    ending: Arc<Ending>,
    states: StatePipes,
    decompressor: Decompressor<'static>,
    scratch: Box<[u8]>,
    taken: Credit,
    credited: Credit,
    /// The sender asked for credit.
    asked: bool,
}

impl ReceiveLane {
    pub(crate) fn new(
        kit: LaneKit,
        ram: Arc<GuestRam>,
        written: Arc<Written>,
        ending: Arc<Ending>,
        states: StatePipes,
    ) -> Result<ReceiveLane, DataError> {
        let decompressor = Decompressor::new().map_err(|_| DataError::HostRefused {
            service: "set up zstd",
            fix: "free some memory",
            errno: rustix::io::Errno::NOMEM,
        })?;
        let scratch = vec![0; CHUNK_BYTES].into_boxed_slice();
        let (taken, credited) = (Credit::default(), Credit::default());
        Ok(ReceiveLane {
            kit,
            ram,
            written,
            ending,
            states,
            decompressor,
            scratch,
            taken,
            credited,
            asked: false,
        })
    }

    /// Takes in records until the transfer is stopped, or the peer closes after the end.
    pub(crate) fn run(mut self) -> Result<(), DataError> {
        loop {
            self.take_all()?;
            self.give_credit()?;
            // Giving credit moves the link, and may have brought a whole record: it must not wait for the next one.
            let (arrived, tag_bytes) = (self.kit.link.arrived(), self.kit.opener.tag_bytes());
            if first_record(arrived, tag_bytes) != Ok(None) {
                continue;
            }
            let short = missing(arrived, tag_bytes);
            self.kit.link.expect_bytes(short);
            match self.kit.progress(IDLE) {
                Ok(_) => {}
                Err(DataError::LinkLost { fault: LinkFault::Closed, .. }) if self.ending.get().is_some() => {
                    return Ok(());
                }
                Err(_) if self.kit.fate.is_stopped() && self.ending.get().is_some() => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn take_all(&mut self) -> Result<(), DataError> {
        let lane = self.kit.number;
        let blame = |fault| DataError::PeerMisbehaved { lane, fault };
        loop {
            let framed = first_record(self.kit.link.arrived(), self.kit.opener.tag_bytes()).map_err(blame)?;
            let Some(framed) = framed else { return Ok(()) };
            if self.kit.fate.is_stopped() {
                return Err(self.kit.fate.cause());
            }
            self.take(&framed)?;
            self.kit.link.consume(framed.len);
            self.taken.records += 1;
            let bytes = framed.len as u64 + framed.record.placed_bytes();
            self.taken.bytes += bytes;
            self.kit.gauge.records.add(1);
            self.kit.gauge.wire_bytes.add(bytes);
            if framed.record == Record::End {
                self.end()?;
            }
            if self.taken.bytes - self.credited.bytes >= CREDIT_EVERY_BYTES {
                self.asked = true;
                self.give_credit()?;
            }
        }
    }

    /// Opens one record and does what it says.
    fn take(&mut self, framed: &Framed) -> Result<(), DataError> {
        let lane = self.kit.number;
        let blame = |fault| DataError::PeerMisbehaved { lane, fault };
        let arrived = self.kit.link.arrived();
        let body = self.kit.opener.open(framed, arrived).map_err(blame)?;
        if self.ending.get().is_some() {
            return Err(blame(FrameFault::Unexpected(framed.record.kind())));
        }
        let target =
            Target { ram: &self.ram, written: &self.written, lane: u64::from(lane), lanes: self.kit.lanes };
        match framed.record {
            Record::Chunk(chunk) => {
                let body = if chunk.compressed {
                    let room = &mut self.scratch[..chunk.plain_len() as usize];
                    expand(&mut self.decompressor, body, room).map_err(blame)?
                } else {
                    body
                };
                target.write_chunk(&chunk, body).map_err(|refusal| refusal.on_lane(lane))?;
                self.kit.gauge.data_pages.add(u64::from(chunk.data.count_ones()));
                self.kit.gauge.zero_pages.add(u64::from((chunk.present & !chunk.data).count_ones()));
            }
            Record::Placed { chunk, present, data } => {
                if !self.kit.link.places() {
                    return Err(blame(FrameFault::Unexpected(Kind::Placed)));
                }
                target.placed(chunk, present, data).map_err(|refusal| refusal.on_lane(lane))?;
                self.kit.gauge.data_pages.add(u64::from(data.count_ones()));
                self.kit.gauge.zero_pages.add(u64::from((present & !data).count_ones()));
            }
            Record::ZeroRun { first, count } => {
                let pages = target.zero_run(first, count).map_err(|refusal| refusal.on_lane(lane))?;
                self.kit.gauge.zero_pages.add(pages);
            }
            Record::State { stream, .. } => {
                let pipe = target.open_pipe(&self.states, stream).map_err(blame)?;
                let mut rest: &[u8] = body;
                self.kit.gauge.state_bytes.add(rest.len() as u64);
                while !rest.is_empty() && !self.kit.fate.is_stopped() {
                    let done = self.kit.gauge.waiting(|| pipe.push(rest));
                    rest = &rest[done..];
                }
            }
            Record::StateEnd { stream } => {
                target.open_pipe(&self.states, stream).map_err(blame)?.end(Ok(()));
            }
            Record::Sync | Record::End => self.asked = true,
            Record::Credit(_) => return Err(blame(FrameFault::Unexpected(Kind::Credit))),
        }
        Ok(())
    }

    /// The lane is complete. A state on it that was not ended never will be.
    fn end(&mut self) -> Result<(), DataError> {
        let cut =
            DataError::PeerMisbehaved { lane: self.kit.number, fault: FrameFault::Unexpected(Kind::End) };
        let lanes = usize::try_from(self.kit.lanes).unwrap_or(usize::MAX);
        for state in self.states.iter().skip(usize::from(self.kit.number)).step_by(lanes) {
            state.end(Err(cut.clone()));
        }
        self.ending.set(self.taken).map_err(|_| DataError::Bug("a lane ended twice"))?;
        self.kit.fate.announce();
        Ok(())
    }

    /// Tells the sender what was taken in, if it is due and a slot is free; else with the next chance.
    fn give_credit(&mut self) -> Result<(), DataError> {
        if !self.asked || self.taken == self.credited {
            return Ok(());
        }
        let Some(slot) = self.kit.link.free_slot() else { return Ok(()) };
        let record = Record::Credit(self.taken);
        let len = self.kit.sealer.seal(&record, Source::InPlace, self.kit.link.slot_mut(slot))?;
        (self.credited, self.asked) = (self.taken, false);
        match self.kit.link.submit(slot, len) {
            // A sender that got what it wanted may close before it reads the last credit.
            Err(_) if self.ending.get().is_some() => Ok(()),
            outcome => outcome.map_err(|trouble| trouble.on_lane(self.kit.number)),
        }
    }
}

fn expand<'a>(
    decompressor: &mut Decompressor<'_>,
    packed: &[u8],
    room: &'a mut [u8],
) -> Result<&'a mut [u8], FrameFault> {
    match decompressor.decompress_to_buffer(packed, room) {
        Ok(len) if len == room.len() => Ok(room),
        Ok(_) | Err(_) => Err(FrameFault::BadCompression),
    }
}

/// Why a record was not written.
pub(crate) enum Refusal {
    Peer(FrameFault),
    Ours(DataError),
}

impl Refusal {
    fn on_lane(self, lane: u16) -> DataError {
        match self {
            Refusal::Peer(fault) => DataError::PeerMisbehaved { lane, fault },
            Refusal::Ours(error) => error,
        }
    }
}

/// The guest as one lane may write it.
struct Target<'a> {
    ram: &'a GuestRam,
    written: &'a Written,
    lane: u64,
    lanes: u64,
}

impl Target<'_> {
    /// A state stream was agreed on, travels on one lane only, and not after its end.
    fn open_pipe<'p>(&self, states: &'p StatePipes, stream: u16) -> Result<&'p StatePipe, FrameFault> {
        let pipe = states.get(usize::from(stream)).ok_or(FrameFault::UnknownStream(stream))?;
        if u64::from(stream) % self.lanes != self.lane {
            return Err(FrameFault::WrongLane);
        }
        if pipe.is_ended() { Err(FrameFault::Unexpected(Kind::State)) } else { Ok(pipe) }
    }

    fn write_chunk(&self, record: &ChunkRecord, body: &[u8]) -> Result<(), Refusal> {
        let chunk = record.chunk;
        if chunk.0 % self.lanes != self.lane {
            return Err(Refusal::Peer(FrameFault::WrongLane));
        }
        if record.present & !self.ram.layout().valid_pages(chunk) != 0 {
            return Err(Refusal::Peer(FrameFault::NoSuchPage));
        }
        self.zero(chunk, record.present & !record.data)?;
        if record.data != 0 {
            let word = self.written.word(chunk).ok_or(Refusal::Peer(FrameFault::NoSuchPage))?;
            done(self.ram.write_pages(chunk, record.data, body))?;
            word.fetch_or(record.data, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Pages that the source's card has written already: from now on they may hold something. Its others are zeroed.
    fn placed(&self, chunk: ChunkIndex, present: u64, data: u64) -> Result<(), Refusal> {
        if chunk.0 % self.lanes != self.lane {
            return Err(Refusal::Peer(FrameFault::WrongLane));
        }
        if present & !self.ram.layout().valid_pages(chunk) != 0 {
            return Err(Refusal::Peer(FrameFault::NoSuchPage));
        }
        self.zero(chunk, present & !data)?;
        let word = self.written.word(chunk).ok_or(Refusal::Peer(FrameFault::NoSuchPage))?;
        word.fetch_or(data, Ordering::Relaxed);
        Ok(())
    }

    /// Zeroes a run of chunks, once it is known that the last of them exists; how many pages those are.
    fn zero_run(&self, first: ChunkIndex, count: u64) -> Result<u64, Refusal> {
        if first.0 % self.lanes != self.lane {
            return Err(Refusal::Peer(FrameFault::WrongLane));
        }
        let span = count.checked_sub(1).and_then(|steps| steps.checked_mul(self.lanes));
        let last = span.and_then(|span| first.0.checked_add(span));
        let last = last.filter(|last| *last < self.ram.layout().chunk_count());
        let last = last.ok_or(Refusal::Peer(FrameFault::NoSuchPage))?;
        let step = usize::try_from(self.lanes).unwrap_or(usize::MAX);
        let mut pages = 0;
        for chunk in (first.0..=last).step_by(step).map(ChunkIndex) {
            let valid = self.ram.layout().valid_pages(chunk);
            self.zero(chunk, valid)?;
            pages += u64::from(valid.count_ones());
        }
        Ok(pages)
    }

    /// Zeroes pages. Those that were never written are zero already, and touching them would allocate them.
    fn zero(&self, chunk: ChunkIndex, pages: u64) -> Result<(), Refusal> {
        let word = self.written.word(chunk).ok_or(Refusal::Peer(FrameFault::NoSuchPage))?;
        let touched = pages & word.load(Ordering::Relaxed);
        if touched == 0 { Ok(()) } else { done(self.ram.zero_pages(chunk, touched)) }
    }
}

fn done(outcome: Result<bool, RamError>) -> Result<(), Refusal> {
    match outcome {
        Ok(true) => Ok(()),
        Ok(false) => Err(Refusal::Ours(DataError::Bug("a checked page did not fit the guest"))),
        Err(error) => Err(Refusal::Ours(DataError::from(error))),
    }
}
