//! The micro-VM on a real KVM: the flat payload, its state on the way to another machine, full rings, clocks, features.

use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmferry_datapath::{ByteLen, DirtyLog, PageIndex, PageSet};
use vmferry_kvm::payload::FLAT_ENTRY;
use vmferry_kvm::{
    Blank, Config, FeatureSet, Flat, GuestEnd, GuestMemory, KvmError, Machine, State, Tracking,
};

/// Where the first CPUID entry begins in a state's bytes, and how long one is.
const CPUID_AT: usize = 32;
const CPUID_ENTRY: usize = 40;

fn config(tracking: Tracking) -> Config {
    let memory = Arc::new(GuestMemory::new(ByteLen(16 << 20)).expect("memory for a guest"));
    let features = FeatureSet::of_host().expect("the lab has a KVM");
    Config { memory, cpus: 1, tracking, features, console: Box::new(io::sink()), beat: Box::new(io::sink()) }
}

#[expect(clippy::disallowed_methods, reason = "a test measures a real machine")]
fn now() -> Instant {
    Instant::now()
}

#[test]
fn the_payload_does_what_it_is_told() {
    let guest = Flat::boot(config(Tracking::Bitmap)).unwrap().run().unwrap();
    guest.write(&[3, 4, 700, 3]).unwrap();
    let guest = guest.pause().unwrap();
    assert_eq!([2, 3, 4, 5, 700].map(|page| guest.count(page).unwrap()), [0, 2, 1, 0, 1]);
}

#[test]
fn a_guest_that_pulls_the_reset_line_has_ended() {
    let guest = Flat::boot(config(Tracking::Bitmap)).unwrap();
    // mov al, 0xfe; out 0x64, al; hlt
    guest.machine.memory().file().write_all_at(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4], FLAT_ENTRY).unwrap();
    let running = guest.run().unwrap();
    let began = now();
    let end = loop {
        let end = running.machine.ended();
        if end.is_some() || began.elapsed() > Duration::from_secs(10) {
            break end;
        }
    };
    assert_eq!(end, Some(GuestEnd::Reset));
    running.pause().unwrap();
}

/// A machine that stands still elsewhere, with a copy of the memory: what a move amounts to.
fn restore_elsewhere(from: &Machine, state: &State, tracking: Tracking) -> Result<Flat<Machine>, KvmError> {
    let config = config(tracking);
    let (mut source, mut target) = (from.memory().file(), config.memory.file());
    io::Seek::seek(&mut source, io::SeekFrom::Start(0)).expect("a memfd seeks");
    io::copy(&mut source, &mut target).expect("the copy has room");
    Flat::restore(config, state, Duration::ZERO)
}

/// A state's bytes without the clock, which ticks on.
fn without_clock(machine: &Machine) -> Vec<u8> {
    let mut bytes = machine.save().expect("it stands still").to_bytes();
    bytes[20..28].fill(0);
    bytes
}

#[test]
fn a_saved_guest_goes_on_in_another_machine() {
    for tracking in [Tracking::Bitmap, Tracking::Ring] {
        let guest = Flat::boot(config(tracking)).unwrap().run().unwrap();
        guest.write(&[9, 10, 11]).unwrap();
        let rounds = guest.commander.rounds();
        let source = guest.pause().unwrap();
        let state = State::from_bytes(&source.machine.save().unwrap().to_bytes()).unwrap();
        let target = restore_elsewhere(&source.machine, &state, tracking).unwrap();
        let (here, there) = (without_clock(&source.machine), without_clock(&target.machine));
        let differing = here.iter().zip(&there).filter(|(a, b)| a != b).count();
        println!("lab: {} bytes of state, {differing} differ after a restore", there.len());
        // The time stamp counter and the start times of the PIT's channels tick on; nothing else may differ.
        assert!(here.len() == there.len() && differing < 40, "{differing} bytes of {} differ", here.len());
        let target = target.run().unwrap();
        target.write(&[11, 12]).unwrap();
        assert!(target.commander.rounds() > rounds, "its register counts on");
        let target = target.pause().unwrap();
        assert_eq!([9, 10, 11, 12].map(|page| target.count(page).unwrap()), [1, 1, 2, 1]);
    }
}

#[test]
fn clocks_never_go_back_and_never_jump() {
    let guest = Flat::boot(config(Tracking::Bitmap)).unwrap().run().unwrap();
    guest.write(&[5]).unwrap();
    let source = guest.pause().unwrap();
    let before = now();
    let saved = source.machine.save().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let target = restore_elsewhere(&source.machine, &saved, Tracking::Bitmap).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let after = target.machine.save().unwrap();
    let real = before.elapsed();
    let passed =
        after.clock_ns().checked_sub(saved.clock_ns()).map(Duration::from_nanos).expect("it went back");
    println!("lab: {} ms of guest clock in {} ms", passed.as_millis(), real.as_millis());
    assert!(passed <= real, "{passed:?} passed in {real:?}");
    assert!(passed >= Duration::from_millis(200), "the wait after the restore is not lost: {passed:?}");
    let ticks = after.tsc(0).checked_sub(saved.tsc(0)).expect("the counter went back");
    let by_tsc = Duration::from_micros(ticks * 1000 / u64::from(after.tsc_khz()));
    assert!(
        by_tsc <= real && by_tsc.abs_diff(passed) < Duration::from_millis(30),
        "{by_tsc:?} by the counter"
    );
}

#[test]
fn a_target_that_lacks_a_feature_says_its_name() {
    let source = Flat::boot(config(Tracking::Bitmap)).unwrap();
    let mut bytes = source.machine.save().unwrap().to_bytes();
    // Leaf 7, EBX bit 16, which no CPU of this lab has.
    let host = FeatureSet::of_host().unwrap();
    assert!(!host.names().split(' ').any(|name| name == "avx512f"));
    let mut entries = bytes[CPUID_AT..].chunks_exact_mut(CPUID_ENTRY).take(64);
    let leaf = entries.find(|entry| entry[..8] == [7, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    leaf[18] |= 1;
    let state = State::from_bytes(&bytes).unwrap();
    let refused = restore_elsewhere(&source.machine, &state, Tracking::Bitmap).err().expect("a refusal");
    assert!(refused.to_string().contains("`avx512f`"), "{refused}");
}

#[test]
fn a_guest_has_only_the_features_that_it_was_given() {
    let host = FeatureSet::of_host().unwrap();
    let less = FeatureSet::parse("host,-avx2", &host).unwrap();
    let guest = Flat::boot(Config { features: less.clone(), ..config(Tracking::Bitmap) }).unwrap();
    let given = guest.machine.save().unwrap().features();
    assert_eq!(host.missing_in(&given), ["avx2"]);
    assert_eq!(given, less);
}

#[test]
fn a_full_ring_stops_a_cpu_and_loses_nothing() {
    let guest = Flat::boot(config(Tracking::RingOf(ByteLen(4096)))).unwrap();
    let mut log = guest.machine.track().unwrap();
    let guest = guest.run().unwrap();
    let mut set = PageSet::new(guest.machine.memory().layout());
    log.collect(&mut set).unwrap();
    set.clear();
    guest.write_run(16, 1500).unwrap();
    let full = guest.machine.ring_full_exits();
    let guest = guest.pause().unwrap();
    log.collect(&mut set).unwrap();
    println!("lab: {full} exits by a full ring of 256 entries for 1500 pages");
    assert!(full > 0);
    assert!((16..1516).all(|page| set.contains(PageIndex(page))), "{set:?}");
    assert!((16..1516).all(|page| guest.count(page).unwrap() == 1));
}

#[test]
fn a_wrong_number_of_cpus_is_refused() {
    let state = Flat::boot(config(Tracking::Bitmap)).unwrap().machine.save().unwrap();
    let blank = Blank::new(Config { cpus: 2, ..config(Tracking::Bitmap) }).unwrap();
    let refused = Machine::restore(blank, &state, Duration::ZERO).err().expect("a refusal").to_string();
    assert!(refused.contains("--cpus 1"), "{refused}");
}

#[path = "../examples/move_in_one_process.rs"]
mod example;

#[test]
fn the_example_moves_a_guest_in_one_process() {
    let pages = example::move_in_one_process().unwrap();
    println!("lab: {pages} pages in rounds and in the blackout");
    assert!(pages > 4096, "the first round is all of the memory, and the guest wrote on: {pages}");
}
