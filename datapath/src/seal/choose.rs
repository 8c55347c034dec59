//! Which provider is faster on this CPU: measured, not assumed.
//!
//! With VAES one provider is five times as fast as the other; without AES instructions the order may turn. So
//! each seals records for about two milliseconds when the process first asks.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::{Cipher, LaneKey, Provider, Sealer, Source};
use crate::frame::{RECORD_BYTES_MAX, Record};

const TRIAL: Duration = Duration::from_millis(2);
const BODY_BYTES: u32 = 65_536;

/// The faster provider, and what each was measured at, in GB/s. Measured once, then remembered.
pub fn fastest_provider() -> (Provider, Vec<(Provider, f64)>) {
    static MEASURED: OnceLock<Vec<(Provider, f64)>> = OnceLock::new();
    let measured =
        MEASURED.get_or_init(|| [Provider::AwsLc, Provider::AesGcm].map(|p| (p, rate(p))).to_vec());
    let best = measured.iter().max_by(|(_, a), (_, b)| a.total_cmp(b));
    (best.map_or(Provider::AwsLc, |(provider, _)| *provider), measured.clone())
}

/// Bytes sealed per nanosecond, which is GB/s; zero for a provider that does not work here.
#[expect(clippy::disallowed_methods, reason = "measures")]
fn rate(provider: Provider) -> f64 {
    let key = LaneKey::from_bytes([0x5a; 32]);
    let Ok(mut sealer) = Sealer::new(Cipher::Aes256Gcm(provider), Some(key)) else { return 0.0 };
    let mut buffer = vec![0; RECORD_BYTES_MAX];
    let record = Record::State { stream: 0, len: BODY_BYTES };
    let mut seal = || sealer.seal(&record, Source::InPlace, &mut buffer).is_ok();
    // The first record pays for cold caches and cold vector units.
    if !seal() {
        return 0.0;
    }
    let (start, mut bytes) = (Instant::now(), 0.0);
    while start.elapsed() < TRIAL && seal() {
        bytes += f64::from(BODY_BYTES);
    }
    bytes / start.elapsed().as_secs_f64() / 1e9
}
