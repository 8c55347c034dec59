//! A cable of the lab, cut: every packet that these ends of it send is lost, without a word to either end.
//!
//! The queue that loses them is there from the start, and cutting only changes it; scripts/lab-init says why.

use std::process::Command;

/// Ends of cables that lose what they send, until this is dropped.
pub struct Cut(Vec<&'static str>);

impl Cut {
    /// Cuts these ends: `ve0` and `ve1` of the cable inside a host, `lan0` of the network between the hosts.
    ///
    /// # Panics
    /// When `tc` refuses: a test without a cut proves nothing.
    #[must_use]
    pub fn now(ends: &[&'static str]) -> Cut {
        let cut = Cut(ends.to_vec());
        cut.lose("100%");
        cut
    }

    fn lose(&self, share: &str) {
        for end in &self.0 {
            let words = ["qdisc", "change", "dev", end, "root", "netem", "limit", "100000", "loss", share];
            let done = Command::new("/sbin/tc").args(words).status();
            assert!(done.is_ok_and(|status| status.success()), "tc refused: {words:?}");
        }
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.lose("0%");
    }
}
