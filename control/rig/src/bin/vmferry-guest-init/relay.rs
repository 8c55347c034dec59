//! Proof that every processor works: one thread a processor, and a turn that goes round them all.
//!
//! ```text
//!   cpu 0: check, write, sleep ──wake──► cpu 1: check, write, sleep ──wake──► cpu 0 …
//! ```
//!
//! The sleep is ended by the processor's own timer, and the wake crosses from one processor to the next by an interrupt
//! between them. Each thread has pages of its own: a turn writes one of them, and finds in all of them what the turns
//! before left. A guest with one processor runs no relay: it would only disturb the beat.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rustix::thread::{CpuSet, sched_setaffinity};
use vmferry_rig::GuestCpus;

const TURN: Duration = Duration::from_millis(5);
const PAGES: u64 = 64;
const WORDS_PER_PAGE: usize = 512;

/// What the relay has done.
#[derive(Debug, Default)]
pub(crate) struct RelayCounters {
    turns: Vec<AtomicU64>,
    wrong: AtomicU64,
}

/// Brings the processors up that the kernel left for later, and starts the relay.
pub(crate) fn start() -> Arc<RelayCounters> {
    bring_up();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let counters = Arc::new(RelayCounters {
        turns: (0..cpus).map(|_| AtomicU64::new(0)).collect(),
        ..Default::default()
    });
    if cpus < 2 {
        return counters;
    }
    let (first, mut hears) = channel();
    for cpu in 0..cpus {
        let (tells, next) = channel();
        let ring = if cpu + 1 == cpus { first.clone() } else { tells };
        let (mine, counting) = (std::mem::replace(&mut hears, next), Arc::clone(&counters));
        std::thread::spawn(move || run(cpu, &mine, &ring, &counting));
    }
    let _ = first.send(());
    counters
}

/// With `maxcpus=1` a kernel boots on one processor: under two emulations, telling the others of every word of its code
/// that it changes would take longer than all the rest.
fn bring_up() {
    let cpus = std::fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten();
    for cpu in cpus {
        let _ = std::fs::OpenOptions::new()
            .write(true)
            .open(cpu.path().join("online"))
            .and_then(|mut file| file.write_all(b"1"));
    }
}

fn run(cpu: usize, hears: &Receiver<()>, tells: &Sender<()>, counters: &RelayCounters) {
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).expect("a processor that was counted is there");
    let mut pages = Pages::new();
    while hears.recv().is_ok() {
        counters.wrong.fetch_add(pages.turn(), Ordering::Relaxed);
        counters.turns[cpu].fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(TURN);
        let _ = tells.send(());
    }
}

/// The pages of one thread: turn after turn, each holds the number of the last turn that wrote it.
struct Pages {
    words: Vec<u64>,
    turns: u64,
}

impl Pages {
    fn new() -> Self {
        Self { words: vec![0; WORDS_PER_PAGE * 64], turns: 0 }
    }

    /// Writes the next page; how many pages did not hold what they must.
    fn turn(&mut self) -> u64 {
        let turns = self.turns;
        let first_words = self.words.iter().step_by(WORDS_PER_PAGE);
        let wrong =
            first_words.zip(0..PAGES).filter(|(word, page)| **word != last_turn(*page, turns)).count();
        self.turns += 1;
        let page = usize::try_from(self.turns % PAGES).unwrap_or(0);
        self.words[page * WORDS_PER_PAGE] = self.turns;
        wrong as u64
    }
}

/// The last of so many turns that wrote this page; turn 1 was the first, and 0 is none.
fn last_turn(page: u64, turns: u64) -> u64 {
    let back = (turns % PAGES + PAGES - page) % PAGES;
    turns.saturating_sub(back)
}

impl RelayCounters {
    /// With what the kernel counts.
    pub(crate) fn status(&self) -> GuestCpus {
        let online = std::fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
        let interrupts = std::fs::read_to_string("/proc/interrupts").unwrap_or_default();
        GuestCpus {
            online: online.trim().to_owned(),
            turns: self.turns.iter().map(|turns| turns.load(Ordering::Relaxed)).collect(),
            wrong: self.wrong.load(Ordering::Relaxed),
            timer: row(&interrupts, "LOC:"),
            between: ["RES:", "CAL:"].iter().map(|name| row(&interrupts, name)).fold(Vec::new(), add),
        }
    }
}

/// The counts of one line of `/proc/interrupts`, by processor.
fn row(interrupts: &str, name: &str) -> Vec<u64> {
    let line = interrupts.lines().find_map(|line| line.trim_start().strip_prefix(name)).unwrap_or_default();
    line.split_whitespace().map_while(|word| word.parse().ok()).collect()
}

fn add(mut sums: Vec<u64>, counts: Vec<u64>) -> Vec<u64> {
    sums.resize(sums.len().max(counts.len()), 0);
    sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    sums
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_a_move_left_behind_shows() {
        let mut pages = Pages::new();
        assert_eq!((0..200).map(|_| pages.turn()).sum::<u64>(), 0);
        pages.words[5 * WORDS_PER_PAGE] -= PAGES;
        assert_eq!(pages.turn(), 1);
    }

    #[test]
    fn a_row_is_read_to_its_words() {
        let text = "           CPU0       CPU1\n LOC:     11         22   Local timer interrupts\n";
        assert_eq!(row(text, "LOC:"), [11, 22]);
        assert_eq!(row(text, "RES:"), [0; 0]);
        assert_eq!(add(vec![1], vec![2, 3]), [3, 3]);
    }
}
