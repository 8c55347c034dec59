//! The micro-VM on a real KVM: the flat payload, its state on the way to another machine, full rings, clocks, features.

mod flat;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use flat::{FLAT_RAM, Flat, FlatGuest, config};
use vmferry_datapath::{ByteLen, DirtyLog, PageIndex, PageSet};
use vmferry_kvm::{Blank, FeatureSet, GuestEnd, GuestMemory, KvmError, Machine, State, Tracking};

/// Where the first CPUID entry begins in a state's bytes, and how long one is.
const CPUID_AT: usize = 32;
const CPUID_ENTRY: usize = 40;

#[test]
fn the_payload_does_what_it_is_told() {
    let guest = FlatGuest::boot(Tracking::Bitmap).run();
    let guest = guest.write(&[3, 4, 700, 3]).pause();
    let counts: Vec<u32> = [2, 3, 4, 5, 700].map(|page| guest.count(page)).to_vec();
    assert_eq!(counts, [0, 2, 1, 0, 1]);
}

#[test]
fn a_guest_that_pulls_the_reset_line_has_ended() {
    // mov al, 0xfe; out 0x64, al; then nothing that it may do: the reset comes first.
    let blank = Blank::new(config(Tracking::Bitmap, Arc::new(GuestMemory::new(FLAT_RAM).unwrap()))).unwrap();
    let machine = blank.boot_flat().unwrap();
    flat::poke(&machine, vmferry_kvm::payload::FLAT_ENTRY, &[0xb0, 0xfe, 0xe6, 0x64, 0xf4]);
    let running = machine.run().unwrap();
    let end = flat::until(Duration::from_secs(10), || running.ended());
    assert_eq!(end, Some(GuestEnd::Reset));
    running.pause().unwrap();
}

/// A machine that stands still elsewhere, with a copy of the memory: what a move amounts to.
fn restore_elsewhere(from: &Machine, state: &State, tracking: Tracking) -> Result<Flat<Machine>, KvmError> {
    let memory = Arc::new(GuestMemory::new(FLAT_RAM)?);
    let (mut source, mut target) = (from.memory().file(), memory.file());
    io::Seek::seek(&mut source, io::SeekFrom::Start(0)).expect("a memfd seeks");
    io::copy(&mut source, &mut target).expect("the copy has room");
    let blank = Blank::new(config(tracking, memory))?;
    let commander = flat::command(&blank);
    Ok(Flat { machine: Machine::restore(blank, state)?, commander })
}

/// A state's bytes without what ticks on.
fn without_clocks(machine: &Machine) -> Vec<u8> {
    let mut bytes = machine.save().expect("it stands still").to_bytes();
    bytes[20..28].fill(0);
    bytes
}

#[test]
fn a_saved_guest_goes_on_in_another_machine() {
    for tracking in [Tracking::Bitmap, Tracking::Ring] {
        let guest = FlatGuest::boot(tracking).run().write(&[9, 10, 11]);
        let rounds = guest.commander.rounds();
        let source = guest.pause();
        let state = State::from_bytes(&source.machine.save().unwrap().to_bytes()).unwrap();
        let target = restore_elsewhere(&source.machine, &state, tracking).unwrap();
        let (here, there) = (without_clocks(&source.machine), without_clocks(&target.machine));
        let differing = here.iter().zip(&there).filter(|(a, b)| a != b).count();
        println!("lab: {} bytes of state, {differing} differ after a restore", there.len());
        // The time stamp counter, the timer's own start time and its deadline tick on; nothing else may differ.
        assert!(here.len() == there.len() && differing < 64, "{differing} bytes of {} differ", here.len());
        let target = target.run().write(&[11, 12]).pause();
        assert_eq!([9, 10, 11, 12].map(|page| target.count(page)), [1, 1, 2, 1]);
        assert!(target.commander.rounds() > rounds, "its register counts on");
    }
}

#[test]
fn clocks_never_go_back_and_never_jump() {
    let source = FlatGuest::boot(Tracking::Bitmap).run().write(&[5]).pause();
    let before = flat::now();
    let saved = source.machine.save().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let target = restore_elsewhere(&source.machine, &saved, Tracking::Bitmap).unwrap();
    let after = target.machine.save().unwrap();
    let real = before.elapsed();
    let passed = after.clock_ns().checked_sub(saved.clock_ns()).expect("the clock went back");
    println!("lab: {} ms of guest clock in {} ms", passed / 1_000_000, real.as_millis());
    assert!(Duration::from_nanos(passed) <= real, "{passed} ns passed in {real:?}");
    let ticks = after.tsc(0) - saved.tsc(0);
    let real_ticks = real.as_nanos() * u128::from(after.tsc_khz()) / 1_000_000;
    assert!(u128::from(ticks) <= real_ticks && after.tsc(0) > saved.tsc(0), "{ticks} of {real_ticks} ticks");
    // The two clocks agree about how long it was, to a fifth of a millisecond.
    let by_tsc = u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(after.tsc_khz())).unwrap();
    assert!(by_tsc.abs_diff(passed) < 50_000_000, "{by_tsc} ns by the counter, {passed} by the clock");
}

#[test]
fn a_target_that_lacks_a_feature_says_its_name() {
    let source = FlatGuest::boot(Tracking::Bitmap);
    let mut bytes = source.machine.save().unwrap().to_bytes();
    let host = FeatureSet::of_host().unwrap();
    println!("lab: {}", host.names());
    // Leaf 7, EBX bit 16: a CPU that this lab does not emulate.
    assert!(!host.names().split(' ').any(|name| name == "avx512f"));
    let entries = bytes[CPUID_AT..].chunks_exact_mut(CPUID_ENTRY);
    let leaf = entries.take(64).find(|entry| entry[..8] == [7, 0, 0, 0, 0, 0, 0, 0]).expect("leaf 7");
    leaf[18] |= 1;
    let state = State::from_bytes(&bytes).unwrap();
    let refused = restore_elsewhere(&source.machine, &state, Tracking::Bitmap).err().expect("a refusal");
    assert!(refused.to_string().contains("`avx512f`"), "{refused}");
}

#[test]
fn a_guest_has_only_the_features_that_it_was_given() {
    let host = FeatureSet::of_host().unwrap();
    let less = FeatureSet::parse("host,-avx2", &host).unwrap();
    let blank = Blank::new(vmferry_kvm::Config {
        features: less.clone(),
        ..config(Tracking::Bitmap, Arc::new(GuestMemory::new(FLAT_RAM).unwrap()))
    });
    let machine = blank.unwrap().boot_flat().unwrap();
    let given = machine.save().unwrap().features();
    assert_eq!(host.missing_in(&given), ["avx2"]);
    assert_eq!(given, less);
}

#[test]
fn a_full_ring_stops_a_cpu_and_loses_nothing() {
    let guest = FlatGuest::boot(Tracking::RingOf(ByteLen(4096)));
    let mut log = guest.machine.track().unwrap();
    let guest = guest.run();
    let mut set = PageSet::new(guest.machine.memory().layout());
    log.collect(&mut set).unwrap();
    set.clear();
    let pages: Vec<u32> = (16..1516).collect();
    let guest = guest.write_run(16, 1500);
    let full = guest.machine.ring_full_exits();
    let guest = guest.pause();
    log.collect(&mut set).unwrap();
    println!("lab: {full} exits by a full ring of 256 entries for {} pages", pages.len());
    assert!(full > 0);
    assert!(pages.iter().all(|page| set.contains(PageIndex(u64::from(*page)))), "{set:?}");
    assert!(pages.iter().all(|page| guest.count(*page) == 1));
}

#[test]
fn a_wrong_number_of_cpus_is_refused() {
    let source = FlatGuest::boot(Tracking::Bitmap);
    let state = source.machine.save().unwrap();
    let memory = Arc::new(GuestMemory::new(FLAT_RAM).unwrap());
    let blank = Blank::new(vmferry_kvm::Config { cpus: 2, ..config(Tracking::Bitmap, memory) }).unwrap();
    let refused = Machine::restore(blank, &state).err().expect("a refusal").to_string();
    assert!(refused.contains("--cpus 1"), "{refused}");
}
