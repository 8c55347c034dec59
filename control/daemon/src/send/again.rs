//! The second attempt: over TCP, where RDMA failed and the operator said so beforehand.
//!
//! Only a link that could not be made or was lost is tried again, and only before Commit: the guest runs on here, all of
//! it is sent anew under keys of its own. What must never happen: a second attempt that nobody asked for.

use std::time::{Duration, Instant};

use crate::cli::{Fallback, SendArgs};
use crate::endpoint::Transport;
use crate::failure::Failure;
use crate::report::MoveReport;

/// The target needs this long at most to notice the loss, and to wait for a guest again.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two knocks at a target that does not listen yet.
const KNOCK_EVERY: Duration = Duration::from_millis(250);

/// What to try after an attempt ended so; `None` for nothing.
pub(super) fn instead(args: &SendArgs, ended: &Result<(), Failure>) -> Option<SendArgs> {
    let wanted = args.rdma.rdma_fallback == Some(Fallback::Tcp) && args.to.transport == Transport::Rdma;
    match ended {
        Err(Failure::Unavailable(why)) if wanted => {
            eprintln!("vmferry: {why}; trying again over tcp, as --rdma-fallback says");
            let mut again = args.clone();
            again.to.transport = Transport::Tcp;
            Some(again)
        }
        _ => None,
    }
}

/// Runs `attempt` until it is more than a target that is not there yet, at most for [`PATIENCE`].
pub(super) fn patiently(
    mut attempt: impl FnMut() -> (MoveReport, Result<(), Failure>),
) -> (MoveReport, Result<(), Failure>) {
    let due = now() + PATIENCE;
    loop {
        let done = attempt();
        let absent = matches!(done.1, Err(Failure::Unavailable(_)));
        if !absent || now() >= due {
            return done;
        }
        std::thread::sleep(KNOCK_EVERY);
    }
}

#[expect(clippy::disallowed_methods, reason = "the driver is where time comes from")]
fn now() -> Instant {
    Instant::now()
}
