//! The cable between the lab's two soft cards.

use std::process::Command;

/// Loses every packet in both directions, without a word to either end, until it is dropped.
pub(crate) struct Cut;

impl Cut {
    pub(crate) fn now() -> Cut {
        for end in ["ve0", "ve1"] {
            tc(&["qdisc", "add", "dev", end, "root", "netem", "loss", "100%"]);
        }
        Cut
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        for end in ["ve0", "ve1"] {
            tc(&["qdisc", "del", "dev", end, "root"]);
        }
    }
}

fn tc(words: &[&str]) {
    let done = Command::new("/sbin/tc").args(words).status().expect("no tc in this lab");
    assert!(done.success(), "tc refused: {words:?}");
}
