//! The heart beat: the guest writes one byte each millisecond to port 0xe9, and the host stamps it on arrival.
//!
//! This is the only clock that sees a blackout from outside both VMMs. A VMM's own "downtime" leaves out what comes
//! before its first and after its last step.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// One beat as the host saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// When it arrived.
    pub at: Instant,
    /// The guest's count, modulo 256: a beat that was lost or sent twice shows.
    pub count: u8,
}

/// The beats of one VMM, collected by a thread that ends with the VMM.
#[derive(Debug, Clone)]
pub struct HeartBeat {
    beats: Arc<Mutex<Vec<Beat>>>,
}

impl HeartBeat {
    /// Starts to listen.
    #[must_use]
    pub fn listen(mut stream: UnixStream) -> Self {
        let beats = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&beats);
        std::thread::spawn(move || {
            let mut bytes = [0; 256];
            while let Ok(count @ 1..) = stream.read(&mut bytes) {
                let at = now();
                let mut sink = sink.lock().unwrap_or_else(PoisonError::into_inner);
                sink.extend(bytes[..count].iter().map(|byte| Beat { at, count: *byte }));
            }
        });
        Self { beats }
    }

    /// Every beat that arrived at `since` or later.
    #[must_use]
    pub fn beats_since(&self, since: Instant) -> Vec<Beat> {
        let beats = self.beats.lock().unwrap_or_else(PoisonError::into_inner);
        let first = beats.partition_point(|beat| beat.at < since);
        beats[first..].to_vec()
    }

    /// The last beat so far.
    #[must_use]
    pub fn last(&self) -> Option<Beat> {
        self.beats.lock().unwrap_or_else(PoisonError::into_inner).last().copied()
    }

    /// Waits for the first beat at `since` or later.
    #[must_use]
    pub fn wait_since(&self, since: Instant, timeout: Duration) -> Option<Beat> {
        let deadline = now() + timeout;
        loop {
            let beats = self.beats.lock().unwrap_or_else(PoisonError::into_inner);
            let first = beats.partition_point(|beat| beat.at < since);
            if let Some(beat) = beats.get(first) {
                return Some(*beat);
            }
            drop(beats);
            if now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// The longest time without a beat at `since` or later; the time until the first of them does not count.
    #[must_use]
    pub fn longest_gap_since(&self, since: Instant) -> Option<Duration> {
        let beats = self.beats_since(since);
        beats.windows(2).map(|pair| pair[1].at - pair[0].at).max()
    }
}

/// A guest's way from one VMM to another, as its beats tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handover {
    /// The last beat from the source.
    pub last_on_source: Beat,
    /// The first beat from the target.
    pub first_on_target: Beat,
}

impl Handover {
    /// How long the guest was away; zero when both sides beat at once, which must never happen.
    #[must_use]
    pub fn gap(&self) -> Duration {
        self.first_on_target.at.saturating_duration_since(self.last_on_source.at)
    }

    /// True when the source still beat after the target had begun: two runners.
    #[must_use]
    pub fn overlaps(&self) -> bool {
        self.last_on_source.at > self.first_on_target.at
    }

    /// Beats that nobody saw, modulo 256: a byte that was still in a VMM's pipe when it was ended.
    #[must_use]
    pub fn beats_lost(&self) -> u8 {
        self.first_on_target.count.wrapping_sub(self.last_on_source.count).wrapping_sub(1)
    }
}

/// The handover that happened at `since` or later, once the target has beaten.
#[must_use]
pub fn guest_gap(source: &HeartBeat, target: &HeartBeat, since: Instant) -> Option<Handover> {
    let first_on_target = *target.beats_since(since).first()?;
    let last_on_source = source.last()?;
    Some(Handover { last_on_source, first_on_target })
}

#[expect(
    clippy::disallowed_methods,
    reason = "stamping beats with the host's clock is this module's purpose"
)]
pub(crate) fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn beating(counts: &[u8], pause: Duration) -> HeartBeat {
        let (mut guest, host) = UnixStream::pair().unwrap();
        let beat = HeartBeat::listen(host);
        for count in counts {
            guest.write_all(&[*count]).unwrap();
            while beat.last().is_none_or(|beat| beat.count != *count) {
                std::thread::yield_now();
            }
            std::thread::sleep(pause);
        }
        beat
    }

    #[test]
    fn the_gap_lies_between_the_sources_last_and_the_targets_first() {
        let start = now();
        let source = beating(&[254, 255], Duration::from_millis(30));
        let target = beating(&[0, 1], Duration::from_millis(1));
        let handover = guest_gap(&source, &target, start).unwrap();
        assert_eq!((handover.last_on_source.count, handover.first_on_target.count), (255, 0));
        assert_eq!(handover.beats_lost(), 0);
        assert!(handover.gap() >= Duration::from_millis(30), "{:?}", handover.gap());
        assert!(!handover.overlaps());
        let wrong_way = guest_gap(&target, &source, start).unwrap();
        assert!(wrong_way.overlaps());
    }

    #[test]
    fn waiting_sees_only_later_beats() {
        let source = beating(&[1], Duration::ZERO);
        assert_eq!(source.wait_since(now(), Duration::from_millis(5)), None);
        assert!(source.longest_gap_since(now()).is_none());
    }
}
