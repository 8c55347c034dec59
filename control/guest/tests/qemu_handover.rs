//! A guest's memory and device state go from one QEMU to another through the traits alone, without lanes.
#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is not as it must be")]
#![expect(
    clippy::disallowed_methods,
    reason = "prints how long the steps of a blackout take; asserts none of it"
)]

use std::time::{Duration, Instant};

use vmferry_datapath::{ChunkIndex, DirtyLog, GuestRam, PAGE_BYTES, PageIndex, PageSet};
use vmferry_guest::{GuestSpec, SourceGuest, TargetGuest, open_source, open_target};
use vmferry_rig::{Assets, Memory, QemuGuest, RunningGuest, guest_gap, require};
use vmferry_workload::Plan;

const MIB: u64 = 1 << 20;

fn plan(words: &str) -> Plan {
    words.parse().unwrap()
}

fn spec(guest: &RunningGuest) -> GuestSpec {
    GuestSpec::Qemu { qmp: guest.qmp_path().to_path_buf() }
}

/// Copies pages as a mover would: only those in the set.
fn copy(source: &GuestRam, target: &GuestRam, pages: &PageSet) {
    let mut page = [0; PAGE_BYTES];
    for (ChunkIndex(chunk), word) in pages.iter_chunks() {
        for bit in (0..64).filter(|bit| word & (1 << bit) != 0) {
            let index = PageIndex(chunk * 64 + bit);
            source.read_page(index, &mut page).unwrap();
            target.write_page(index, &page).unwrap();
        }
    }
}

/// When the guest was stopped and when it was told to run.
struct Blackout {
    paused_at: Instant,
    run_at: Instant,
}

struct Timed(Instant);

impl Timed {
    fn step(&mut self, what: &str) {
        eprintln!("  {what}: {:.2} ms", self.0.elapsed().as_secs_f64() * 1e3);
        self.0 = Instant::now();
    }
}

/// Moves the guest; returns when it runs on the target.
fn hand_over(source: &mut dyn SourceGuest, target: &mut dyn TargetGuest) -> Blackout {
    assert_eq!(source.description().facts, target.description().facts);
    assert_eq!(source.description().layout, target.description().layout);
    let (from, to) = (source.ram(), target.ram());
    let mut timed = Timed(Instant::now());
    target.prepare().unwrap();
    timed.step("prepare");
    let mut log: Box<dyn DirtyLog> = source.attach().unwrap();
    timed.step("attach");
    let mut dirty = PageSet::new(from.layout());
    log.collect(&mut dirty).unwrap();
    timed.step("first scan");
    copy(&from, &to, &from.populated().unwrap());
    timed.step("copy");
    for _ in 0..3 {
        let mut round = PageSet::new(from.layout());
        log.collect(&mut round).unwrap();
        timed.step(&format!("scan ({} dirty pages)", round.count().0));
        copy(&from, &to, &round);
        timed.step("copy");
    }
    let paused_at = Instant::now();
    source.pause().unwrap();
    timed.step("pause");
    let mut last = PageSet::new(from.layout());
    log.collect(&mut last).unwrap();
    timed.step("last scan");
    copy(&from, &to, &last);
    timed.step(&format!("last copy ({} pages)", last.count().0));
    let mut state = Vec::new();
    source.save_state(&mut state).unwrap();
    timed.step(&format!("save ({} bytes)", state.len()));
    // Saving may itself write guest memory (a device that flushes its ring): the last look comes after it.
    let mut by_saving = PageSet::new(from.layout());
    log.collect(&mut by_saving).unwrap();
    copy(&from, &to, &by_saving);
    timed.step(&format!("look after saving ({} pages)", by_saving.count().0));
    assert_eq!(source.new_writers().unwrap(), Vec::<String>::new());
    timed.step("new writers");
    target.load_state(&mut state.as_slice(), Duration::ZERO).unwrap();
    timed.step("load");
    target.run().unwrap();
    timed.step("run");
    let run_at = Instant::now();
    drop(log);
    source.retire().unwrap();
    Blackout { paused_at, run_at }
}

/// Boots the guest, moves it, and asks it afterwards whether all of its pages are right.
fn moves_and_verifies(recipe: &QemuGuest) {
    let (mut a, mut b) = recipe.pair().unwrap();
    let (mut source, mut target) = (open_source(&spec(&a)).unwrap(), open_target(&spec(&b)).unwrap());
    let before = a.console().status().unwrap();
    let since = Instant::now();
    let blackout = hand_over(source.as_mut(), target.as_mut());
    b.beats().wait_since(since, Duration::from_secs(5)).expect("the guest beats on the target");
    let away = guest_gap(a.beats(), b.beats(), since).unwrap();
    let ms = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
    eprintln!(
        "  guest away: {:.1} ms ({:.1} before pause, {:.1} between, {:.1} after run), {} beats lost",
        away.gap().as_secs_f64() * 1e3,
        ms(away.last_on_source.at, blackout.paused_at),
        ms(blackout.paused_at, blackout.run_at),
        ms(blackout.run_at, away.first_on_target.at),
        away.beats_lost()
    );
    assert!(!away.overlaps(), "two runners");
    assert_eq!(b.run_state().unwrap(), "running");
    let report = b.console().verify().unwrap();
    assert_eq!(report.wrong, 0, "{report:?}");
    let after = b.console().status().unwrap();
    assert!(after.uptime_ms > before.uptime_ms && after.writes >= before.writes, "{before:?} {after:?}");
    a.wait_end(Duration::from_secs(10)).unwrap();
}

#[test]
fn a_working_guest_goes_on_on_the_target() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let plan = plan("seed=1,pages=16384,set=2048,pattern=random,rate=8MiB,zero=100");
    moves_and_verifies(&QemuGuest::new(&assets, 256 * MIB, plan).unwrap());
}

/// Minor faults and processor time (user, system; ticks of 10 ms) of a process.
fn usage(pid: u32) -> (u64, u64, u64) {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let words: Vec<u64> =
        stat.rsplit_once(") ").unwrap().1.split(' ').map(|word| word.parse().unwrap_or(0)).collect();
    (words[7], words[11], words[12])
}

#[test]
#[ignore = "prints figures"]
fn figures_of_moves_there_and_on() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let plan = plan("seed=1,pages=32768,set=4096,pattern=random,rate=8MiB,zero=100");
    let recipe = QemuGuest::new(&assets, 1024 * MIB, plan).unwrap();
    let mut a = recipe.boot("first").unwrap();
    for number in 0..8 {
        let b = recipe.await_incoming(&format!("next{number}")).unwrap();
        let (mut source, mut target) = (open_source(&spec(&a)).unwrap(), open_target(&spec(&b)).unwrap());
        let since = Instant::now();
        let blackout = hand_over(source.as_mut(), target.as_mut());
        let at_run = usage(b.pid());
        b.beats().wait_since(since, Duration::from_secs(5)).expect("the guest beats on the target");
        let at_beat = usage(b.pid());
        let away = guest_gap(a.beats(), b.beats(), since).unwrap();
        let ms = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
        eprintln!(
            "MOVE {number}: away {:.1} ms, between {:.1}, after run {:.1}; faults {}, user {} system {}",
            away.gap().as_secs_f64() * 1e3,
            ms(blackout.paused_at, blackout.run_at),
            ms(blackout.run_at, away.first_on_target.at),
            at_beat.0 - at_run.0,
            at_beat.1 - at_run.1,
            at_beat.2 - at_run.2,
        );
        std::thread::sleep(Duration::from_millis(500));
        a = b;
    }
}

#[test]
fn two_numa_blocks_and_memory_above_4_gib_move() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let plan = plan("seed=2,pages=8192,set=1024,pattern=random,rate=4MiB,zero=100");
    let recipe = QemuGuest::new(&assets, 0, plan).unwrap().numa(&[2560 * MIB, 2048 * MIB]).cpus(2);
    moves_and_verifies(&recipe);
}

#[test]
fn huge_pages_move() {
    let assets = require!(Assets::find());
    require!(vmferry_rig::root());
    let folder = require!(vmferry_rig::huge_pages(2 * 128));
    let plan = plan("seed=3,pages=4096,set=1024,pattern=random,rate=4MiB,zero=100");
    moves_and_verifies(&QemuGuest::new(&assets, 256 * MIB, plan).unwrap().memory(Memory::HugePages(folder)));
}
