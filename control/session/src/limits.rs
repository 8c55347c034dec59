//! Every deadline of a move, named once, and how they must relate.
//!
//! ```text
//!   target, Ready:      |── commit_wait ──|discard|── linger: answers NeverRan ─────────────|
//!   source, in doubt:   |── in_doubt: asks every ask_every ────────────|
//! ```
//!
//! A source in doubt must outlast the target's wait for the Commit, or it gives up before the proof exists; and the
//! target must answer for as long as the source may ask. What must never happen: a wait without an end.

use std::time::Duration;

/// The deadlines of one move. Both sides take the defaults; tests shorten them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// `--timeout`: the whole move, until Commit. None: as long as it takes.
    pub whole: Option<Duration>,
    /// Offer sent until the Answer is here; the target prepares its guest meanwhile.
    pub answer: Duration,
    /// Answer until every lane is open and the source is attached.
    pub prepare: Duration,
    /// Final sent until Ready is here: pages, digest and device state at the target.
    pub ready: Duration,
    /// Commit sent until the source gives up asking: the end is then in doubt.
    pub in_doubt: Duration,
    /// Between two reconnections of a source in doubt.
    pub ask_every: Duration,
    /// Ready sent until the target stops waiting for Commit.
    pub commit_wait: Duration,
    /// How long the target answers Asks after its end.
    pub linger: Duration,
    /// Between two tries to resume the source guest.
    pub resume_every: Duration,
}

/// Tries to resume the source guest before it is reported as paused.
pub const RESUME_TRIES: u8 = 3;

impl Limits {
    /// For people and networks as they are.
    pub const DEFAULT: Self = Self {
        whole: None,
        answer: Duration::from_secs(30),
        prepare: Duration::from_secs(60),
        ready: Duration::from_secs(10),
        in_doubt: Duration::from_secs(30),
        ask_every: Duration::from_millis(500),
        commit_wait: Duration::from_secs(10),
        linger: Duration::from_secs(45),
        resume_every: Duration::from_millis(500),
    };

    /// The defaults, with `--timeout`, and with time for the digest of `ram_bytes` where `--verify` asks for it.
    pub fn for_move(whole: Option<Duration>, ram_bytes: u64, verify: bool) -> Self {
        /// A digest reads at least this much in a second, on the slowest host that we know.
        const DIGEST_BYTES_PER_SECOND: u64 = 200 << 20;
        let digest = if verify { ram_bytes / DIGEST_BYTES_PER_SECOND } else { 0 };
        Self { whole, ready: Self::DEFAULT.ready + Duration::from_secs(digest), ..Self::DEFAULT }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

const _: () = assert!(
    Limits::DEFAULT.in_doubt.as_millis() > 2 * Limits::DEFAULT.commit_wait.as_millis()
        && Limits::DEFAULT.linger.as_millis() > Limits::DEFAULT.in_doubt.as_millis()
        && Limits::DEFAULT.ask_every.as_millis() * 4 < Limits::DEFAULT.commit_wait.as_millis()
);
