//! The second attempt: over TCP, where RDMA failed and the operator said so beforehand.
//!
//! Only a link that could not be made or was lost is tried again, and only before Commit: the guest runs on here, all of
//! it is sent anew under keys of its own. What must never happen: a second attempt that nobody asked for.

use std::time::{Duration, Instant};

use crate::cli::{Fallback, SendArgs};
use crate::endpoint::Transport;
use crate::failure::Failure;
use crate::report::MoveReport;

/// The target needs this long at most to notice the loss, and to wait for a guest again. An attempt that opened lanes is
/// the last one, whatever became of it.
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

/// Whether the target was not there, or still busy with what was lost: no lane was opened.
fn is_absent((report, ended): &(MoveReport, Result<(), Failure>)) -> bool {
    matches!(ended, Err(Failure::Unavailable(_))) && report.lanes.is_empty()
}

/// Runs `attempt` until it is more than a target that is not there yet. None begins later than [`PATIENCE`] after the
/// first.
pub(super) fn patiently(
    mut attempt: impl FnMut() -> (MoveReport, Result<(), Failure>),
) -> (MoveReport, Result<(), Failure>) {
    let due = now() + PATIENCE;
    loop {
        let done = attempt();
        if !is_absent(&done) || now() >= due {
            return done;
        }
        std::thread::sleep(KNOCK_EVERY);
    }
}

#[expect(clippy::disallowed_methods, reason = "the driver is where time comes from")]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::LaneReport;

    #[test]
    fn only_a_target_that_was_not_there_is_knocked_at_again() {
        let lost = || Err(Failure::Unavailable("the link was lost".into()));
        let mut attempts = 0;
        let ended = patiently(|| {
            attempts += 1;
            let lanes = if attempts < 3 { Vec::new() } else { vec![LaneReport::default()] };
            (MoveReport { lanes, ..MoveReport::default() }, lost())
        });
        assert_eq!((attempts, ended.1), (3, lost()), "a link that carried is not tried a second time");
    }
}
