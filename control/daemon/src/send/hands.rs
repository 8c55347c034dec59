//! The source's hands: what the machine's actions do to the guest, the tracker and the lanes.
//!
//! Nothing is decided here. Each function does one action and says how it went; the order comes from the session.
//! What must never happen: a dirty bit taken from the log and forgotten. A scan's pages are in the ledger, or with
//! the sender, or (after an error) every page is dirty.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender as Post, bounded};
use vmferry_datapath::{
    ByteLen, DirtyLog, GuestRam, HotLedger, LaneTotals, Meter, PageCount, PageSet, Sender,
};
use vmferry_guest::{GuestError, SourceGuest};
use vmferry_session::{DeviceDrain, DeviceReport, LastReport, RoundReport};

use super::devices::DevicePumps;
use super::io_horizon::IoHorizon;

/// State blocks between the VMM's saver and lane 0: small, because lane 0 takes them as fast as they come.
const STATE_BLOCKS_MAX: usize = 16;
/// Bytes a block: a state of 300 KB is a handful.
const STATE_BLOCK_BYTES: usize = 64 * 1024;

/// What stopped an action.
#[derive(Debug)]
pub(super) enum Stopped {
    /// The machine asked to interrupt.
    Interrupted,
    /// A lane.
    Lane(vmferry_datapath::DataError),
    /// The guest.
    Guest(GuestError),
    /// The tracker, in the blackout, where «every page is dirty» would be no answer.
    Tracker(String),
}

impl From<vmferry_datapath::DataError> for Stopped {
    fn from(error: vmferry_datapath::DataError) -> Self {
        Self::Lane(error)
    }
}

impl From<GuestError> for Stopped {
    fn from(error: GuestError) -> Self {
        Self::Guest(error)
    }
}

/// What saving the VMM's state came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Saved {
    pub(super) bytes: ByteLen,
    pub(super) took: Duration,
    /// When it was complete: the guest's clocks were read a moment before.
    pub(super) at: Instant,
}

/// Everything that the source side holds of a guest while it moves.
pub(super) struct SourceHands {
    pub(super) guest: Box<dyn SourceGuest>,
    ram: Arc<GuestRam>,
    log: Option<Box<dyn DirtyLog>>,
    sender: Option<Sender>,
    devices: DevicePumps,
    ledger: HotLedger,
    horizon: Option<IoHorizon>,
    scan_max: Duration,
    scanned_at: Option<Instant>,
    tracker: Option<&'static str>,
    meter: Option<Meter>,
    notes: Vec<String>,
}

impl SourceHands {
    /// Takes the guest.
    #[must_use]
    pub(super) fn new(guest: Box<dyn SourceGuest>) -> Self {
        let ram = guest.ram();
        let chunks = ram.layout().chunk_count();
        let horizon = (!guest.direct_io_nodes().is_empty()).then(|| IoHorizon::new(chunks));
        let mut notes = Vec::new();
        if horizon.is_some() {
            notes.push(format!(
                "disks with O_DIRECT ({}): pages seen dirty in the last 30 s are compared again in the blackout",
                guest.direct_io_nodes().join(", ")
            ));
        }
        let ledger = HotLedger::with_chunks(chunks);
        Self {
            guest,
            ram,
            log: None,
            sender: None,
            devices: DevicePumps::default(),
            ledger,
            horizon,
            scan_max: Duration::ZERO,
            scanned_at: None,
            tracker: None,
            meter: None,
            notes,
        }
    }

    /// Whether lanes must remember a hash of every page.
    #[must_use]
    pub(super) fn keeps_hashes(&self) -> bool {
        self.horizon.is_some()
    }

    /// The guest's memory.
    #[must_use]
    pub(super) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Hands the lanes over.
    pub(super) fn take_sender(&mut self, sender: Sender) {
        self.sender = Some(sender);
    }

    /// What the lanes did so far, or had done when they were closed.
    #[must_use]
    pub(super) fn meter(&self) -> Option<Meter> {
        self.sender.as_ref().map(Sender::meter).or_else(|| self.meter.clone())
    }

    /// The slowest scan so far.
    #[must_use]
    pub(super) fn scan_max(&self) -> Duration {
        self.scan_max
    }

    /// What the operator should know: the guest's own notes, which grow during a move, and ours.
    pub(super) fn notes(&self) -> impl Iterator<Item = &String> {
        self.guest.description().notes.iter().chain(&self.notes)
    }

    /// What tracks the guest's writes.
    #[must_use]
    pub(super) fn tracker_name(&self) -> Option<&'static str> {
        self.tracker
    }

    /// Starts to track every writer.
    pub(super) fn attach(&mut self) -> Result<(), Stopped> {
        let log = self.guest.attach()?;
        self.tracker = Some(log.name());
        self.log = Some(log);
        Ok(())
    }

    /// What every passed-through device would add to the blackout now.
    pub(super) fn device_reports(&self) -> Vec<DeviceReport> {
        self.devices.reports(self.guest.devices())
    }

    /// What left of every device's state so far.
    pub(super) fn device_drains(&self) -> Vec<DeviceDrain> {
        self.devices.drained()
    }

    /// After the last pages: returns when every device's state has left, and how long that took.
    pub(super) fn drain_devices(
        &mut self,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<(Vec<DeviceDrain>, Duration), Stopped> {
        let began = clock();
        let drained = self.devices.drain(go_on)?;
        Ok((drained, began.elapsed()))
    }

    /// One round while the guest runs.
    pub(super) fn copy_round(
        &mut self,
        round: u32,
        now: Duration,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<RoundReport, Stopped> {
        let empty_flush = if round == 1 { self.flush_empty(go_on)? } else { Duration::ZERO };
        let since_last_scan = self.scanned_at.map_or(Duration::ZERO, |at| at.elapsed());
        let (dirty, scan) = self.scan_or_all(now);
        let mut report = RoundReport {
            round,
            since_last_scan,
            scan,
            dirty: dirty.count(),
            empty_flush,
            ..RoundReport::default()
        };
        let due = if round == 1 { PageSet::full(self.ram.layout()) } else { self.ledger.advance(dirty) };
        if round == 1 {
            report.dirty = due.count();
        }
        let (send, zero) = self.without_holes(due)?;
        let (wire_before, zero_before) = self.counted();
        let began = clock();
        let sender = self.sender.as_mut().ok_or_else(no_lanes)?;
        if round == 1 {
            self.devices = DevicePumps::start(self.guest.as_mut(), sender)?;
        }
        sender.send_zero(&zero)?;
        let sent = sender.send(&send, go_on)? && sender.flush_while(go_on)?;
        let sending = began.elapsed();
        if !sent || !self.devices.settle(go_on)? {
            self.ledger.put_back(&send);
            self.ledger.put_back(&zero);
            return Err(Stopped::Interrupted);
        }
        report.sending = sending;
        report.sent = send.count().plus(zero.count());
        report.held = self.ledger.held_count();
        report.pinned = self.guest.pinned().count();
        let (wire, zero) = self.counted();
        report.wire = ByteLen(wire - wire_before);
        report.zero = PageCount(zero - zero_before);
        Ok(report)
    }

    /// A round trip of lanes that carry nothing yet, told apart from what their pages will take. Before the first scan, so
    /// that nothing is on its way when it is interrupted.
    fn flush_empty(&mut self, go_on: &mut dyn FnMut() -> bool) -> Result<Duration, Stopped> {
        let began = clock();
        let sender = self.sender.as_mut().ok_or_else(no_lanes)?;
        if sender.flush_while(go_on)? { Ok(began.elapsed()) } else { Err(Stopped::Interrupted) }
    }

    /// Of pages that are due, those that hold data, and those that are holes: zero, and not to be read, because a read
    /// would allocate them. Called after a scan, which protected every page: one that appears in between is dirty again.
    /// Not in the blackout, where asking would cost more than a hole that is read: the source's memory ends there.
    fn without_holes(&self, due: PageSet) -> Result<(PageSet, PageSet), Stopped> {
        let mut data = self.ram.populated().map_err(GuestError::from)?;
        data.intersect_with(&due);
        let mut holes = due;
        holes.subtract(&data);
        Ok((data, holes))
    }

    /// Stops the guest.
    pub(super) fn pause(&mut self) -> Result<(), GuestError> {
        self.devices.pausing();
        self.guest.pause()
    }

    /// The last pages and the device state, side by side: the VMM saves while the lanes send.
    pub(super) fn send_last_and_state(
        &mut self,
        now: Duration,
        go_on: &mut dyn FnMut() -> bool,
    ) -> (Result<LastReport, Stopped>, Result<Saved, Stopped>) {
        let (last, mut report) = match self.last_pages(now) {
            Ok(last) => last,
            Err(stopped) => return (Err(stopped), Err(Stopped::Interrupted)),
        };
        let began = clock();
        let (wire_before, _) = self.counted();
        let Some(sender) = self.sender.as_mut() else { return (Err(no_lanes()), Err(Stopped::Interrupted)) };
        let guest = &mut self.guest;
        let (post, blocks) = bounded(STATE_BLOCKS_MAX);
        let (sent, saved) = std::thread::scope(|scope| {
            let saver = scope.spawn(move || save(guest.as_mut(), post));
            let sent = sender
                .send(&last, go_on)
                .map_err(Stopped::from)
                .and_then(|whole| if whole { Ok(began.elapsed()) } else { Err(Stopped::Interrupted) });
            let relayed =
                sent.is_ok().then(|| blocks.iter().try_for_each(|block: Vec<u8>| sender.send_state(&block)));
            // With nobody to take its blocks the saver stops with an error, instead of waiting for ever.
            drop(blocks);
            let saved =
                saver.join().unwrap_or_else(|_| Err(GuestError::Bug("the state saver panicked".into())));
            let saved = match relayed {
                Some(Ok(())) => saved
                    .map_err(Stopped::from)
                    .and_then(|saved| sender.end_state().map(|()| saved).map_err(Stopped::from)),
                Some(Err(lane)) => Err(Stopped::Lane(lane)),
                None => saved.map_err(Stopped::from),
            };
            (sent, saved)
        });
        report.wire = ByteLen(self.counted().0 - wire_before);
        let sent = sent.map(|sending| LastReport { sending, ..report });
        (sent, saved)
    }

    /// What saving the state wrote, then the end of every lane.
    pub(super) fn finish_lanes(
        &mut self,
        now: Duration,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Vec<LaneTotals>, Stopped> {
        let (mut dirty, _) = self.scan_exactly(now)?;
        // Asked last: the look was begun when the guest was paused, and has had the time of the save.
        let writers = self.guest.new_writers()?;
        if !writers.is_empty() {
            dirty.union_with(&self.guest.pinned());
            self.notes.push(format!(
                "{} began to write guest memory during the move: its pages travelled in the blackout",
                writers.join(", ")
            ));
        }
        let sender = self.sender.as_mut().ok_or_else(no_lanes)?;
        if !sender.send(&dirty, go_on)? {
            return Err(Stopped::Interrupted);
        }
        Ok(sender.finish()?)
    }

    /// The digest of all memory, as text; the guest is paused.
    pub(super) fn digest(&self) -> Result<String, Stopped> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(self.ram.digest(cpus).map_err(GuestError::from)?.to_string())
    }

    /// Lets the guest run again.
    pub(super) fn resume(&mut self) -> Result<(), GuestError> {
        self.devices.stop();
        self.guest.resume()
    }

    /// Drops the lanes as they are.
    pub(super) fn close_lanes(&mut self) {
        self.devices.stop();
        if let Some(mut sender) = self.sender.take() {
            self.meter = Some(sender.meter());
            sender.abort();
        }
    }

    /// Leaves no trace in the VMM.
    pub(super) fn detach(&mut self) {
        self.devices.stop();
        self.log = None;
        self.guest.detach();
    }

    /// Everything that must travel now that nobody writes.
    fn last_pages(&mut self, now: Duration) -> Result<(PageSet, LastReport), Stopped> {
        let (mut last, scan) = self.scan_exactly(now)?;
        last.union_with(&self.ledger.take_all());
        let pinned = self.guest.pinned();
        last.union_with(&pinned);
        if let (Some(horizon), Some(sender)) = (&self.horizon, &self.sender) {
            let mut suspects = horizon.suspects();
            suspects.subtract(&last);
            suspects.intersect_with(&self.ram.populated().map_err(GuestError::from)?);
            last.union_with(&sender.changed_since_sent(&suspects));
        }
        let report =
            LastReport { scan, pages: last.count(), pinned: pinned.count(), ..LastReport::default() };
        Ok((last, report))
    }

    /// Harvests the log; after an error every page is dirty, and the note says so.
    fn scan_or_all(&mut self, now: Duration) -> (PageSet, Duration) {
        match self.scan_exactly(now) {
            Ok(found) => found,
            Err(stopped) => {
                self.notes.push(format!("a dirty scan failed and every page was sent again: {stopped:?}"));
                (PageSet::full(self.ram.layout()), Duration::ZERO)
            }
        }
    }

    fn scan_exactly(&mut self, now: Duration) -> Result<(PageSet, Duration), Stopped> {
        let began = clock();
        let mut dirty = PageSet::new(self.ram.layout());
        let log = self.log.as_mut().ok_or_else(|| Stopped::Tracker("the guest is not attached".into()))?;
        log.collect(&mut dirty).map_err(|e| Stopped::Tracker(e.to_string()))?;
        if let Some(horizon) = &mut self.horizon {
            horizon.saw(&dirty, now);
        }
        self.scanned_at = Some(began);
        let took = began.elapsed();
        self.scan_max = self.scan_max.max(took);
        Ok((dirty, took))
    }

    /// Bytes on the wire and zero pages so far.
    fn counted(&self) -> (u64, u64) {
        self.sender.as_ref().map_or((0, 0), |sender| {
            let meter = sender.meter();
            (meter.wire_bytes, meter.zero_pages)
        })
    }
}

/// Saves into blocks; how long it took is this thread's to say.
fn save(guest: &mut dyn SourceGuest, post: Post<Vec<u8>>) -> Result<Saved, GuestError> {
    let began = clock();
    let mut blocks = StateBlocks { post, block: Vec::with_capacity(STATE_BLOCK_BYTES) };
    let bytes = guest.save_state(&mut blocks)?;
    let at = clock();
    blocks.flush().map_err(GuestError::Relay)?;
    Ok(Saved { bytes, took: began.elapsed(), at })
}

fn no_lanes() -> Stopped {
    Stopped::Lane(vmferry_datapath::DataError::Bug("pages were to be sent before the lanes were open"))
}

#[expect(clippy::disallowed_methods, reason = "a driver measures what its hands do")]
fn clock() -> Instant {
    Instant::now()
}

/// Collects what the VMM writes into blocks for lane 0.
struct StateBlocks {
    post: Post<Vec<u8>>,
    block: Vec<u8>,
}

impl Write for StateBlocks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = STATE_BLOCK_BYTES - self.block.len();
        let taken = bytes.len().min(room);
        self.block.extend_from_slice(&bytes[..taken]);
        if self.block.len() == STATE_BLOCK_BYTES {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        let block = std::mem::replace(&mut self.block, Vec::with_capacity(STATE_BLOCK_BYTES));
        self.post.send(block).map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the lanes were closed"))
    }
}
