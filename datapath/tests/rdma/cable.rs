//! The cable between the lab's two soft cards.

use std::process::Command;

/// Loses every packet in both directions, without a word to either end, until it is dropped. The queues that lose them
/// are there from the start; scripts/lab-init says why.
pub(crate) struct Cut;

impl Cut {
    pub(crate) fn now() -> Cut {
        lose("100%");
        Cut
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        lose("0%");
    }
}

fn lose(share: &str) {
    for end in ["ve0", "ve1"] {
        let words = ["qdisc", "change", "dev", end, "root", "netem", "limit", "100000", "loss", share];
        let done = Command::new("/sbin/tc").args(words).status().expect("no tc in this lab");
        assert!(done.success(), "tc refused: {words:?}");
    }
}
