//! `--compress auto`: compresses where a measurement of this link and of this guest's pages says that it pays.
//!
//! The first pages go out as they are. When enough of them went to know the link, a sample of the guest is
//! compressed, and the two are compared once. What must never happen: a second opinion while pages flow.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vmferry_datapath::{CompressionSample, GuestRam, Meter, PageSet, Sender};

use super::ZSTD_LEVEL;

/// Wire bytes a lane after which its link is known: far past what socket buffers swallow.
const PROBE_BYTES: u64 = 16 << 20;
/// A compressed page must be this much smaller, and the pipeline this much faster, or it is not worth the CPU.
const GAIN_MIN: f64 = 1.1;

/// Waits for enough bytes, then decides once.
pub(super) struct AutoCompress {
    switch: Arc<AtomicBool>,
    ram: Arc<GuestRam>,
    began: Option<(Duration, u64)>,
    verdict: Option<String>,
}

impl AutoCompress {
    /// Compression is off until it has decided.
    pub(super) fn new(sender: &Sender, ram: Arc<GuestRam>) -> Self {
        let switch = sender.compression_switch();
        switch.store(false, Ordering::Relaxed);
        Self { switch, ram, began: None, verdict: None }
    }

    /// Called while pages flow.
    pub(super) fn look(&mut self, now: Duration, meter: &Meter) {
        if self.verdict.is_some() || meter.wire_bytes == 0 {
            return;
        }
        let (since, bytes) = *self.began.get_or_insert((now, meter.wire_bytes));
        let lanes = u64::try_from(meter.lanes.len().max(1)).unwrap_or(1);
        let moved = meter.wire_bytes.saturating_sub(bytes);
        if moved < PROBE_BYTES * lanes || now <= since {
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let lane_bytes_per_s = (moved / lanes) as f64 / (now - since).as_secs_f64();
        let pages = self.ram.populated().unwrap_or_else(|_| PageSet::new(self.ram.layout()));
        let sample = CompressionSample::take(&self.ram, &pages, ZSTD_LEVEL);
        let pays = sample.is_some_and(|sample| pays(lane_bytes_per_s, sample));
        self.switch.store(pays, Ordering::Relaxed);
        self.verdict = Some(sentence(pays, lane_bytes_per_s, sample));
    }

    /// What was decided, once it was.
    pub(super) fn verdict(&self) -> Option<&str> {
        self.verdict.as_deref()
    }
}

/// A lane without compression is as fast as its link; with it, as the slower of the compressor and the link that
/// carries less.
fn pays(lane_bytes_per_s: f64, sample: CompressionSample) -> bool {
    let packed = sample.bytes_per_s.min(lane_bytes_per_s / sample.ratio.max(1e-3));
    packed > GAIN_MIN * lane_bytes_per_s
}

fn sentence(pays: bool, lane_bytes_per_s: f64, sample: Option<CompressionSample>) -> String {
    let Some(sample) = sample else { return "--compress auto: off, there was nothing to compress".into() };
    format!(
        "--compress auto: {}, a lane carries {:.2} GB/s, zstd takes {:.2} GB/s and leaves {:.0} %",
        if pays { "on" } else { "off" },
        lane_bytes_per_s / 1e9,
        sample.bytes_per_s / 1e9,
        sample.ratio * 100.0
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_pays_on_a_slow_link_with_pages_that_shrink_and_nowhere_else() {
        let sample = |ratio| CompressionSample { bytes_per_s: 0.5e9, ratio };
        assert!(pays(0.1e9, sample(0.4)));
        assert!(!pays(0.1e9, sample(0.98)), "noise does not shrink");
        assert!(!pays(2.0e9, sample(0.4)), "the link is faster than zstd");
    }
}
