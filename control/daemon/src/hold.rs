//! Holds a move still at a chosen phase, so that tests (and operators who rehearse a failure) can strike exactly there.
//!
//! `VMFERRY_HOLD=send:last-round:2000` makes `send` say so and sleep 2000 ms when it first acts in that phase;
//! `receive:load:2000` does it on the target. Nothing else changes: the same code runs before and after.

use std::time::Duration;

/// Where to hold, and for how long. Holds once.
#[derive(Debug, Default, Clone)]
pub struct Hold {
    at: Option<(String, Duration)>,
}

impl Hold {
    /// What `VMFERRY_HOLD` asks of `verb`.
    #[must_use]
    pub fn of(verb: &str) -> Self {
        Self { at: std::env::var("VMFERRY_HOLD").ok().and_then(|text| parse(&text, verb)) }
    }

    /// Called before each action with the phase that it belongs to.
    pub fn reached(&mut self, phase: &str) {
        if let Some((_, time)) = self.at.take_if(|(at, _)| at == phase) {
            eprintln!("vmferry: holding at {phase}");
            std::thread::sleep(time);
        }
    }
}

fn parse(text: &str, verb: &str) -> Option<(String, Duration)> {
    let mut words = text.split(':');
    let (whose, phase, ms) = (words.next()?, words.next()?, words.next()?);
    let ms = ms.parse().ok()?;
    (whose == verb && words.next().is_none()).then(|| (phase.to_owned(), Duration::from_millis(ms)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_named_side_holds() {
        assert_eq!(parse("send:copy:20", "send"), Some(("copy".to_owned(), Duration::from_millis(20))));
        assert_eq!(parse("send:copy:20", "receive"), None);
        assert_eq!(parse("send:copy", "send"), None);
        assert_eq!(parse("send:copy:x", "send"), None);
    }
}
