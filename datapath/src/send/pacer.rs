//! Holding a lane to its share of the rate limit.

use std::time::Duration;

/// How far a lane may catch up after a pause.
const BURST: Duration = Duration::from_millis(10);

/// When the next bytes are due.
#[derive(Debug, Default)]
pub(crate) struct Pacer {
    due: Duration,
}

impl Pacer {
    /// Books `bytes` at `bytes_per_s`, and gives how long to wait before they may go.
    pub(crate) fn book(&mut self, now: Duration, bytes: u64, bytes_per_s: u64) -> Duration {
        let start = self.due.max(now.saturating_sub(BURST));
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(bytes_per_s.max(1));
        self.due = start + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX / 2));
        start.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_over_a_second() {
        let (mut pacer, mut now, mut sent) = (Pacer::default(), Duration::from_secs(5), 0_u64);
        while now < Duration::from_secs(6) {
            now += pacer.book(now, 100_000, 10_000_000);
            sent += 100_000;
            now += Duration::from_micros(100);
        }
        assert!((9_900_000..=10_400_000).contains(&sent), "{sent} bytes at 10 MB/s");
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let mut pacer = Pacer::default();
        pacer.book(Duration::from_secs(1), 1000, 1000);
        let at = Duration::from_secs(100);
        assert_eq!(pacer.book(at, 1000, 1000), Duration::ZERO);
        assert!(pacer.book(at, 1000, 1000) > Duration::from_millis(900));
    }
}
