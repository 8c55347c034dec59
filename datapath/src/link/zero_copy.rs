//! Whether zero-copy sends are cheaper on this connection: tried on its first slots, then decided for good.
//!
//! Zero-copy saves the copy into the socket and pays with pinning and a second completion. On loopback, and on
//! cards without scatter-gather, the kernel copies anyway, and says so: then it has lost at once.

use std::time::Duration;

/// How a slot is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendHow {
    /// The kernel copies it into the socket.
    Copy,
    /// The card reads it from the registered slot.
    ZeroCopy,
}

/// Slots sent each way before the decision.
const SLOTS_EACH: u32 = 8;
/// Shorter slots say nothing about the copy.
const BYTES_MIN: usize = 64 << 10;
/// Zero-copy must be cheaper by this much, because it holds its slots for a round trip.
const MARGIN: f64 = 0.9;

#[derive(Clone, Copy, Debug, Default)]
struct Tally {
    slots: u32,
    bytes: u64,
    cpu: Duration,
}

impl Tally {
    fn cost(&self) -> f64 {
        self.cpu.as_secs_f64() / (self.bytes.max(1) as f64)
    }
}

/// The trial of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    copy: Tally,
    zero_copy: Tally,
    decided: Option<SendHow>,
}

impl Trial {
    /// A trial, or none where the slots could not be registered.
    pub fn new(registered: bool) -> Trial {
        let decided = (!registered).then_some(SendHow::Copy);
        Trial { copy: Tally::default(), zero_copy: Tally::default(), decided }
    }

    /// What was decided, if it was.
    pub fn decided(&self) -> Option<SendHow> {
        self.decided
    }

    /// How to send the next slot of this length.
    pub fn next(&self, len: usize) -> SendHow {
        match self.decided {
            Some(how) => how,
            None if len >= BYTES_MIN && self.copy.slots >= SLOTS_EACH => SendHow::ZeroCopy,
            None => SendHow::Copy,
        }
    }

    /// A slot was sent, at this cost of this thread's CPU time.
    pub fn sent(&mut self, how: SendHow, len: usize, cpu: Duration) {
        if self.decided.is_some() || len < BYTES_MIN {
            return;
        }
        let tally = match how {
            SendHow::Copy => &mut self.copy,
            SendHow::ZeroCopy => &mut self.zero_copy,
        };
        *tally = Tally { slots: tally.slots + 1, bytes: tally.bytes + len as u64, cpu: tally.cpu + cpu };
        if self.zero_copy.slots >= SLOTS_EACH {
            let wins = self.zero_copy.cost() < MARGIN * self.copy.cost();
            self.decided = Some(if wins { SendHow::ZeroCopy } else { SendHow::Copy });
        }
    }

    /// The kernel said that it copied a zero-copy send, or that it cannot do one.
    pub fn lost(&mut self) {
        self.decided = Some(SendHow::Copy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: usize = 256 << 10;

    fn tried(zero_copy_us: u64) -> Trial {
        let mut trial = Trial::new(true);
        while trial.decided().is_none() {
            let how = trial.next(LEN);
            let us = if how == SendHow::Copy { 50 } else { zero_copy_us };
            trial.sent(how, LEN, Duration::from_micros(us));
        }
        trial
    }

    #[test]
    fn the_cheaper_way_wins_and_small_slots_do_not_count() {
        assert_eq!(tried(20).decided(), Some(SendHow::ZeroCopy));
        assert_eq!(tried(48).decided(), Some(SendHow::Copy));
        let mut trial = Trial::new(true);
        (0..100).for_each(|_| trial.sent(SendHow::Copy, 80, Duration::from_secs(1)));
        assert_eq!(trial.next(LEN), SendHow::Copy, "copy is not measured yet");
    }

    #[test]
    fn a_copy_behind_our_back_or_no_registration_ends_it() {
        let mut trial = Trial::new(true);
        trial.lost();
        assert_eq!(trial.next(LEN), SendHow::Copy);
        assert_eq!(Trial::new(false).decided(), Some(SendHow::Copy));
    }
}
