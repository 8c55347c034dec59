//! What devices may write by DMA, and who can tell what they wrote.
//!
//! ```text
//!   DmaMaps: iova ──► len           who tells          then
//!     0x0000_0000 ─ 512 MiB ──┬──►  the device's log   its report, page by page
//!     0x1_0000_0000 ─ 2 GiB ──┼──►  the IOMMU's log    its report, unless it calls everything dirty every time
//!                             └──►  nobody             pinned: all of it travels after the stop
//! ```
//!
//! What must never happen: an error of a log taken for "nothing was written". After an error, and after a report that
//! cannot be right, every mapped page is dirty, and stays so until the log was started anew.

use std::fmt;
use std::io;

use crate::VfioError;
use crate::device::DmaLog;

/// What VFIO counts in.
pub const PAGE_BYTES: u64 = 4096;

/// Addresses as devices see them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IovaRange {
    /// The first address.
    pub iova: u64,
    /// How many bytes.
    pub len: u64,
}

impl IovaRange {
    /// The address behind the last.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.iova.saturating_add(self.len)
    }

    /// How many pages.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.len.div_ceil(PAGE_BYTES)
    }

    const fn overlaps(self, other: IovaRange) -> bool {
        self.iova < other.end() && other.iova < self.end()
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x} to {:#x}", self.iova, self.end())
    }
}

/// What is mapped for DMA: the book of one IOMMU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DmaMaps(Vec<IovaRange>);

impl DmaMaps {
    /// Writes a map into the book: whole pages, below the end of the address space, over no other.
    pub fn add(&mut self, range: IovaRange) -> Result<(), VfioError> {
        let whole =
            range.len > 0 && range.iova.is_multiple_of(PAGE_BYTES) && range.len.is_multiple_of(PAGE_BYTES);
        if !whole || range.iova.checked_add(range.len).is_none() {
            return Err(VfioError::Bug(format!("a DMA map of {range} is not made of whole pages")));
        }
        if let Some(other) = self.0.iter().find(|other| other.overlaps(range)) {
            return Err(VfioError::Bug(format!("a DMA map of {range} lies over that of {other}")));
        }
        let at = self.0.partition_point(|other| other.iova < range.iova);
        self.0.insert(at, range);
        Ok(())
    }

    /// Takes a map out of the book.
    pub fn remove(&mut self, range: IovaRange) -> Result<(), VfioError> {
        match self.0.iter().position(|other| *other == range) {
            Some(at) => drop(self.0.remove(at)),
            None => return Err(VfioError::Bug(format!("no DMA map is exactly {range}"))),
        }
        Ok(())
    }

    /// The maps, by address.
    #[must_use]
    pub fn ranges(&self) -> &[IovaRange] {
        &self.0
    }

    /// How many bytes are mapped.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.iter().map(|range| range.len).sum()
    }
}

/// Who can tell what a device wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Teller {
    /// The device.
    Device,
    /// The driver of the IOMMU.
    Iommu,
    /// Nobody: what is mapped is pinned.
    Nobody,
}

/// What was written by DMA since the last look.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dirty {
    /// These ranges, by address, joined.
    Ranges(Vec<IovaRange>),
    /// Every mapped page, and why.
    Everything(String),
}

impl Dirty {
    /// The ranges, with everything spelled out.
    #[must_use]
    pub fn ranges(&self, maps: &DmaMaps) -> Vec<IovaRange> {
        match self {
            Dirty::Ranges(ranges) => ranges.clone(),
            Dirty::Everything(_) => maps.ranges().to_vec(),
        }
    }

    /// How many bytes.
    #[must_use]
    pub fn bytes(&self, maps: &DmaMaps) -> u64 {
        self.ranges(maps).iter().map(|range| range.len).sum()
    }
}

/// A log, watched: it answers every look, and the answer is never less than the truth.
pub struct WatchedLog<L> {
    log: L,
    maps: DmaMaps,
    trouble: Option<String>,
    only_maps: bool,
}

impl<L: DmaLog> WatchedLog<L> {
    /// Starts `log` over everything that is mapped, before the first round: it looks twice to judge the log, and what
    /// those looks told is forgotten, as the first round sends every page. A log that does not start leaves its maps
    /// to nobody: its caller pins them.
    pub fn start(mut log: L, maps: DmaMaps) -> Result<WatchedLog<L>, io::Error> {
        log.start(maps.ranges())?;
        let mut watched = WatchedLog { log, maps, trouble: None, only_maps: false };
        let looks = [watched.collect(), watched.collect()];
        let all = watched.maps.bytes();
        watched.only_maps = all > 0 && looks.iter().all(|dirty| dirty.bytes(&watched.maps) == all);
        Ok(watched)
    }

    /// What was written since the last look.
    pub fn collect(&mut self) -> Dirty {
        if self.trouble.is_none() {
            match self.read() {
                Ok(ranges) => return Dirty::Ranges(ranges),
                // What the reports before the error told is forgotten by the log, so the answer is everything; and a
                // log that lost count once tells nothing until it was started anew.
                Err(error) => self.trouble = Some(format!("a report of DMA failed: {error}")),
            }
        }
        Dirty::Everything(self.trouble.clone().unwrap_or_default())
    }

    /// What is watched.
    #[must_use]
    pub fn maps(&self) -> &DmaMaps {
        &self.maps
    }

    /// Whether two looks, one right after the other, both called every page dirty: such a log knows only what is
    /// mapped (type1's, for a device that does not tell it what it pins), or nothing (its reports fail). What it watches is better pinned, because
    /// it would travel in every round.
    pub fn knows_only_maps(&self) -> bool {
        self.only_maps
    }

    /// Stops the log.
    pub fn stop(mut self) -> io::Result<()> {
        self.log.stop()
    }

    fn read(&mut self) -> io::Result<Vec<IovaRange>> {
        let mut found = Vec::new();
        for range in self.maps.ranges() {
            let bitmap = self.log.report(*range)?;
            if (bitmap.len() as u64) < range.pages().div_ceil(64) {
                let why = format!("{} words for {} pages", bitmap.len(), range.pages());
                return Err(io::Error::new(io::ErrorKind::InvalidData, why));
            }
            found.extend(dirty_runs(*range, &bitmap));
        }
        Ok(found)
    }
}

/// The runs of set bits, as ranges; bits behind the range's end are nobody's.
fn dirty_runs(range: IovaRange, bitmap: &[u64]) -> Vec<IovaRange> {
    let mut runs: Vec<IovaRange> = Vec::new();
    let bits =
        (0..range.pages()).zip(bitmap.iter().flat_map(|word| (0..64).map(move |bit| word >> bit & 1 == 1)));
    for (page, _) in bits.filter(|(_, set)| *set) {
        let iova = range.iova + page * PAGE_BYTES;
        match runs.last_mut() {
            Some(last) if last.end() == iova => last.len += PAGE_BYTES,
            _ => runs.push(IovaRange { iova, len: PAGE_BYTES }),
        }
    }
    runs
}

/// How the writes of a device will be known.
pub enum Watch {
    /// By its own log.
    Device(WatchedLog<Box<dyn DmaLog>>),
    /// By the log of its IOMMU's driver.
    Iommu(WatchedLog<Box<dyn DmaLog>>),
    /// Not: all of this is pinned.
    Nobody {
        /// What is mapped.
        maps: DmaMaps,
        /// Why nobody can tell.
        why: String,
    },
}

impl Watch {
    /// The best that there is: the device's log, else the IOMMU's, else nobody's. Start it before the first round.
    #[must_use]
    pub fn best(device: Option<Box<dyn DmaLog>>, iommu: Option<Box<dyn DmaLog>>, maps: DmaMaps) -> Watch {
        let mut why = Vec::new();
        for (log, owner) in [(device, Teller::Device), (iommu, Teller::Iommu)] {
            let Some(log) = log else { continue };
            match WatchedLog::start(log, maps.clone()) {
                Ok(log) if log.knows_only_maps() => {
                    let trouble = log.trouble.clone();
                    let always = || "calls all that is mapped dirty, always".to_owned();
                    why.push(format!("the {owner}'s log is of no use: {}", trouble.unwrap_or_else(always)));
                    why.extend(log.stop().err().map(|error| format!("and does not stop: {error}")));
                }
                Ok(log) if owner == Teller::Device => return Watch::Device(log),
                Ok(log) => return Watch::Iommu(log),
                Err(error) => why.push(format!("the {owner}'s log does not start: {error}")),
            }
        }
        if why.is_empty() {
            why.push("neither the device nor its IOMMU keeps a log".into());
        }
        Watch::Nobody { maps, why: why.join("; ") }
    }

    /// Who tells.
    #[must_use]
    pub fn teller(&self) -> Teller {
        match self {
            Watch::Device(_) => Teller::Device,
            Watch::Iommu(_) => Teller::Iommu,
            Watch::Nobody { .. } => Teller::Nobody,
        }
    }

    /// What was written since the last look, as far as a log tells.
    pub fn collect(&mut self) -> Dirty {
        match self {
            Watch::Device(log) | Watch::Iommu(log) => log.collect(),
            Watch::Nobody { .. } => Dirty::Ranges(Vec::new()),
        }
    }

    /// What is pinned: it travels after the stop, whatever a log said.
    #[must_use]
    pub fn pinned(&self) -> &[IovaRange] {
        match self {
            Watch::Device(_) | Watch::Iommu(_) => &[],
            Watch::Nobody { maps, .. } => maps.ranges(),
        }
    }
}

impl fmt::Display for Teller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Teller::Device => "device",
            Teller::Iommu => "IOMMU",
            Teller::Nobody => "nobody",
        })
    }
}

/// What one device pins, for the operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pins {
    /// The operator's name for the device.
    pub device: String,
    /// What it is: `VF`, `mtty-2`.
    pub kind: String,
    /// What it has mapped and nobody can tell.
    pub bytes: u64,
}

/// How fast pages move, as an interval, in bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RateInterval {
    /// At least.
    pub low: f64,
    /// At most.
    pub high: f64,
}

impl Pins {
    /// What the pinned pages add to a blackout at these rates: from, to, in milliseconds. Without a rate it is
    /// unbounded.
    #[must_use]
    pub fn adds_ms(&self, rate: RateInterval) -> (f64, f64) {
        #[expect(clippy::cast_precision_loss, reason = "an estimate: 53 bits are enough")]
        let at = |rate: f64| if rate > 0.0 { self.bytes as f64 / rate * 1e3 } else { f64::INFINITY };
        (at(rate.high), at(rate.low))
    }

    /// "eth1 VF pins 512 MiB: adds 140 to 155 ms".
    #[must_use]
    pub fn sentence(&self, rate: RateInterval) -> String {
        let (from, to) = self.adds_ms(rate);
        let mib = self.bytes.div_ceil(1 << 20);
        let Pins { device, kind, .. } = self;
        if to.is_finite() {
            format!("{device} {kind} pins {mib} MiB: adds {from:.0} to {to:.0} ms")
        } else {
            format!("{device} {kind} pins {mib} MiB: adds as long as they take, no rate is known yet")
        }
    }
}

#[cfg(test)]
mod tests;
