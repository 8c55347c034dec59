//! All terms together.

use std::collections::BTreeMap;

use super::calibrate::Calibration;
use super::devices::{DeviceDraw, Devices};
use super::estimate::{Estimate, Z95};
use super::residue::Residue;
use super::sample::{Deviates, SAMPLES, interval};
use vmferry_datapath::ByteLen;

use super::{DeviceForecast, Forecast, History, Priors, SaveOrder, Term};
use crate::converge::RoundReport;
use crate::devices::DeviceReport;

/// A rate is learned from rounds of at least this many pages; smaller ones measure latency …
const RATE_PAGES_MIN: f64 = 1024.0;
/// … unless they take so many times what a flush may take: then the link is slow, and a small guest's only rounds tell.
const SLOW_FLUSHES_MIN: f64 = 4.0;
/// Fewer pages than this are a round trip, however long it takes.
const SLOW_PAGES_MIN: f64 = 64.0;
/// Milliseconds a page: 4 KiB at 5 GB/s and at 0.2 GB/s.
const PAGE_MS: (f64, f64) = (0.0008, 0.02);
/// Milliseconds to get even one page across: a wake-up a lane, and a flush.
const FLUSH_MS: (f64, f64) = (0.1, 1.5);
/// Guest bytes that both digests of `--verify` take in a millisecond, one after the other: a busy host and an idle one.
const DIGEST_BYTES_PER_MS: (f64, f64) = (2.5e6, 10e6);
/// The last pages' measured time over the predicted one.
const PAGES_ERROR: (f64, f64) = (0.75, 1.4);
/// What a term's observation is worth after the next one: hosts change over hundreds of moves, not over ten.
const TERM_MEMORY: f64 = 0.97;
/// What a round's rate is worth after the next one: links change while we look.
const ROUND_MEMORY: f64 = 0.7;

/// Terms that are learned from the history of moves.
const LEARNED: [Term; 7] =
    [Term::Stop, Term::Scan, Term::Save, Term::Close, Term::Load, Term::Handover, Term::Run];

/// Learns while a move runs and says how long its blackout would be.
#[derive(Clone, Debug)]
pub struct Predictor {
    save_order: SaveOrder,
    terms: BTreeMap<Term, Estimate>,
    page_ms: Estimate,
    flush_ms: Estimate,
    pages_error: Estimate,
    residue: Residue,
    pinned: f64,
    devices: Devices,
    calibration: Calibration,
}

/// One sample of every term, in milliseconds.
struct Draw {
    terms: BTreeMap<Term, f64>,
    pages: f64,
    devices: Vec<DeviceDraw>,
    /// The same terms, had the rounds left nothing that they can send.
    least: Least,
}

/// What no round makes smaller.
struct Least {
    pages: f64,
    devices: f64,
    /// Of the devices, what they load longer than the VMM.
    loading: f64,
}

impl Predictor {
    /// From what is assumed, and from the moves before this one.
    pub fn new(priors: Priors, history: &History) -> Self {
        let mut terms = BTreeMap::new();
        for term in LEARNED {
            let Some(prior) = priors.of(term) else { continue };
            let mut estimate = Estimate::from_interval(prior, TERM_MEMORY);
            history.records().filter_map(|r| r.measured_ms.get(&term)).for_each(|ms| estimate.recall(*ms));
            terms.insert(term, estimate);
        }
        let mut pages_error = Estimate::from_interval(PAGES_ERROR, TERM_MEMORY);
        for record in history.records() {
            let predicted = record.forecast.terms.get(&Term::Pages).map_or(0.0, |pages| pages.p50_ms);
            let measured = record.measured_ms.get(&Term::Pages).copied().unwrap_or(0.0);
            if predicted > 0.0 {
                pages_error.recall(measured / predicted);
            }
        }
        Self {
            save_order: priors.save_order,
            terms,
            page_ms: Estimate::from_guess(PAGE_MS, ROUND_MEMORY),
            flush_ms: Estimate::from_interval(FLUSH_MS, ROUND_MEMORY),
            pages_error,
            residue: Residue::new(),
            pinned: 0.0,
            devices: Devices::new(history),
            calibration: Calibration::learn(history.records.iter()),
        }
    }

    /// With `--verify`, both hosts hash all memory in the blackout.
    #[must_use]
    pub fn with_verify(mut self, ram: ByteLen) -> Self {
        let ms = |bytes_per_ms: f64| (count(ram.0) / bytes_per_ms).max(0.01);
        let prior = (ms(DIGEST_BYTES_PER_MS.1), ms(DIGEST_BYTES_PER_MS.0));
        self.terms.insert(Term::Verify, Estimate::from_interval(prior, TERM_MEMORY));
        self
    }

    /// A round ended.
    pub fn observe(&mut self, report: &RoundReport) {
        if let Some(scan) = self.terms.get_mut(&Term::Scan) {
            scan.observe(report.scan.as_secs_f64() * 1e3);
        }
        self.observe_rate(report);
        self.residue.observe(report);
        self.pinned = count(report.pinned.0);
    }

    /// What the devices would add now; comes with each round.
    pub fn observe_devices(&mut self, devices: &[DeviceReport]) {
        self.devices.observe(devices);
    }

    /// State of devices that pre-copy can still make smaller.
    pub(crate) fn shrinking_state(&self) -> ByteLen {
        self.devices.shrinking()
    }

    /// Round 1 is full of zero pages, which cost a bit; later rounds have the mix that the last one will have.
    fn observe_rate(&mut self, report: &RoundReport) {
        self.flush_ms.observe(report.empty_flush.as_secs_f64() * 1e3);
        let free = if report.round <= 1 { report.zero.0 } else { 0 };
        let pages = count(report.sent.0.saturating_sub(free));
        let ms = report.sending.as_secs_f64() * 1e3;
        let slow = pages >= SLOW_PAGES_MIN && ms >= SLOW_FLUSHES_MIN * self.flush_ms.at(Z95);
        if pages >= RATE_PAGES_MIN || slow {
            self.page_ms.observe(ms / pages);
        } else if pages > 0.0 {
            self.flush_ms.observe((ms - pages * self.page_ms.median()).max(0.02));
        }
    }

    /// Milliseconds a page, as measured: for sentences.
    pub(crate) fn page_ms(&self) -> f64 {
        self.page_ms.median()
    }

    /// The blackout, if the switchover came now.
    pub fn forecast(&self) -> Forecast {
        let mut deviates = Deviates::new();
        let draws: Vec<Draw> = (0..SAMPLES).map(|_| self.draw(&mut deviates)).collect();
        let raw = interval(draws.iter().map(|draw| self.sum(draw, Draw::term)).collect());
        let floor = interval(draws.iter().map(|draw| self.sum(draw, Draw::floor_term)).collect());
        let least = interval(draws.iter().map(|draw| self.sum(draw, Draw::least_term)).collect());
        let of_term = |term: Term| interval(draws.iter().map(|draw| draw.term(term)).collect());
        let pages = whole(interval(draws.iter().map(|draw| draw.pages).collect()).p50_ms);
        Forecast {
            total: self.calibration.apply(raw),
            raw,
            floor: self.calibration.apply(floor),
            least: self.calibration.apply(least),
            terms: LEARNED
                .into_iter()
                .chain([Term::Pages, Term::Devices, Term::Verify])
                .map(|term| (term, of_term(term)))
                .collect(),
            pages,
            devices: self.device_forecasts(&draws),
        }
    }

    fn device_forecasts(&self, draws: &[Draw]) -> Vec<DeviceForecast> {
        let of = |at: usize, part: fn(&DeviceDraw) -> f64| {
            interval(draws.iter().filter_map(|draw| draw.devices.get(at).map(part)).collect())
        };
        let forecast = |(at, report): (usize, &DeviceReport)| DeviceForecast {
            name: report.name.clone(),
            state_bytes: whole(of(at, |device| device.bytes).p50_ms),
            state: of(at, |device| device.moving + device.loading),
            pinned_bytes: report.pinned.0,
            pinned: of(at, |device| device.pinned),
        };
        self.devices.latest().iter().enumerate().map(forecast).collect()
    }

    fn draw(&self, deviates: &mut Deviates) -> Draw {
        let mut terms: BTreeMap<Term, f64> =
            self.terms.iter().map(|(term, estimate)| (*term, estimate.at(deviates.normal()))).collect();
        // The guest writes on until it is stopped.
        let extra = terms.get(&Term::Stop).copied().unwrap_or(0.0) / 1e3;
        let pages = self.residue.at(extra, deviates.normal(), deviates.normal()) + self.pinned;
        let (flush_ms, page_ms) = (self.flush_ms.at(deviates.normal()), self.page_ms.at(deviates.normal()));
        let error = self.pages_error.at(deviates.normal());
        terms.insert(Term::Pages, (flush_ms + pages * page_ms) * error);
        let devices = self.devices.draw(page_ms, error, || deviates.normal());
        // They share the lanes' rate, and load at the same time as the VMM.
        let load = terms.get(&Term::Load).copied().unwrap_or(0.0);
        let beyond = |device: &DeviceDraw| device.loading - load;
        let last = devices.iter().map(beyond).fold(0.0, f64::max);
        let moving =
            |of: fn(&DeviceDraw) -> bool| devices.iter().filter(|d| of(d)).map(|d| d.moving).sum::<f64>();
        if !devices.is_empty() {
            terms.insert(Term::Devices, moving(|_| true) + last);
        }
        let pinned = if self.pinned > 0.0 { (flush_ms + self.pinned * page_ms) * error } else { 0.0 };
        let devices_least = moving(|device| !device.shrinks) + last;
        let least = Least { pages: pinned, devices: devices_least, loading: last };
        Draw { terms, pages, devices, least }
    }

    fn sum(&self, draw: &Draw, of: impl Fn(&Draw, Term) -> f64) -> f64 {
        let of = |term| of(draw, term);
        let moving = of(Term::Scan) + of(Term::Pages);
        let paused = match self.save_order {
            SaveOrder::BesidePages => moving.max(of(Term::Save)),
            SaveOrder::AfterPages => moving + of(Term::Save),
        };
        let handover = of(Term::Close) + of(Term::Verify) + of(Term::Load) + of(Term::Handover);
        of(Term::Stop) + paused + of(Term::Devices) + handover + of(Term::Run)
    }
}

impl Draw {
    fn term(&self, term: Term) -> f64 {
        self.terms.get(&term).copied().unwrap_or(0.0)
    }

    /// The same, with nothing to send at all.
    fn floor_term(&self, term: Term) -> f64 {
        match term {
            Term::Pages => 0.0,
            Term::Devices => self.least.loading,
            Term::Stop
            | Term::Scan
            | Term::Save
            | Term::Close
            | Term::Load
            | Term::Handover
            | Term::Run
            | Term::Verify => self.term(term),
        }
    }

    /// The same, had the rounds left nothing that they can send.
    fn least_term(&self, term: Term) -> f64 {
        match term {
            Term::Pages => self.least.pages,
            Term::Devices => self.least.devices,
            Term::Stop
            | Term::Scan
            | Term::Save
            | Term::Close
            | Term::Load
            | Term::Handover
            | Term::Run
            | Term::Verify => self.term(term),
        }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count of pages or bytes")]
fn whole(amount: f64) -> u64 {
    amount as u64
}

#[expect(clippy::cast_precision_loss, reason = "page counts stay far below 2^52")]
fn count(pages: u64) -> f64 {
    pages as f64
}
