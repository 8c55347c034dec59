//! The raw cost of a lane's parts, for the benches: the same work without the lane around it.
//!
//! ```text
//!   scan    zero-page search over guest memory            seal    AES-GCM over guest memory, nothing else
//!   bare    one io_uring loop, one buffer, no records     page    the whole sending lane into a link that discards
//!   lane    Sender to Receiver over the same kind of connection as `bare`
//! ```
//!
//! A pair of these in one run gives a ratio that means something; a single figure does not. Each returns what it
//! moved and how long that took, and asserts nothing.

use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::never;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use crate::error::{DataError, LinkFault};
use crate::frame::{ChunkRecord, HEADER_BYTES, RECORD_BYTES_MAX, Record};
use crate::guest_ram::{Access, GuestRam, RamFile};
use crate::lane::{Crew, LaneEnd, LaneKeys};
use crate::layout::{RamBlock, RamLayout};
use crate::limits::{RECEIVE_BYTES, SEND_SLOTS, SLOT_BYTES};
use crate::link::ring::{Done, Ring};
use crate::link::tcp::TcpLink;
use crate::link::zero_copy::SendHow;
use crate::link::{Breaker, Link, LinkPlan, LinkTrouble};
use crate::page::{ByteLen, CHUNK_BYTES, CHUNK_PAGES, ChunkIndex, PAGE_BYTES, PageIndex};
use crate::page_set::PageSet;
use crate::receive::Receiver;
use crate::seal::{Cipher, LaneKey, Sealer, Source};
use crate::send::body::BodyMaker;
use crate::send::lane::{Batch, Order, SendLane};
use crate::send::{Compression, SEND_LINK, SendPlan, Sender};

/// What was moved, and how long it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Bytes of pages (or, for `bare`, of the stream).
    pub bytes: u64,
    /// Wall time, set-up not counted.
    pub elapsed: Duration,
    /// CPU time of this whole process in that time, both ends together.
    pub cpu: Duration,
}

impl Measured {
    /// Bytes per nanosecond, which is GB/s.
    pub fn gb_per_s(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_nanos().max(1) as f64
    }

    /// CPU time for each GiB moved.
    pub fn cpu_s_per_gib(&self) -> f64 {
        self.cpu.as_secs_f64() * (1_u64 << 30) as f64 / self.bytes.max(1) as f64
    }
}

/// CPUs to pin the two ends to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cpus {
    /// The sending end's.
    pub sender: Option<usize>,
    /// The receiving end's.
    pub receiver: Option<usize>,
}

fn pin(cpu: Option<usize>) {
    if let Some(id) = cpu {
        core_affinity::set_for_current(core_affinity::CoreId { id });
    }
}

fn process_cpu() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[expect(clippy::disallowed_methods, reason = "measures")]
fn timed(bytes: u64, work: impl FnOnce() -> Result<(), DataError>) -> Result<Measured, DataError> {
    let (start, cpu) = (Instant::now(), process_cpu());
    work()?;
    Ok(Measured { bytes, elapsed: start.elapsed(), cpu: process_cpu().saturating_sub(cpu) })
}

fn chunks(ram: &GuestRam) -> impl Iterator<Item = (ChunkIndex, u64)> + '_ {
    (0..ram.layout().chunk_count())
        .map(|chunk| (ChunkIndex(chunk), ram.layout().valid_pages(ChunkIndex(chunk))))
}

/// Two connected TCP streams on loopback.
pub fn loopback() -> Result<(TcpStream, TcpStream), DataError> {
    let pair = || {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        Ok((near, listener.accept()?.0))
    };
    pair().map_err(|error: std::io::Error| DataError::HostRefused {
        service: "connect to itself",
        fix: "bring up the loopback interface",
        errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
    })
}

/// Searches all of guest memory for zero pages.
pub fn scan(ram: &GuestRam) -> Result<Measured, DataError> {
    let mut data = 0;
    let measured = timed(ram.layout().total_bytes().0, || {
        data = chunks(ram).map(|(chunk, pages)| ram.data_pages(chunk, pages).count_ones()).sum::<u32>();
        Ok(())
    });
    std::hint::black_box(data);
    measured
}

/// Seals all of guest memory with AES-GCM, one record a chunk, into one buffer, and does nothing else.
pub fn seal(ram: &GuestRam, cipher: Cipher) -> Result<Measured, DataError> {
    let mut sealer = Sealer::new(cipher, key(cipher, 1))?;
    let mut buffer = vec![0; RECORD_BYTES_MAX];
    timed(ram.layout().total_bytes().0, || {
        for (chunk, pages) in chunks(ram) {
            let body_len = pages.count_ones() * 4096;
            let record = Record::Chunk(ChunkRecord {
                chunk,
                present: pages,
                data: pages,
                body_len,
                compressed: false,
            });
            sealer.seal(&record, Source::Guest { ram, chunk, pages }, &mut buffer)?;
        }
        Ok(())
    })
}

/// The same bytes out of one hot private buffer: what the cipher does when memory costs nothing.
pub fn seal_hot(bytes: u64, cipher: Cipher) -> Result<Measured, DataError> {
    let mut sealer = Sealer::new(cipher, key(cipher, 1))?;
    let mut buffer = vec![0; RECORD_BYTES_MAX];
    let record = Record::State { stream: 0, len: 262_144 };
    let rounds = bytes.div_ceil(CHUNK_BYTES as u64);
    timed(rounds * CHUNK_BYTES as u64, || {
        (0..rounds).try_for_each(|_| sealer.seal(&record, Source::InPlace, &mut buffer).map(|_| ()))
    })
}

/// The whole sending lane over all of guest memory (zero search, framing, sealing, slots) into a link that
/// discards, on this thread.
pub fn page(ram: &Arc<GuestRam>, cipher: Cipher) -> Result<Measured, DataError> {
    let bytes = ram.layout().total_bytes().0;
    let end = LaneEnd { link: Box::new(NullLink::default()), keys: keys(cipher, 1, 2), cpu: None };
    let (ram, outcome) = (Arc::clone(ram), Arc::new(std::sync::Mutex::new(None)));
    let told = Arc::clone(&outcome);
    let mut crew = Crew::muster(vec![end], cipher, SEND_LINK, move |_| {
        let (ram, told) = (Arc::clone(&ram), Arc::clone(&told));
        move |kit| {
            let body = BodyMaker::new(Compression::Off, None, Arc::default())?;
            let mut lane =
                SendLane::new(kit, Arc::clone(&ram), body, Arc::new(AtomicU64::new(0)), u64::MAX, never());
            let measured = timed(bytes, || sweep(&mut lane, &ram))?;
            if let Ok(mut told) = told.lock() {
                *told = Some(measured);
            }
            Ok(())
        }
    })?;
    crew.join();
    let measured = outcome.lock().ok().and_then(|measured| *measured);
    measured.ok_or_else(|| crew.fate.cause())
}

fn sweep(lane: &mut SendLane, ram: &GuestRam) -> Result<(), DataError> {
    let mut batch = Batch::EMPTY;
    for (chunk, pages) in chunks(ram) {
        if batch.push(chunk, pages) {
            lane.obey(Order::Pages(std::mem::replace(&mut batch, Batch::EMPTY)))?;
        }
    }
    lane.obey(Order::Pages(batch))?;
    lane.settle()
}

/// Sends `bytes` through one TCP connection by a bare io_uring loop: one buffer of `piece` bytes at a time, no
/// records, no pages, no credits; received into a ring and thrown away.
pub fn bare(bytes: u64, piece: usize, cpus: Cpus) -> Result<Measured, DataError> {
    let (near, far) = loopback()?;
    let rounds = bytes.div_ceil(piece as u64);
    let bytes = rounds * piece as u64;
    let receiving = thread::spawn(move || {
        pin(cpus.receiver);
        bare_receive(&far, bytes)
    });
    let sending = thread::spawn(move || {
        pin(cpus.sender);
        bare_send(&near, rounds, piece).map(|()| near)
    });
    timed(bytes, || {
        let sent = sending.join().map_err(|_| DataError::Bug("a probe panicked"))?;
        let received = receiving.join().map_err(|_| DataError::Bug("a probe panicked"))?;
        sent.and(received).map_err(|trouble| trouble.on_lane(0))
    })
}

fn bare_send(stream: &TcpStream, rounds: u64, piece: usize) -> Result<(), LinkTrouble> {
    let plan = LinkPlan { send_slots: 1, slot_bytes: piece, receive_bytes: PAGE_BYTES };
    let mut ring = Ring::new(stream.as_fd(), plan)?;
    ring.slot_mut(0).fill(0x5a);
    for _ in 0..rounds {
        let mut sent = 0;
        while sent < piece {
            ring.push_send(0, sent, piece - sent, SendHow::Copy)?;
            sent += finish(&mut ring)?;
        }
    }
    Ok(())
}

fn bare_receive(stream: &TcpStream, bytes: u64) -> Result<(), LinkTrouble> {
    let plan = LinkPlan { send_slots: 1, slot_bytes: PAGE_BYTES, receive_bytes: RECEIVE_BYTES };
    let mut ring = Ring::new(stream.as_fd(), plan)?;
    let mut left = bytes;
    while left > 0 {
        ring.push_receive()?;
        let got = finish(&mut ring)?;
        ring.consume(got);
        left = left.saturating_sub(got as u64);
    }
    Ok(())
}

/// Waits for the one operation in flight.
fn finish(ring: &mut Ring) -> Result<usize, LinkTrouble> {
    loop {
        ring.enter(Duration::from_secs(1))?;
        match ring.reap() {
            Some(Done::Send { outcome, .. } | Done::Receive { outcome }) => {
                return outcome.map_err(|errno| LinkTrouble::Lost(LinkFault::Failed(errno)));
            }
            Some(Done::Released { .. }) | None => {}
        }
    }
}

/// Sends all of `source` to `target` through one lane over TCP on loopback, from the first order to the last
/// credit.
pub fn lane(
    source: &Arc<GuestRam>,
    target: &Arc<GuestRam>,
    cipher: Cipher,
    cpus: Cpus,
) -> Result<Measured, DataError> {
    let (near, far) = loopback()?;
    let near = LaneEnd { link: Box::new(TcpLink::new(near)), keys: keys(cipher, 1, 2), cpu: cpus.sender };
    let far = LaneEnd { link: Box::new(TcpLink::new(far)), keys: keys(cipher, 2, 1), cpu: cpus.receiver };
    let (_receiver, _state) = Receiver::start(Arc::clone(target), vec![far], cipher)?;
    let plan = SendPlan { cipher, compression: Compression::Off, keep_hashes: false, rate_limit: None };
    let mut sender = Sender::start(Arc::clone(source), vec![near], plan)?;
    let all = PageSet::full(source.layout());
    timed(source.layout().total_bytes().0, || {
        sender.send(&all, &mut || true)?;
        sender.flush()
    })
}

/// Sends one page and waits until it is taken in, `times` times over, through one lane over TCP on loopback: what
/// the last pages of a blackout cost beside their bytes.
pub fn round_trips(times: u32, cipher: Cipher, cpus: Cpus) -> Result<Measured, DataError> {
    let (near, far) = loopback()?;
    let near = LaneEnd { link: Box::new(TcpLink::new(near)), keys: keys(cipher, 1, 2), cpu: cpus.sender };
    let far = LaneEnd { link: Box::new(TcpLink::new(far)), keys: keys(cipher, 2, 1), cpu: cpus.receiver };
    let (source, target) = (one_page()?, one_page()?);
    let (_receiver, _state) = Receiver::start(target, vec![far], cipher)?;
    let plan = SendPlan { cipher, compression: Compression::Off, keep_hashes: false, rate_limit: None };
    let all = PageSet::full(source.layout());
    let mut sender = Sender::start(source, vec![near], plan)?;
    timed(u64::from(times) * PAGE_BYTES as u64, || {
        (0..times).try_for_each(|_| sender.send(&all, &mut || true).and_then(|_| sender.flush()))
    })
}

fn one_page() -> Result<Arc<GuestRam>, DataError> {
    let refused = |errno| DataError::HostRefused { service: "make a page", fix: "free some memory", errno };
    let file = memfd_create("vmferry-probe", MemfdFlags::CLOEXEC).map_err(refused)?;
    ftruncate(&file, PAGE_BYTES as u64).map_err(refused)?;
    let block = RamBlock { name: "page".into(), len: ByteLen(PAGE_BYTES as u64), page_bytes: 4096 };
    let layout = RamLayout::new(vec![block]).map_err(|_| DataError::Bug("one page is no layout"))?;
    let ram = GuestRam::map(layout, vec![RamFile { file: file.into(), offset: 0 }], Access::ReadWrite)?;
    ram.write_page(PageIndex(0), &[0x5a; PAGE_BYTES])?;
    Ok(Arc::new(ram))
}

fn key(cipher: Cipher, byte: u8) -> Option<LaneKey> {
    (cipher != Cipher::Plain).then(|| LaneKey::from_bytes([byte; 32]))
}

fn keys(cipher: Cipher, outbound: u8, inbound: u8) -> Option<LaneKeys> {
    Some(LaneKeys { outbound: key(cipher, outbound)?, inbound: key(cipher, inbound)? })
}

/// A link whose other end is nowhere: slots are free again at once, and nothing ever arrives.
#[derive(Default)]
struct NullLink {
    slots: Vec<Vec<u8>>,
    next: usize,
}

struct NullBreaker;

impl Breaker for NullBreaker {
    fn sever(&self) {}
}

impl Link for NullLink {
    fn prepare(&mut self, plan: LinkPlan) -> Result<(), LinkTrouble> {
        self.slots = vec![vec![1; plan.slot_bytes]; plan.send_slots];
        Ok(())
    }

    fn breaker(&self) -> Result<Box<dyn Breaker>, LinkTrouble> {
        Ok(Box::new(NullBreaker))
    }

    fn free_slot(&self) -> Option<usize> {
        Some(self.next)
    }

    fn slot_mut(&mut self, slot: usize) -> &mut [u8] {
        self.slots.get_mut(slot).map_or(&mut [], Vec::as_mut_slice)
    }

    fn submit(&mut self, slot: usize, _len: usize) -> Result<(), LinkTrouble> {
        // As over TCP while the socket has room: the slot is free again, and still in the cache.
        self.next = slot;
        Ok(())
    }

    fn unsent(&self) -> usize {
        0
    }

    fn arrived(&mut self) -> &mut [u8] {
        &mut []
    }

    fn consume(&mut self, _len: usize) {}

    fn expect_bytes(&mut self, _more: usize) {}

    fn progress(&mut self, _wait: Duration) -> Result<bool, LinkTrouble> {
        Ok(false)
    }

    fn name(&self) -> &'static str {
        "nowhere"
    }
}

const _: () = assert!(HEADER_BYTES + CHUNK_PAGES * PAGE_BYTES <= SLOT_BYTES && SEND_SLOTS > 1);
