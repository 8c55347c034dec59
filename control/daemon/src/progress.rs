//! What a person sees while a move runs: one live line on a terminal, plain log lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::report::human;

/// Off a terminal, a line at most this often.
const LOG_EVERY: Duration = Duration::from_secs(2);

/// The figures of the live line.
#[derive(Debug, Clone, Default)]
pub struct Glance {
    /// Round, from 1.
    pub round: u32,
    /// Page bytes sent so far.
    pub sent_bytes: u64,
    /// Page bytes still to send.
    pub remaining_bytes: u64,
    /// Bytes a second over the wire.
    pub rate_bytes_per_s: u64,
    /// Bytes a second that the guest dirties.
    pub dirty_bytes_per_s: u64,
    /// p05, p50 and p95 of the blackout, in milliseconds.
    pub predicted_ms: Option<(f64, f64, f64)>,
}

impl Glance {
    fn to_line(&self) -> String {
        let predicted = self.predicted_ms.map_or_else(String::new, |(low, middle, high)| {
            format!(", blackout {middle:.0} ms ({low:.0} to {high:.0})")
        });
        format!(
            "round {}, sent {}, remaining {}, {}/s, dirtied {}/s{predicted}",
            self.round,
            human(self.sent_bytes),
            human(self.remaining_bytes),
            human(self.rate_bytes_per_s),
            human(self.dirty_bytes_per_s)
        )
    }
}

/// The live line, or the log.
pub struct Progress {
    bar: Option<ProgressBar>,
    logged: Option<Duration>,
}

impl Progress {
    /// A live line where stderr is a terminal.
    #[must_use]
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed_precise} {msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self { bar, logged: None }
    }

    /// Says what is going on; `now` since the start of the move.
    pub fn glance(&mut self, now: Duration, glance: &Glance) {
        match &self.bar {
            Some(bar) => {
                bar.set_message(glance.to_line());
                bar.tick();
            }
            None if self.logged.is_none_or(|last| now >= last + LOG_EVERY) => {
                self.logged = Some(now);
                eprintln!("{:8.3} s  {}", now.as_secs_f64(), glance.to_line());
            }
            None => {}
        }
    }

    /// A step worth a line of its own.
    pub fn step(&self, now: Duration, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(format!("{:8.3} s  {text}", now.as_secs_f64())),
            None => eprintln!("{:8.3} s  {text}", now.as_secs_f64()),
        }
    }

    /// Takes the live line away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}
