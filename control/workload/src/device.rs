//! A fake device for the simulated world: it stands where a passed-through device would, so that everything around one
//! can be shown and tested without hardware. It speaks to no kernel and is no VFIO device; those are in `vfio`.
//!
//! ```text
//!   running   blocks change by a dice, at a rate; with `pinned` it also writes guest memory that no tracker sees
//!   streaming block, block, … Idle, block …  │ halted │  the blocks left, a trailer with its digest, End
//!   loading   blocks as they come, any number of times each │ trailer: digest right? loaded : refused
//! ```
//!
//! Time comes in as `now`, so it runs under any clock. What must never happen: a state taken for loaded whose digest
//! is not the one that the source had when it stood still.

mod plan;

use std::collections::VecDeque;
use std::time::Duration;

pub use plan::{DevicePlan, DevicePlanError};

use crate::PAGE_BYTES;
use crate::random::mix;

/// One block of state, and what stands in front of it on its way: its number.
const BLOCK_BYTES: usize = PAGE_BYTES;
const RECORD_BYTES: usize = 4 + BLOCK_BYTES;
/// Stands where a block's number would: the trailer follows.
const TRAILER: u32 = u32::MAX;
/// The longest time whose changes are made up for at once: a device that nobody looked at has not gone wild.
const CATCH_UP_MAX: Duration = Duration::from_secs(1);

/// Guest memory as the device writes it: page number within what it pins, and the page.
pub type Dma<'a> = &'a mut dyn FnMut(u64, &[u8; PAGE_BYTES]) -> std::io::Result<()>;

/// What a read of the state stream gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceRead {
    /// The next bytes.
    Bytes(Vec<u8>),
    /// Nothing now; the device still runs.
    Idle,
    /// All was read; the device stands still.
    End,
}

/// A fake device.
#[derive(Debug)]
pub struct FakeDevice {
    plan: DevicePlan,
    state: Vec<u8>,
    /// How often each pinned page was written.
    dma_versions: Vec<u32>,
    dice: u64,
    /// Since when it runs and how many bytes of change it owes.
    running: Option<(Duration, u64)>,
    dirty: Vec<bool>,
    /// Bytes of the stream that were not read yet, and whether the trailer is among them or was.
    pending: VecDeque<u8>,
    trailer_given: bool,
    arriving: Vec<u8>,
    loaded: bool,
}

impl FakeDevice {
    /// A device that stands still.
    #[must_use]
    pub fn new(plan: DevicePlan) -> Self {
        let blocks = usize::try_from(plan.state_bytes).unwrap_or(0) / BLOCK_BYTES;
        let pinned = usize::try_from(plan.pinned_pages()).unwrap_or(0);
        let dice =
            plan.name.bytes().fold(0x9e37, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
        let mut device = Self {
            plan,
            state: vec![0; blocks * BLOCK_BYTES],
            dma_versions: vec![0; pinned],
            dice,
            running: None,
            dirty: vec![true; blocks],
            pending: VecDeque::new(),
            trailer_given: false,
            arriving: Vec::new(),
            loaded: false,
        };
        (0..blocks).for_each(|block| device.change(block));
        device
    }

    /// What it was asked to be.
    #[must_use]
    pub fn plan(&self) -> &DevicePlan {
        &self.plan
    }

    /// It runs from `now` on.
    pub fn run(&mut self, now: Duration) {
        self.running.get_or_insert((now, 0));
    }

    /// What it did until `now`; then it stands still.
    pub fn halt(&mut self, now: Duration, dma: Dma<'_>) -> std::io::Result<()> {
        self.advance(now, dma)?;
        self.running = None;
        Ok(())
    }

    /// What it did until `now`.
    pub fn advance(&mut self, now: Duration, dma: Dma<'_>) -> std::io::Result<()> {
        let Some((since, owed)) = self.running else { return Ok(()) };
        let elapsed = u64::try_from(now.saturating_sub(since).min(CATCH_UP_MAX).as_micros()).unwrap_or(0);
        let mut owed = owed + self.plan.dirty_bytes_per_s.saturating_mul(elapsed) / 1_000_000;
        while owed >= BLOCK_BYTES as u64 {
            owed -= BLOCK_BYTES as u64;
            let block = self.roll(self.dirty.len());
            self.change(block);
            if !self.dma_versions.is_empty() {
                let page = self.roll(self.dma_versions.len());
                self.dma_versions[page] = self.dma_versions[page].wrapping_add(1);
                dma(page as u64, &dma_page(page, self.dma_versions[page]))?;
            }
        }
        self.running = Some((now, owed));
        Ok(())
    }

    /// Begins a stream of the whole state.
    pub fn open(&mut self) {
        self.dirty.fill(true);
        self.pending.clear();
        self.trailer_given = false;
    }

    /// What a stop now would have to move, and what it could be a tenth of a second from now.
    #[must_use]
    pub fn remaining(&self) -> (u64, u64) {
        let blocks = self.dirty.iter().filter(|dirty| **dirty).count();
        let trailer = if self.trailer_given { 0 } else { self.trailer_bytes() };
        let expected = (blocks * RECORD_BYTES + self.pending.len() + trailer) as u64;
        (expected, expected + self.plan.dirty_bytes_per_s / 10)
    }

    /// At most `max` bytes of the stream.
    pub fn read(&mut self, max: usize) -> DeviceRead {
        if self.plan.stop_copy && self.running.is_some() {
            return DeviceRead::Idle;
        }
        while self.pending.len() < max && self.pend_block() {}
        if self.pending.is_empty() && self.running.is_some() {
            return DeviceRead::Idle;
        }
        if self.pending.len() < max && self.running.is_none() && !self.trailer_given {
            self.pend_trailer();
        }
        match self.pending.len().min(max) {
            0 => DeviceRead::End,
            count => DeviceRead::Bytes(self.pending.drain(..count).collect()),
        }
    }

    /// Takes bytes of another device's state in; the sentence says why it does not.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), String> {
        if self.plan.refuses {
            return Err("it was started to refuse every state (:refuse)".into());
        }
        self.loaded = false;
        self.arriving.extend_from_slice(bytes);
        let mut taken = 0;
        while let Some((number, block)) = self.record_at(taken) {
            let start = usize::try_from(number).unwrap_or(usize::MAX).saturating_mul(BLOCK_BYTES);
            let place = self.state.get_mut(start..start.saturating_add(BLOCK_BYTES));
            place.ok_or_else(|| format!("block {number} does not exist here"))?.copy_from_slice(&block);
            taken += RECORD_BYTES;
        }
        self.arriving.drain(..taken);
        if self.arriving.len() > RECORD_BYTES.max(4 + self.trailer_bytes()) {
            return Err("more came than its state has".into());
        }
        Ok(())
    }

    /// All has come: the digest decides.
    pub fn finish(&mut self) -> Result<(), String> {
        let trailer = std::mem::take(&mut self.arriving);
        if trailer.len() != self.trailer_bytes() || !trailer.starts_with(&TRAILER.to_le_bytes()) {
            return Err("its state ended early".into());
        }
        let mut words =
            trailer[4..].chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
        let (digest, dice) = (words.next().unwrap_or(0), words.next().unwrap_or(0));
        if digest != self.digest() {
            return Err("its digest is not the one that the source had".into());
        }
        for (version, word) in self.dma_versions.iter_mut().zip(words) {
            *version = u32::try_from(word).unwrap_or(0);
        }
        (self.dice, self.loaded) = (dice, true);
        Ok(())
    }

    /// Forgets what came.
    pub fn forget(&mut self) {
        self.arriving.clear();
        self.loaded = false;
    }

    /// Whether a whole state came in.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        self.loaded
    }

    /// Of all its state.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let words = self.state.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
        words.fold(0xcbf2_9ce4_8422_2325, |sum, word| mix(sum ^ word))
    }

    /// How many pages that it wrote do not hold what it wrote; `read` gives a page of what it pins.
    pub fn wrong_pages(
        &self,
        mut read: impl FnMut(u64, &mut [u8; PAGE_BYTES]) -> std::io::Result<()>,
    ) -> std::io::Result<u64> {
        let mut wrong = 0;
        for (page, version) in self.dma_versions.iter().enumerate() {
            let mut found = [0; PAGE_BYTES];
            read(page as u64, &mut found)?;
            let expected = if *version == 0 { [0; PAGE_BYTES] } else { dma_page(page, *version) };
            wrong += u64::from(found != expected);
        }
        Ok(wrong)
    }

    fn roll(&mut self, sides: usize) -> usize {
        self.dice = mix(self.dice.wrapping_add(0x9e37_79b9_7f4a_7c15));
        usize::try_from(self.dice % sides.max(1) as u64).unwrap_or(0)
    }

    /// A block gets a new content.
    fn change(&mut self, block: usize) {
        self.dice = mix(self.dice.wrapping_add(1));
        let mut word = self.dice;
        for place in self.state[block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES].chunks_exact_mut(8) {
            word = mix(word);
            place.copy_from_slice(&word.to_le_bytes());
        }
        self.dirty[block] = true;
    }

    /// Moves one dirty block to the stream; whether there was one.
    fn pend_block(&mut self) -> bool {
        let Some(block) = self.dirty.iter().position(|dirty| *dirty) else { return false };
        self.dirty[block] = false;
        self.pending.extend(u32::try_from(block).unwrap_or(TRAILER).to_le_bytes());
        self.pending.extend(&self.state[block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES]);
        true
    }

    fn trailer_bytes(&self) -> usize {
        4 + 8 * (2 + self.dma_versions.len())
    }

    fn pend_trailer(&mut self) {
        self.trailer_given = true;
        self.pending.extend(TRAILER.to_le_bytes());
        let versions = self.dma_versions.iter().map(|version| u64::from(*version));
        for word in [self.digest(), self.dice].into_iter().chain(versions) {
            self.pending.extend(word.to_le_bytes());
        }
    }

    /// The whole record at `at` of what has arrived, unless the trailer is there.
    fn record_at(&self, at: usize) -> Option<(u32, [u8; BLOCK_BYTES])> {
        let record = self.arriving.get(at..at + RECORD_BYTES)?;
        let (number, block) = record.split_first_chunk::<4>()?;
        let number = u32::from_le_bytes(*number);
        (number != TRAILER).then_some((number, block.try_into().ok()?))
    }
}

/// What a pinned page holds after its `version`th write.
fn dma_page(page: usize, version: u32) -> [u8; PAGE_BYTES] {
    let mut word = mix((page as u64) << 32 | u64::from(version));
    let mut bytes = [0; PAGE_BYTES];
    for place in bytes.chunks_exact_mut(8) {
        word = mix(word);
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Guest memory of a few pages.
    #[derive(Default)]
    struct Pages(std::collections::BTreeMap<u64, [u8; PAGE_BYTES]>);

    impl Pages {
        fn dma(&mut self) -> impl FnMut(u64, &[u8; PAGE_BYTES]) -> std::io::Result<()> {
            |page, bytes| {
                self.0.insert(page, *bytes);
                Ok(())
            }
        }

        fn wrong(&self, device: &FakeDevice) -> u64 {
            let read = |page, into: &mut [u8; PAGE_BYTES]| {
                *into = self.0.get(&page).copied().unwrap_or([0; PAGE_BYTES]);
                Ok(())
            };
            device.wrong_pages(read).unwrap()
        }
    }

    fn device(text: &str) -> FakeDevice {
        FakeDevice::new(text.parse().unwrap())
    }

    /// Reads until it is idle or at its end; what came, and whether it ended.
    fn drain(device: &mut FakeDevice, piece: usize) -> (Vec<u8>, bool) {
        let mut all = Vec::new();
        loop {
            match device.read(piece) {
                DeviceRead::Bytes(bytes) => all.extend(bytes),
                DeviceRead::Idle => return (all, false),
                DeviceRead::End => return (all, true),
            }
        }
    }

    #[test]
    fn state_that_grew_dirty_while_it_left_arrives_whole() {
        let (mut source, mut target) =
            (device("a:64KiB:1MiB:pinned=32KiB"), device("a:64KiB:9MiB:pinned=32KiB"));
        let mut pages = Pages::default();
        source.run(Duration::ZERO);
        source.open();
        let mut sent = 0;
        for tenth in 1..5 {
            source.advance(SECOND * tenth / 10, &mut pages.dma()).unwrap();
            let (bytes, ended) = drain(&mut source, 5000);
            assert!(!ended, "it runs");
            sent += bytes.len();
            bytes.chunks(777).for_each(|part| target.write(part).unwrap());
        }
        assert!(sent > 64 << 10, "blocks travelled again");
        let (expected, at_most) = source.remaining();
        assert!(expected < 200 && at_most > expected, "{expected} {at_most}");
        source.halt(SECOND, &mut pages.dma()).unwrap();
        let expected = source.remaining().0;
        let (bytes, ended) = drain(&mut source, 5000);
        assert!(ended && bytes.len() as u64 == expected);
        target.write(&bytes).unwrap();
        assert_eq!(target.finish(), Ok(()));
        assert_eq!((target.digest(), target.is_loaded()), (source.digest(), true));
        assert!(!pages.0.is_empty());
        assert_eq!((pages.wrong(&source), pages.wrong(&target)), (0, 0));
        pages.0.values_mut().next().unwrap()[7] ^= 1;
        assert_eq!(pages.wrong(&target), 1, "a page that was lost is found");
    }

    #[test]
    fn a_stop_copy_device_gives_nothing_before_it_stands() {
        let mut source = device("a:64KiB:1MiB:stop-copy");
        source.run(Duration::ZERO);
        source.open();
        assert_eq!(drain(&mut source, 5000), (Vec::new(), false));
        source.halt(SECOND, &mut |_, _| Ok(())).unwrap();
        assert!(drain(&mut source, 5000).0.len() > 64 << 10);
    }

    #[test]
    fn a_state_that_is_cut_altered_or_of_another_device_is_refused() {
        let mut source = device("a:16KiB");
        let bytes = drain(&mut source, 1 << 20).0;
        for cut in [0, 4, bytes.len() - 1] {
            let mut target = device("a:16KiB");
            assert!(target.write(&bytes[..cut]).and_then(|()| target.finish()).is_err(), "cut at {cut}");
        }
        let mut altered = bytes.clone();
        altered[100] ^= 1;
        let mut target = device("a:16KiB");
        assert!(target.write(&altered).and_then(|()| target.finish()).is_err());
        let mut small = device("a:8KiB");
        assert!(small.write(&bytes).unwrap_err().contains("does not exist"));
        assert!(device("a:16KiB:refuse").write(&bytes).unwrap_err().contains(":refuse"));
        let mut flooded = device("a:16KiB");
        assert!(flooded.write(&[bytes, vec![255; 9000]].concat()).is_err());
    }

    #[test]
    fn a_stream_that_is_opened_again_begins_again() {
        let mut source = device("a:16KiB");
        let first = drain(&mut source, 1 << 20);
        assert_eq!(source.read(100), DeviceRead::End);
        source.open();
        assert_eq!(drain(&mut source, 333), first);
    }
}
